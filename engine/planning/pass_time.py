"""How long a GPU and its host take for a forward and backward pass, and for the tokens of a batch.

Predicted from the operators that `count` finds: products by the GPU's rate, all else by its memory's bandwidth, and the
host's time by their number. The shares of the published figures that are reached are those of an H100, attention's
measured and the others assumed, and are taken to be the same for other GPUs. With `--mfu` all is FLOPs over one rate.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..hardware import Gpu
from ..models.flops import pretraining_flops, recomputed_flops
from ..tokenizer.flops import TokenizerSize, encoding_flops
from .count import RECOMPUTED, Operators, PassShape, counted_impl, pass_operators, token_operators
from .settings import PlanSettings

PRODUCTS = 0.70
"""Share of the published rate that matrix products reach.

Large products reach about 798 of an H100's 989 TFLOP/s, as others measured. Those of BEiT-base, 128 images, come to
0.87 of that by a model of tiles and of waves on its 132 multiprocessors: 18.4 ms where 16.0 would do.
"""
CONVOLUTIONS = 0.56
"""The same of cuDNN's convolutions: 0.7 of what large products reach."""
BANDWIDTH = 0.9
"""Share of the memory's bandwidth that passes over memory reach: 3.0 of an H100's 3.35 TB/s."""
TORCH_ATTENTION = (0.11, 0.1)
"""Share of the rate that torch's memory-efficient attention reaches with a learned bias, forward and backward.

Measured on an H100 in bf16, 128 images of BEiT-base, 197 tokens, as are the next two: 0.29 ms forward. Backward 0.90 ms
on q, k and v that lie apart; less 0.12 ms for the sum of the bias's gradient, which is counted by itself, 0.78.
"""
TORCH_ATTENTION_RATE = 1.5 * 312
"""The rate in TFLOP/s that the share is taken of at most: the kernel is made of an A100's instructions, so that an H100
is taken for one and a half of it, and a faster GPU too."""
OUR_ATTENTION = (0.148, 0.081)
"""The same of our attention, of the full rate: 0.104 ms forward; backward 0.145 ms for the gradient of q, 0.244 for
those of k and v, 0.087 for the sum over the images."""
LAUNCH_S = 2e-6
"""Seconds of a kernel in which the GPU is not full: its start and its end."""
OPTIMIZER_BYTES = 36
"""Bytes a parameter: the norm reads the gradient; AdamW reads weight, gradient and two moments and writes all four, the
gradient scaled."""
OWN_STARTS = 10
"""How many of torch's operators take the host as long as one of this project's, called through Python.

A step of BEiT-base on tiny tensors, kernels left out, took one core of an AMD EPYC 21 ms by torch's operators, 1,249 of
them, and 24 ms by ours, 623 with 84 of its own. Triton's launches come on top; they were not measured. The only step
that an H100 made by Triton took 75 to 81 ms, twice what is predicted here, most likely because of its host.
"""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass."""

    forward: float
    """Of the device."""
    backward: float
    """Of the device, with what it computes again."""
    recomputed: float
    """Of `backward`, what `train.recompute` repeats."""
    host: float
    """Of the host, to start all operators."""

    @property
    def device(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """As long as the slower of the two takes."""
        return max(self.device, self.host)


def model_pass(
    settings: PlanSettings, gpu: Gpu, vocab_size: int, *, bf16: bool, zero_stage: int, micro_batch: int
) -> PassTime:
    """Forward and backward pass of the model on so many images, by the implementation that `train.impl` asks for.

    Raises ImplUnavailable where that does not take the model's shape.
    """
    model, image_size, num_masked = settings.model, settings.data.image_size, settings.mask.num_patches
    recompute = settings.train.recompute
    shape = PassShape(model, image_size, num_masked, vocab_size, settings.train.impl, bf16, settings.train.compile)
    operators = pass_operators(shape, micro_batch, recompute)
    host = host_seconds(operators, settings.dispatch_us)
    rate = 1e12 * (gpu.bf16_tflops if bf16 else gpu.fp32_tflops)

    def again(stage: int) -> float:
        return micro_batch * recomputed_flops(model, image_size, num_masked, recompute, zero_stage=stage)

    if settings.mfu is not None:
        flops = micro_batch * pretraining_flops(model, image_size, num_masked, vocab_size)
        repeated = again(zero_stage) / (rate * settings.mfu)
        third = flops / (rate * settings.mfu) / 3  # the backward pass is two products for each of the forward's
        return PassTime(third, 2 * third + repeated, repeated, host=0.0)  # a measured share has the host's time in it
    forward, backward = device_seconds(operators, gpu)
    own_linear = (again(zero_stage) - again(0)) / (rate * PRODUCTS)  # DeepSpeed's at stage 3, which is not in the count
    repeated = sum(seconds(found, gpu) for found in operators if found.part == RECOMPUTED) + own_linear
    return PassTime(forward, backward + own_linear, repeated, host)


def tokens_pass(
    settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, *, bf16: bool, micro_batch: int
) -> PassTime:
    """The tokens of so many images."""
    side = settings.grid * tokenizer.stride
    operators = token_operators(tokenizer, side, micro_batch, impl=settings.train.impl, bf16=bf16)
    host = host_seconds(operators, settings.dispatch_us)
    if settings.mfu is None:
        return PassTime(*device_seconds(operators, gpu), 0.0, host)
    inner, codes = encoding_flops(tokenizer, side)
    inner_rate, codes_rate = (gpu.bf16_tflops,) * 2 if bf16 else (gpu.tf32_tflops, gpu.fp32_tflops)
    return PassTime(micro_batch * (inner / inner_rate + codes / codes_rate) / (1e12 * settings.mfu), 0.0, 0.0, host=0.0)


def seconds(found: Operators, gpu: Gpu) -> float:
    """Of the device."""
    starts = LAUNCH_S * found.starts
    moved = found.bytes / (1e9 * gpu.bandwidth_gb_s * BANDWIDTH)
    rate, share = gpu.bf16_tflops if found.half else gpu.fp32_tflops, PRODUCTS
    if found.kind == "convolution":
        rate, share = gpu.bf16_tflops if found.half else gpu.tf32_tflops, CONVOLUTIONS
    elif found.kind == "attention" and found.half:
        return max(moved, found.flops / attention_rate(gpu, own=found.own, backward=found.backward)) + starts
    return max(moved, found.flops / (1e12 * rate * share)) + starts


def attention_rate(gpu: Gpu, *, own: bool, backward: bool) -> float:
    """FLOP/s of fused attention in half precision."""
    if own:
        return 1e12 * gpu.bf16_tflops * OUR_ATTENTION[backward]
    return 1e12 * min(gpu.bf16_tflops, TORCH_ATTENTION_RATE) * TORCH_ATTENTION[backward]


def device_seconds(operators: Iterable[Operators], gpu: Gpu) -> tuple[float, float]:
    """Of the forward operators, and of the backward ones."""
    times = [0.0, 0.0]
    for found in operators:
        times[found.backward] += seconds(found, gpu)
    return times[0], times[1]


def host_seconds(operators: Iterable[Operators], dispatch_us: float) -> float:
    """To start them all."""
    return 1e-6 * dispatch_us * sum(found.starts * (OWN_STARTS if found.own else 1) for found in operators)


def optimizer_seconds(parameters: float, gpu: Gpu) -> float:
    """Of the device, to update so many parameters."""
    return OPTIMIZER_BYTES * parameters / (1e9 * gpu.bandwidth_gb_s * BANDWIDTH)


def implementation(settings: PlanSettings) -> str:
    """What `train.impl` and `train.compile` were counted as, in words."""
    impl = counted_impl(settings.train.impl).value
    said = {
        "reference": "torch's operators",
        "sdpa": "torch's operators, attention by its memory-efficient kernel",
        "triton": "all operators by Triton",
    }[impl]
    return f"{said} (--train.impl {settings.train.impl}){', blocks compiled' if settings.train.compile else ''}"
