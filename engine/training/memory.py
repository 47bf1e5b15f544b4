"""What a rank's memory holds while it trains, counted from the settings. The only formula of it: for headers and plans.

It counts tensors. What the driver, libraries and fragmentation take besides is not in it.

B pictures in a forward pass of a rank, S their side in pixels, P patches, N = P+1 tokens, D channels, C hidden channels
of the MLP, H heads, L blocks, M masked patches, V visual tokens, a bytes of a number in matrix products: 4, or 2 under
bf16 autocast. n parameters, R ranks, b numbers in a bucket.

Measured on a CPU, by every tensor that autograd saves and every allocation of a step, at all stages on two ranks: see
tests/test_memory.py, which holds the formulas to it. They are those of DeepSpeed 0.19.8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Settings
from ..models.encoder import hidden_width
from ..models.flops import parameter_count
from ..tokenizer.flops import TokenizerSize, encoder_parameters, encoding_memory

FP32 = 4
BUCKET = 500_000_000
"""DeepSpeed's own, where its configuration gives none: numbers reduced at a time."""
PREFETCH_BUCKET = 50_000_000


@dataclass(frozen=True)
class Pass:
    """What one forward pass of a rank is, for its memory."""

    micro_batch: int
    bf16: bool
    vocab_size: int
    keeps_scores: bool
    """Whether attention keeps [B, H, N, N]: in plain torch it does, fused it does not."""
    tokenizer: TokenizerSize
    token_side: int
    """Side of the token view in pixels."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at the moment of a step when they are most, by part; and those it keeps on the host."""

    moment: str
    parts: Mapping[str, float]
    host: float

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.parts.values())


def keeps_scores(impl: str, device_type: str) -> bool:
    """Whether attention by `train.impl` keeps the scores on a device: "cpu" or "cuda"."""
    return impl == "reference" or (device_type == "cpu" and impl in ("auto", "sdpa"))


@dataclass(frozen=True)
class StateMemory:
    """Bytes of weights, gradients and the optimizer's state: what does not depend on the pictures of a pass."""

    held: Mapping[str, float]
    """At any moment of a step."""
    summed: float
    """Gradients of the passes before, from the second pass of a step on."""
    early: float
    """Gradients that are there as soon as the backward pass starts."""
    gathered: float
    """Weights of other ranks, from the forward pass to the end of the backward pass."""
    reduced: Mapping[str, float]
    """While gradients are reduced, in place of `summed` and `early`."""
    host: float
    """In the host's memory."""


def rank_memory(settings: Settings, run: Pass, config: Mapping[str, Any], *, world_size: int) -> RankMemory:
    """Bytes of a rank, with the parts at its fullest moment.

    settings:   the run's settings
    run:        its forward pass
    config:     DeepSpeed's configuration, as `resolve_json` gives it
    world_size: R

    The moments are: tokens are made (no activation is there yet), the backward pass starts (all activations are
    there), and gradients are reduced (all gradients are there). Between the last two, activations of a block go and
    gradients of a block come, so that no moment between them has more than both.
    """
    state = state_memory(settings, run.vocab_size, config, world_size=world_size)
    held = {**state.held, "tokenizer": FP32 * encoder_parameters(run.tokenizer), "batch": batch_memory(settings, run)}
    grads = held.get("gradients", 0.0)
    moments: dict[str, dict[str, float]] = {
        "tokens are made": {
            **held,
            "gradients": grads + state.summed,
            "working tensors": encoding_memory(run.tokenizer, run.token_side, run.micro_batch, bf16=run.bf16),
        },
        "the backward pass starts": {
            **held,
            "gradients": grads + state.summed + state.early,
            "gathered weights": state.gathered,
            "bf16 copies of weights": bf16_weights(settings, run, int(config["zero_optimization"]["stage"])),
            "activations": saved_activations(settings, run),
            "working tensors": working_tensors(settings, run),
        },
        "gradients are reduced": {**held, **state.reduced},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return RankMemory(moment, {name: count for name, count in moments[moment].items() if count}, state.host)


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed keeps the optimizer's state on the host."""
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def state_memory(settings: Settings, vocab_size: int, config: Mapping[str, Any], *, world_size: int) -> StateMemory:
    """Bytes of weights, gradients, optimizer and DeepSpeed's buffers at a ZeRO stage.

    AdamW keeps two fp32 moments; weights and gradients are fp32 too, under autocast as well. ZeRO (Rajbhandari et al.
    2020, section 5) divides the moments by R at stage 1, the gradients at 2 and the weights at 3; DeepSpeed keeps an
    fp32 copy of the part of the weights that a rank updates. Buckets are allocated in full, however small the model:
    two at stages 1 and 2, where one is filled while the other is reduced, one at 3.

        stage   weights   fp32 copy   moments   buckets   gradients of passes before   as the backward starts
        0       4n        -           8n        -         4n                           -
        1       4n        4n/R        8n/R      8b        4n                           4n/R
        2       4n        4n/R        8n/R      8b        4n/R                         4n/R
        3       4n/R      4n/R        8n/R      4b        4n/R, at any time            -

    The last column is of the rank that has the last blocks; at stage 2 it is there in any pass, for DeepSpeed's
    gradients of a pass are in reference cycles, which go only when Python collects garbage. To reduce gradients, stage
    0 of several ranks copies all of them into one buffer, 1 and 2 a bucket at a time. At stage 3 all weights of these
    models, and the next bucket of them, stay gathered until the end of the backward pass: stage3_max_live_parameters
    is 1e9.

    Of a JSON, the stage, offload and the sizes of buckets are read. Stages 1 and 2 are counted with overlap_comm and
    contiguous_gradients, as in ds_configs/, stage 3 with DeepSpeed's own stage3_max_live_parameters and
    stage3_max_reuse_distance, and offload at stage 3 with that of the weights too; a JSON that sets them otherwise
    takes another amount: less without overlap_comm, or where fewer weights stay gathered.

    Offload moves copy and moments to the host, and a rank's gradients: there it keeps them beside a buffer for the new
    weights, and a sum of them from the second pass of a step on; at stage 3 the weights' own part too. At 1 and 2, a
    gradient of the largest size passes through a buffer on either side.
    """
    zero = config["zero_optimization"]
    stage, accumulates = int(zero["stage"]), int(config["gradient_accumulation_steps"]) > 1
    parameters = parameter_count(settings.model, settings.data.image_size, vocab_size)
    whole, part = float(FP32 * parameters), FP32 * parameters / world_size
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    on_host = offloads(config)
    if stage == 0:
        held = {"weights": whole, "optimizer state": 2 * whole}
        reduced = {"gradients": whole}
        if world_size > 1:
            reduced["buckets"] = float(FP32 * min(parameters, BUCKET))
        return StateMemory(held, whole if accumulates else 0.0, 0.0, 0.0, reduced, 0.0)
    if stage == 3:
        held = {"buckets": float(FP32 * bucket)}
        if not on_host:
            held |= {"weights": part, "optimizer state": 3 * part, "gradients": part}
        prefetched = min(int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)), parameters)
        gathered = whole + FP32 * prefetched if world_size > 1 or on_host else 0.0
        return StateMemory(held, 0.0, 0.0, gathered, {}, 6 * part if on_host else 0.0)
    held = {"weights": whole, "buckets": 2.0 * FP32 * bucket}
    own = host = 0.0
    if on_host:
        model = settings.model
        sizes = (3 * model.width, hidden_width(model), vocab_size, 3 * model.patch_size**2)
        largest = float(FP32 * model.width * max(sizes))
        held["buckets"] += largest
        host = (6 if accumulates else 5) * part + largest
    else:
        held["optimizer state"] = 3 * part
        own = part
    summed = 0.0
    if accumulates:
        summed = whole if stage == 1 else own
    reduced = {"gradients": summed + own, "working tensors": float(FP32 * min(bucket, parameters))}
    return StateMemory(held, summed, own, 0.0, reduced, host)


def saved_activations(settings: Settings, run: Pass) -> float:
    """Bytes that autograd keeps from the forward to the backward pass, weights excepted.

    For each picture and block:

        residual stream     2 N D 4      before each norm
        branches            2 N D 4      before LayerScale, whose gradient needs them; none without LayerScale
        normed, attended    3 N D a      what the linears read: qkv, projection, fc1
        query, key, value   3 N D a
        scores              H N^2 a      softmax, which attention makes with autocast off, on a GPU as on a CPU;
                                         fused attention keeps 4 H N, the logarithm of its sum
        MLP                 2 N C a      before and after GELU
        norms               4 N 4        mean and deviation

    and for each picture the patches, 3 S^2 a, and in the head M D (4 + a) of rows and 4 M V of log-probabilities.
    Fused attention also keeps the dense bias of each block, rounded to a bytes: H N (N to the next 16) a, once a pass.
    """
    model, image_size = settings.model, settings.data.image_size
    wide = 2 if run.bf16 else FP32
    tokens, width, hidden = settings.num_patches + 1, model.width, hidden_width(model)
    scores = model.num_heads * (tokens * tokens * wide if run.keeps_scores else FP32 * tokens)
    block = (
        (4 if model.layer_scale else 2) * tokens * width * FP32
        + 6 * tokens * width * wide
        + scores
        + 2 * tokens * hidden * wide
        + 4 * tokens * FP32
    )
    head = settings.mask.num_patches * (width * (FP32 + wide) + FP32 * run.vocab_size)
    picture = model.depth * block + 3 * image_size**2 * wide + head
    bias = 0
    if not run.keeps_scores and model.rel_pos_bias != "none":
        bias = model.depth * model.num_heads * tokens * (-(-tokens // 16) * 16) * wide
    return float(run.micro_batch * picture + bias)


def working_tensors(settings: Settings, run: Pass) -> float:
    """Bytes that the start of the backward pass needs beside what was saved: the largest of three.

    The loss makes the gradient of the log-probabilities and from it that of the logits: 8 M V for a picture. Then the
    head makes the gradient of its weight, 4 D V (under autocast first in bf16, in place of the weight's copy). After
    it, with the head's own tensors gone, the last MLP has the gradients of the residual stream (4 N D; without
    LayerScale nothing has gone in its place), of its output (a N D) and of its hidden layer (a N C) at a time, and that
    of a weight (4 D C, under autocast in both).
    """
    model = settings.model
    wide = 2 if run.bf16 else FP32
    tokens, width, hidden = settings.num_patches + 1, model.width, hidden_width(model)
    logits = settings.mask.num_patches * run.vocab_size
    rows = settings.mask.num_patches * width * (FP32 + wide)
    weight_grad = FP32 + (wide if run.bf16 else 0)
    loss = run.micro_batch * 2 * FP32 * logits
    head = run.micro_batch * (wide - FP32) * logits + FP32 * width * run.vocab_size
    stream = 0 if model.layer_scale else FP32 * tokens * width
    mlp = run.micro_batch * (stream + wide * tokens * (width + hidden) - FP32 * logits - rows)
    return float(max(loss, head, mlp + weight_grad * width * hidden))


def bf16_weights(settings: Settings, run: Pass, stage: int) -> float:
    """Bytes of the copies of linear weights that autocast makes and autograd keeps: 2 for each number; none in fp32.

    The projection of the patches is not among them, for the pixels have no gradient. At stage 3 DeepSpeed's own linear
    keeps the weight and casts it again, so that only the head's copy stays.
    """
    if not run.bf16:
        return 0.0
    model = settings.model
    linears = model.depth * (4 * model.width**2 + 2 * model.width * hidden_width(model))
    return 2.0 * ((linears if stage < 3 else 0) + model.width * run.vocab_size)


def batch_memory(settings: Settings, run: Pass) -> float:
    """Bytes of the pictures as they come, two views of uint8, with their masks and tokens."""
    views = 3 * settings.data.image_size**2 + 3 * run.token_side**2
    return float(run.micro_batch * (views + 8 * (settings.mask.num_patches + settings.num_patches + 1)))
