"""What a rank's memory holds while it trains, counted from the settings. The only formula of it: for headers and plans.

It counts tensors. What the driver, libraries and fragmentation take besides is not in it. What does not depend on the
pictures of a pass is counted in zero_memory.py.

B pictures in a forward pass of a rank, S their side in pixels, P patches, N = P+1 tokens, D channels, C hidden channels
of the MLP, H heads, L blocks, M masked patches, V visual tokens, a bytes of a number in matrix products: 4, or 2 under
bf16 autocast.

Measured on a CPU, by every tensor that autograd saves and every allocation of a step, at all stages on two ranks: see
tests/test_memory.py, which holds the formulas to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fused_beit.kernels import TokenLossPlan, token_loss_plan

from ..config import Prefetch, Settings
from ..models.encoder import hidden_width
from ..tokenizer.flops import TokenizerSize, encoder_parameters, encoding_memory
from .zero_memory import FP32, state_memory

Operators = Literal["plain", "fused attention", "triton"]
"""Plain torch; the same but for attention, which keeps no scores; or all of them by this project's kernels."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass of a rank is, for its memory."""

    micro_batch: int
    bf16: bool
    vocab_size: int
    operators: Operators
    """As `operators_of` gives them."""
    tokenizer: TokenizerSize
    token_side: int
    """Side of the token view in pixels."""
    prefetch: Prefetch = "none"
    """What of the next batch comes while it runs, as `prefetched` gives it."""

    @property
    def keeps_scores(self) -> bool:
        """Whether attention keeps [B, H, N, N]."""
        return self.operators == "plain"


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


def operators_of(impl: str, device_type: str) -> Operators:
    """What `train.impl` makes the operators on a device: "cpu" or "cuda"."""
    if impl == "triton":
        return "triton"
    return "plain" if impl == "reference" or (device_type == "cpu" and impl in ("auto", "sdpa")) else "fused attention"


def prefetched(prefetch: Prefetch, device_type: str) -> Prefetch:
    """What `train.prefetch` brings to a device, "cpu" or "cuda", while a step runs: to a CPU nothing."""
    return prefetch if device_type == "cuda" else "none"


def rank_memory(settings: Settings, run: Pass, config: Mapping[str, Any], *, world_size: int) -> RankMemory:
    """Bytes of a rank, with the parts at its fullest moment.

    settings:   the run's settings
    run:        its forward pass
    config:     DeepSpeed's configuration, as `resolve_json` gives it
    world_size: R

    The moments are: tokens are made (no activation is there yet), the backward pass starts (all activations are
    there), and gradients are reduced (all gradients are there; at stage 3, weights are updated). Between the last two,
    activations of a block go and gradients of a block come, so that no moment between them has more than both. Where
    activations are computed again there is a fourth, the backward pass comes to the first block, for that block is made
    again beside all gradients.

    Tokens that are made while a step runs need their working tensors at any moment, for memory that was allocated in
    one stream is not given to another.
    """
    stage = int(config["zero_optimization"]["stage"])
    state = state_memory(settings, run.vocab_size, config, world_size=world_size)
    held = {**state.held, "tokenizer": FP32 * encoder_parameters(run.tokenizer), "batch": batch_memory(settings, run)}
    grads = held.get("gradients", 0.0)
    encoding = encoding_memory(run.tokenizer, run.token_side, run.micro_batch, bf16=run.bf16)
    if run.prefetch == "tokens":
        held["tokens of the next batch"], encoding = encoding, 0.0
    moments: dict[str, dict[str, float]] = {
        "tokens are made": {**held, "gradients": grads + state.summed, "working tensors": encoding},
        "the backward pass starts": {
            **held,
            "gradients": grads + state.summed + state.early,
            "gathered weights": state.gathered,
            "bf16 copies of weights": bf16_weights(settings, run, stage),
            "activations": saved_activations(settings, run),
            "working tensors": working_tensors(settings, run, stage),
        },
        "gradients are reduced": {**held, **state.reduced},
    }
    if settings.train.recompute != "none":
        moments["the backward pass comes to the first block"] = {
            **held,
            "gradients": state.reduced.get("gradients", grads),
            "gathered weights": state.gathered,
            "activations": of_the_first_block(settings, run, stage),
        }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return RankMemory(moment, {name: count for name, count in moments[moment].items() if count}, state.host)


def block_rows(settings: Settings, run: Pass, *, last: bool) -> dict[str, float]:
    """Bytes that one block needs from the forward to the backward pass for one picture, weights excepted.

    T tokens of it are left after attention: N, and of the last block M, for the loss reads no more.

    residual stream     (N + T) D 4    before each norm
    branches            2 T D 4        before LayerScale, whose gradient needs them; none without LayerScale
    factors             2 D 4          LayerScale times DropPath, where there are both; none by Triton
    normed, attended    (N + 2 T) D a  what the linears read: qkv, projection, fc1; and in the last block N D a where
                                       attention is fused, for it keeps all that it made
    query, key, value   3 N D a
    scores              H N^2 a        softmax, which attention makes with autocast off, on a GPU as on a CPU;
                                       fused attention keeps 4 H N, the logarithm of its sum
    MLP                 2 T C a        before and after GELU
    norms               (N + T) 2 4    mean and deviation
    """
    model = settings.model
    wide = 2 if run.bf16 else FP32
    tokens, width = settings.num_patches + 1, model.width
    left = settings.mask.num_patches if last else tokens
    factors = model.layer_scale and model.drop_path and run.operators != "triton"
    attended = 0 if run.keeps_scores or not last else tokens
    return {
        "residual stream": float(FP32 * (tokens + left) * width),
        "branches": 2.0 * FP32 * left * width if model.layer_scale else 0.0,
        "factors": 2.0 * FP32 * width if factors else 0.0,
        "normed, attended": float(wide * (tokens + 2 * left + attended) * width),
        "query, key, value": 3.0 * wide * tokens * width,
        "scores": float(model.num_heads * tokens * (tokens * wide if run.keeps_scores else FP32)),
        "MLP": 2.0 * wide * left * hidden_width(model),
        "norms": 2.0 * FP32 * (tokens + left),
    }


def rounded_bias(settings: Settings, run: Pass) -> float:
    """Bytes of a dense bias as the products take it: H N (N to the next 16) a; 0 without one."""
    model, tokens = settings.model, settings.num_patches + 1
    if model.rel_pos_bias == "none":
        return 0.0
    return float(model.num_heads * tokens * (-(-tokens // 16) * 16) * (2 if run.bf16 else FP32))


def kept_of_a_block(settings: Settings, run: Pass, *, last: bool) -> float:
    """Bytes that are kept of one block for one picture, by `train.recompute`.

    none    all of `block_rows`
    mlp     the same without MLP
    block   N D (4 + a): its inputs, the residual stream and what was normed
    """
    rows = block_rows(settings, run, last=last)
    if settings.train.recompute == "block":
        return float((settings.num_patches + 1) * settings.model.width * (FP32 + (2 if run.bf16 else FP32)))
    return sum(rows.values()) - (rows["MLP"] if settings.train.recompute == "mlp" else 0.0)


def loss_plan(settings: Settings, run: Pass) -> TokenLossPlan:
    """What the loss by Triton takes in a forward pass."""
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    rows = run.micro_batch * settings.mask.num_patches
    return token_loss_plan(rows, settings.model.width, run.vocab_size, dtype, weight_dtype=torch.float32)


def kept_of_the_head(settings: Settings, run: Pass) -> float:
    """Bytes that are kept of the head: for a picture M D (4 + a) of rows and 4 M V of log-probabilities.

    By Triton the gradients are kept in place of the log-probabilities: for a picture M D a, and once 4 V (D + 1).
    The rows before the final norm, M D 4, are the last block's own where that is made again.
    """
    wide = 2 if run.bf16 else FP32
    stream = 0 if settings.train.recompute == "block" else FP32
    rows = run.micro_batch * settings.mask.num_patches
    if run.operators == "triton":
        plan = loss_plan(settings, run)
        loss = plan.grad_hidden_bytes + plan.grad_weight_bytes
    else:
        loss = FP32 * rows * run.vocab_size
    return float(rows * settings.model.width * (stream + wide) + loss)


def saved_activations(settings: Settings, run: Pass) -> float:
    """Bytes that are kept from the forward to the backward pass, weights excepted: of the blocks and of the head."""
    return saved_by_blocks(settings, run, settings.model.depth) + kept_of_the_head(settings, run)


def saved_by_blocks(settings: Settings, run: Pass, count: int) -> float:
    """Bytes that are kept of the patches and of the first `count` blocks.

    For each picture `kept_of_a_block` for each block, and the patches, 3 S^2 a. Where a block's inputs alone are kept,
    what the first block gets was normed before it: N D 4, not N D a, and 2 N 4 of the norm.

    Once a pass there is the bias, H N (N to the next 16): fused attention keeps it rounded for each block, a bytes
    each, and as an input of blocks the shared one is kept in fp32, and where a is 2 rounded too.
    """
    model, image_size = settings.model, settings.data.image_size
    wide = 2 if run.bf16 else FP32
    tokens, width = settings.num_patches + 1, model.width
    blocks = sum(kept_of_a_block(settings, run, last=layer == model.depth - 1) for layer in range(count))
    bias = 0.0
    if settings.train.recompute == "block":
        blocks += tokens * (width * (FP32 - wide) + 2 * FP32)
        if model.rel_pos_bias == "shared":
            bias = rounded_bias(settings, run) * (3 if run.bf16 else 1)
    elif not run.keeps_scores:
        bias = count * rounded_bias(settings, run)
    return run.micro_batch * (blocks + 3 * image_size**2 * wide) + bias


def computed_again(settings: Settings, run: Pass, stage: int, *, last: bool) -> float:
    """Bytes of one block that the backward pass has made again when it comes to the block's MLP.

    Of `block_rows` what was not kept, but of the norms the second alone: the first is made before a block is. Under
    autocast the copies of the weights, 2 for each number, come again too, but not at stage 3: see `bf16_weights`.
    """
    model, recompute = settings.model, settings.train.recompute
    if recompute == "none":
        return 0.0
    made = sum(block_rows(settings, run, last=last).values()) - kept_of_a_block(settings, run, last=last)
    weights = 2.0 * model.width * hidden_width(model)
    bias = 0.0
    if recompute == "block":
        made -= 2 * FP32 * (settings.num_patches + 1)
        weights += 4 * model.width**2
        bias = 0.0 if run.keeps_scores else rounded_bias(settings, run)
    return run.micro_batch * made + bias + (2 * weights if run.bf16 and stage < 3 else 0.0)


def bias_sums(settings: Settings) -> float:
    """Bytes of the sum of the gradients of a shared bias, which is there once the last block is through: 4 H N^2."""
    shared = settings.model.rel_pos_bias == "shared"
    return float(FP32 * settings.model.num_heads * (settings.num_patches + 1) ** 2) if shared else 0.0


def working_tensors(settings: Settings, run: Pass, stage: int) -> float:
    """Bytes that the start of the backward pass needs beside what was saved: the most at any of these moments.

    The first is `end_of_the_forward_pass`.

    The loss makes the gradient of the log-probabilities and from it that of the logits: 8 M V for a picture. Then the
    head makes the gradient of its weight, 4 D V (under autocast first in bf16, in place of the weight's copy). By
    Triton it brings the gradients that it kept to the scale of the loss: as much again.

    After it, with the head's own tensors gone, comes the last block. It is left with few tokens, so the block before it
    may need more, though what was kept of the last is gone then: that has all tokens, and beside it the sum of the
    gradients of a shared bias.
    """
    model = settings.model
    wide = 2 if run.bf16 else FP32
    logits = run.micro_batch * settings.mask.num_patches * run.vocab_size
    gone = kept_of_the_head(settings, run)
    if run.operators == "triton":
        plan = loss_plan(settings, run)
        of_the_loss = [float(plan.grad_hidden_bytes + plan.grad_weight_bytes)]
    else:
        of_the_loss = [2.0 * FP32 * logits, (wide - FP32) * logits + FP32 * model.width * run.vocab_size]
    moments = [
        end_of_the_forward_pass(settings, run, stage),
        *of_the_loss,
        in_a_block(settings, run, stage, last=True) - gone,
    ]
    if model.depth > 1:
        gone += run.micro_batch * kept_of_a_block(settings, run, last=True)
        moments.append(in_a_block(settings, run, stage, last=False) + bias_sums(settings) - gone)
    return float(max(moments))


def in_a_block(settings: Settings, run: Pass, stage: int, *, last: bool) -> float:
    """Bytes that the backward pass of a block needs beside what was kept: the most at any of three moments.

    T tokens are left after attention, as in `block_rows`. A block that is made again ends, beside all that it makes,
    with the residual stream after it, the norm of that and the gradients of both, in fp32 (16 T D), and under autocast
    with the MLP's output (2 T D).

    Its MLP has the gradients of the residual stream (4 T D; without LayerScale nothing has gone in its place), of its
    output (a T D) and of its hidden layer (a T C) at a time, and that of a weight (a D C). Under autocast this gradient
    becomes fp32 (4 D C) when its other tensors and the weight's copy have gone; at stage 3 there is no copy to go.

    Then, with the branches and the MLP's tensors gone, attention has the gradients of its output (a N D) and of the
    softmax and the scores (2 H N^2 a); fused, that of the bias alone, but for each picture. In the last block the
    gradient of the residual stream is that of all tokens again: 4 (N - T) D more.
    """
    model = settings.model
    wide = 2 if run.bf16 else FP32
    tokens, width, hidden = settings.num_patches + 1, model.width, hidden_width(model)
    left = settings.mask.num_patches if last else tokens
    rows, again = block_rows(settings, run, last=last), computed_again(settings, run, stage, last=last)

    stream = 0 if model.layer_scale else FP32 * left * width
    products = run.micro_batch * wide * left * (width + hidden) + wide * width * hidden
    if run.bf16:
        cast = FP32 * width * hidden
        products = max(products, cast) if stage < 3 else products + cast
    mlp = run.micro_batch * stream + products + again

    made = 0.0
    if settings.train.recompute == "block":
        made = run.micro_batch * left * width * (4.0 * FP32 + (wide if run.bf16 else 0)) + again

    scores = 2 * rows["scores"] if run.keeps_scores else rounded_bias(settings, run)
    stream = FP32 * (tokens - left) * width
    attention = run.micro_batch * (scores + wide * tokens * width + stream - rows["MLP"] - rows["branches"])
    attention += again - (4 * width * hidden if run.bf16 and stage < 3 else 0)
    return max(made, mlp, attention)


def end_of_the_forward_pass(settings: Settings, run: Pass, stage: int) -> float:
    """Bytes that the end of the forward pass needs beside what was saved: the most at any of three moments.

    Autocast keeps copies of weights until then that autograd does not keep. Beside them the loss makes the logits,
    4 M V for a picture; by Triton those of a chunk, and under autocast a copy of the head's weight.

    Before it nothing of the head is there, but still the pixels in fp32, 12 S^2. The last block ends with its MLP's
    output, M D a, and under autocast the normed rows in fp32, 4 M D; or has had, within its MLP, what is not kept.

    Before that the last block's attention is the last that has all tokens, and nothing that comes after it is there:
    in plain torch it has query, key, value and output (4 N D a) and the scores beside what it keeps; in a block that is
    made again it keeps nothing, so that the softmax comes to that, and fused it has as much.
    """
    model, recompute = settings.model, settings.train.recompute
    wide = 2 if run.bf16 else FP32
    tokens, width, masked = settings.num_patches + 1, model.width, settings.mask.num_patches
    rows = block_rows(settings, run, last=True)
    if run.operators == "triton":
        plan = loss_plan(settings, run)
        logits = float(plan.logits_bytes + plan.cast_weight_bytes)
    else:
        logits = float(FP32 * run.micro_batch * masked * run.vocab_size)
    pixels = run.micro_batch * 3 * FP32 * settings.data.image_size**2

    mlp = 2 * width * hidden_width(model)
    copies = copies_of_last = 0
    if run.bf16 and stage < 3:
        copies = 2 * model.depth * {"none": 0, "mlp": mlp, "block": mlp + 4 * width**2}[recompute]
        copies_of_last = 2 * (mlp + width**2)
    before_head = copies + pixels - copy_of_the_head(settings, run)

    end = rows["MLP"] if recompute != "none" else float(masked * width * (wide + (FP32 if run.bf16 else 0)))

    in_attention, after = 0.0, 0.0
    if run.keeps_scores or recompute == "block":
        in_attention = 4 * wide * tokens * width + rows["scores"]
    if recompute == "block":
        in_attention += rows["scores"] if run.keeps_scores else 0
    else:
        after = masked * width * (FP32 + 2 * wide) + rows["branches"] + (rows["MLP"] if recompute == "none" else 0)
    attention = run.micro_batch * (in_attention - after) - kept_of_the_head(settings, run) - copies_of_last

    gone = kept_of_the_head(settings, run) if run.operators == "triton" else logits
    return max(copies + logits, before_head + run.micro_batch * end - gone, before_head + attention)


def of_the_first_block(settings: Settings, run: Pass, stage: int) -> float:
    """Bytes of activations and working tensors when nothing but the first block is left for the backward pass."""
    last = settings.model.depth == 1
    alone = settings.model_copy(update={"model": settings.model.model_copy(update={"depth": 1})})
    return (
        saved_by_blocks(settings, run, 1)
        + in_a_block(settings, run, stage, last=last)
        + bf16_weights(alone, replace(run, vocab_size=0), stage)
        + bias_sums(settings)
    )


def bf16_weights(settings: Settings, run: Pass, stage: int) -> float:
    """Bytes of the copies of linear weights that autocast makes and autograd keeps: 2 for each number; none in fp32.

    The projection of the patches is not among them, for the pixels have no gradient. At stage 3 DeepSpeed's own linear
    keeps the weight and casts it again, so that only the head's copy stays. What `train.recompute` computes again casts
    its weights again too.
    """
    if not run.bf16:
        return 0.0
    model = settings.model
    kept = {
        "none": 4 * model.width**2 + 2 * model.width * hidden_width(model),
        "mlp": 4 * model.width**2,
        "block": 0,
    }[settings.train.recompute]
    return 2.0 * model.depth * (kept if stage < 3 else 0) + copy_of_the_head(settings, run)


def copy_of_the_head(settings: Settings, run: Pass) -> float:
    """Bytes of the copy of the head's weight that autograd keeps under autocast; the loss by Triton makes its own."""
    return 2.0 * settings.model.width * run.vocab_size if run.bf16 and run.operators != "triton" else 0.0


def batch_memory(settings: Settings, run: Pass) -> float:
    """Bytes of the pictures as they come, two views of uint8, with their masks and tokens; of the next batch too, where
    it comes while a step runs. A host that is far ahead of its GPU may hold a third for a moment: not counted."""
    views = 3 * settings.data.image_size**2 + 3 * run.token_side**2
    batches = 1 if run.prefetch == "none" else 2
    return float(batches * run.micro_batch * (views + 8 * (settings.mask.num_patches + settings.num_patches + 1)))
