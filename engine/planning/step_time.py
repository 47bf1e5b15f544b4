"""How long a step takes: arithmetic at an assumed share of the published rate, traffic at the published bandwidth.

n parameters, R ranks, A passes of an optimizer step.
"""

from dataclasses import dataclass

from ..config import ModelSettings, Recompute
from ..hardware import Gpu
from ..models.flops import parameter_count, pretraining_flops, recomputed_flops
from ..tokenizer.flops import TokenizerSize, encoding_flops, num_convolutions
from ..training.zero_memory import FP32
from .settings import PlanSettings

BACKWARD_SHARE = 2 / 3
"""Of the arithmetic of a pass that repeats nothing: two products for each of the forward's."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step, by when."""

    forward: float
    """While the forward passes run."""
    backward: float
    """While the backward passes run."""
    alone: float
    """While nothing else runs."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.alone


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by part; what is hidden behind arithmetic is not in `waits`."""

    model: float
    model_arithmetic: float
    """What `model` would be if the host gave the operations in no time."""
    recomputed: float
    """Of `model_arithmetic`, what the backward passes repeat under `train.recompute`."""
    tokenizer: float
    optimizer: float
    """With offload, what passes between a GPU and its host in place of the update."""
    traffic: float
    """All of it, hidden or not."""
    waits: float
    """For traffic that nothing hides."""

    @property
    def total(self) -> float:
        return self.model + self.tokenizer + self.optimizer + self.waits


def traffic(parameters: int, *, stage: int, world_size: int, accumulation: int) -> Traffic:
    """What a rank sends in an optimizer step.

    Gradients and weights travel in fp32. In a ring, an all-reduce of x bytes sends 2 x (R-1)/R, an all-gather and a
    reduce-scatter half of that (Patarasuk and Yuan 2009).

        stage   gradients                                         weights
        0       all-reduce, once a step, after the last backward  -
        1       all-reduce, once a step, during the last backward all-gather after the update
        2       all-reduce, in each of A backwards                all-gather after the update
        3       reduce-scatter, in each of A backwards            all-gather in each of A forwards

    DeepSpeed 0.19.8 reduces whole buckets at stages 1 and 2 and drops what is not a rank's own. At stage 3 the weights
    stay gathered until the end of the backward, as they do at DeepSpeed's default stage3_max_live_parameters.
    """
    once = FP32 * parameters * (world_size - 1) / world_size
    if stage == 0:
        return Traffic(0.0, 0.0, 2 * once)
    if stage == 3:
        return Traffic(accumulation * once, accumulation * once, 0.0)
    return Traffic(0.0, 2 * once * (accumulation if stage == 2 else 1), once)


def host_traffic(parameters: int, *, stage: int, world_size: int, accumulation: int) -> float:
    """Bytes between a GPU and its host in an optimizer step with offload, both directions together.

    A rank sends its part, n/R fp32 numbers, so often in DeepSpeed 0.19.8:

        stage   gradients, A = 1   gradients, A > 1                             weights
        1       1                  1, after the last pass                       1, after the update
        2       1                  2A: sent in each pass, fetched in all but    1, after the update
                                   the first, then sent
        3       3                  2A+1: sent and fetched in each pass, then    A, before each forward
                                   sent

    The last sending of gradients is to the buffer that AdamW reads. Sources: copy_grads_in_partition and
    async_accumulate_grad_in_cpu_via_gpu of stages 1 and 2; partition_grads of stage 3, which fetches what it has just
    sent, in the first pass too. At stage 3 the weights are taken to be offloaded (offload_param) and to stay gathered
    until the end of the backward, as in `traffic`, so that the backward does not fetch them again.
    """
    if stage == 3:
        times = 2 * accumulation + 1 + accumulation
    else:
        gradients = 1 if accumulation == 1 or stage == 1 else 2 * accumulation
        times = gradients + 1
    return FP32 * parameters / world_size * times


def link(gpu: Gpu, world_size: int) -> float:
    """Bytes a second that a rank sends.

    A ring crosses between two machines once for all GPUs of each, and the rings share all adapters of a machine, so
    that between machines the links within them bind as long as the adapters are together no slower.
    """
    if world_size <= gpu.gpus_per_node:
        return 1e9 * gpu.node_link_gb_s
    return 1e9 * min(gpu.node_link_gb_s, gpu.network_gb_s * gpu.gpus_per_node)


def pass_operations(model: ModelSettings, *, bf16: bool, recompute: Recompute = "none") -> int:
    """Operations that the host gives the device one by one in a forward and backward pass.

    Counted in a real pass of the reference in torch 2.13, views excepted; tests/test_planning.py counts them again.
    LayerScale with DropPath adds some, and so do the casts of autocast and what is computed again.
    """
    scaled = 1 if model.layer_scale else 0
    again = {"none": 0, "mlp": 2 + 4 * bf16, "block": 19 + 2 * scaled + 12 * bf16}[recompute]
    in_last = 20 if recompute == "block" else 0  # its tokens are chosen, and their norm made, again
    return model.depth * (47 + 16 * scaled + 26 * bf16 + again) + 97 + 56 * scaled + 16 * bf16 + in_last


def encoding_operations(tokenizer: TokenizerSize, *, bf16: bool) -> int:
    """The same for a batch's tokens. Autocast casts the weight and the bias of each convolution in every pass."""
    casts = 2 + 2 * num_convolutions(tokenizer) if bf16 else 0
    return 11 + tokenizer.groups * (12 + 10 * (tokenizer.blocks_per_group - 1)) + casts


def step_time(
    settings: PlanSettings,
    gpu: Gpu,
    tokenizer: TokenizerSize,
    *,
    bf16: bool,
    stage: int,
    offload: bool,
    world_size: int,
    micro_batch: int,
    accumulation: int,
) -> StepTime:
    """Seconds of an optimizer step.

    A pass takes as long as its arithmetic, or as the host takes to start its operations, whichever is longer.
    Arithmetic is FLOPs / (rate x mfu): of model and tokenizer in bf16; or, without it, of the model in fp32, of the
    tokenizer's convolutions in tf32 and of its product with the codes in fp32. What `train.recompute` repeats counts.
    AdamW reads weight, gradient and two moments and writes all but the gradient, 28 bytes a parameter that a rank
    updates, at the memory's bandwidth. With offload its time is that of `host_traffic`, none of which is taken to be
    hidden; the host's own time for the update is not counted.

    Traffic of a backward pass is hidden behind its arithmetic, that of a forward pass behind its own; stage 1 has the
    last backward alone to hide behind.
    """
    parameters = parameter_count(settings.model, settings.data.image_size, tokenizer.vocab_size)
    flops = pretraining_flops(settings.model, settings.data.image_size, settings.mask.num_patches, tokenizer.vocab_size)
    recompute = settings.train.recompute
    again = recomputed_flops(
        settings.model, settings.data.image_size, settings.mask.num_patches, recompute, zero_stage=stage
    )
    rate = 1e12 * settings.mfu * (gpu.bf16_tflops if bf16 else gpu.fp32_tflops)
    arithmetic = micro_batch * (flops + again) / rate
    operations = pass_operations(settings.model, bf16=bf16, recompute=recompute)
    model_pass = max(arithmetic, 1e-6 * settings.dispatch_us * operations)
    inner, codes = encoding_flops(tokenizer, settings.grid * tokenizer.stride)
    inner_rate, codes_rate = (gpu.bf16_tflops,) * 2 if bf16 else (gpu.tf32_tflops, gpu.fp32_tflops)
    tokenizer_pass = micro_batch * (inner / inner_rate + codes / codes_rate) / (1e12 * settings.mfu)
    tokenizer_pass = max(tokenizer_pass, 1e-6 * settings.dispatch_us * encoding_operations(tokenizer, bf16=bf16))

    updated = parameters / (1 if stage == 0 else world_size)
    optimizer = 28 * updated / (1e9 * gpu.bandwidth_gb_s)
    if offload:
        moved = host_traffic(parameters, stage=stage, world_size=world_size, accumulation=accumulation)
        optimizer = moved / (1e9 * gpu.host_link_gb_s)

    sent = traffic(parameters, stage=stage, world_size=world_size, accumulation=accumulation)
    bandwidth = link(gpu, world_size)
    forward_share = (1 - BACKWARD_SHARE) * flops / (flops + again)
    backward = model_pass * (1 - forward_share) * (1 if stage == 1 else accumulation)
    forward = model_pass * forward_share * accumulation
    waits = (
        max(0.0, sent.backward / bandwidth - backward)
        + max(0.0, sent.forward / bandwidth - forward)
        + sent.alone / bandwidth
    )
    return StepTime(
        model=accumulation * model_pass,
        model_arithmetic=accumulation * arithmetic,
        recomputed=accumulation * micro_batch * again / rate,
        tokenizer=accumulation * tokenizer_pass,
        optimizer=optimizer,
        traffic=sent.total / bandwidth,
        waits=waits,
    )
