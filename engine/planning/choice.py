"""Which ZeRO stage, recomputation and batch of a pass fit a GPU, and which of them is fastest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fused_beit.kernels import ImplUnavailable

from ..config import Recompute
from ..errors import UserError
from ..hardware import GPUS, Gpu
from ..tokenizer.flops import TokenizerSize
from ..training.deepspeed_json import batch_plan, resolve_json, resolve_stage
from ..training.header import human_bytes
from ..training.memory import Pass, RankMemory, operators_of, prefetched, rank_memory
from ..training.zero_memory import offloads
from .settings import PlanSettings
from .step_time import StepTime, step_time

MARGIN = 0.1
"""How much slower than the fastest a simpler way may be."""


@dataclass(frozen=True)
class Way:
    """One way to run a step on so many GPUs: what it takes of memory and time."""

    gpu: Gpu
    gpus: int
    stage: int
    offload: bool
    recompute: Recompute
    micro_batch: int
    accumulation: int
    memory: RankMemory
    time: StepTime

    @property
    def global_batch(self) -> int:
        return self.gpus * self.micro_batch * self.accumulation

    @property
    def pictures_per_s(self) -> float:
        return self.global_batch / self.time.total

    def fits(self, reserve: float) -> bool:
        """Whether its tensors leave the share `reserve` of the GPU's memory free."""
        return self.memory.total <= room(self.gpu, reserve)


def room(gpu: Gpu, reserve: float) -> float:
    """Bytes of a GPU that tensors may take."""
    return 1e9 * gpu.memory_gb * (1 - reserve)


def uses_bf16(settings: PlanSettings) -> bool:
    """On a GPU, where `auto` is bf16."""
    return settings.train.precision != "fp32"


def way(
    settings: PlanSettings,
    gpu: Gpu,
    tokenizer: TokenizerSize,
    *,
    gpus: int,
    stage: int,
    offload: bool,
    recompute: Recompute,
    micro_batch: int,
) -> Way:
    """What a step takes, run one way.

    Raises:
        UserError: where the batch cannot be divided so, or `train.impl` does not take the model's shape.
    """
    asked = settings.model_copy(
        update={
            "train": settings.train.model_copy(update={"micro_batch": micro_batch, "recompute": recompute}),
            "zero": settings.zero.model_copy(update={"stage": stage, "offload": offload}),
        }
    )
    micro_batch, accumulation = batch_plan(asked, gpus)
    bf16 = uses_bf16(settings)
    config = resolve_json(
        asked, stage=stage, micro_batch=micro_batch, accumulation=accumulation, world_size=gpus, bf16=bf16
    )
    on_host = offloads(config)
    run = Pass(
        micro_batch=micro_batch,
        bf16=bf16,
        vocab_size=tokenizer.vocab_size,
        operators=operators_of(settings.train.impl, "cuda"),
        tokenizer=tokenizer,
        token_side=settings.grid * tokenizer.stride,
        prefetch=prefetched(settings.train.prefetch, "cuda"),
    )
    try:
        time = step_time(
            asked, gpu, tokenizer, bf16=bf16, stage=stage, offload=on_host, world_size=gpus,
            micro_batch=micro_batch, accumulation=accumulation,
        )  # fmt: skip
    except ImplUnavailable as error:
        raise UserError(f"train.impl = {settings.train.impl}: {error}.") from None
    memory = rank_memory(asked, run, config, world_size=gpus)
    return Way(gpu, gpus, stage, on_host, recompute, micro_batch, accumulation, memory, time)


def shardings(settings: PlanSettings, gpus: int) -> list[tuple[int, bool]]:
    """Stages to try, with and without offload, from the simplest: those asked for, or those that can be of use."""
    if settings.zero.config is not None or settings.zero.stage is not None or settings.zero.offload:
        return [(resolve_stage(settings, gpus), settings.zero.offload)]
    if gpus == 1:  # there is nothing to divide
        return [(0, False), (1, True), (3, True)]
    return [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]


def recomputations(settings: PlanSettings) -> list[Recompute]:
    """What to try, from the least that is computed again: what is asked for, or all: the default counts as open."""
    return ["none", "mlp", "block"] if settings.train.recompute == "none" else [settings.train.recompute]


def ways(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, gpus: int) -> Iterator[Way]:
    """All that the settings leave open, fitting or not, from the simplest sharding on.

    With each, from the least that is computed again on; with that, from the largest batch of a pass on.

    Raises:
        UserError: where the batch cannot be divided among the GPUs.
    """
    batch_plan(settings, gpus)
    micro_batch = settings.train.micro_batch
    sizes = [micro_batch] if micro_batch else divisors(settings.train.global_batch // gpus)
    for stage, offload in shardings(settings, gpus):
        for recompute in recomputations(settings):
            for size in sizes:
                yield way(
                    settings, gpu, tokenizer,
                    gpus=gpus, stage=stage, offload=offload, recompute=recompute, micro_batch=size,
                )  # fmt: skip


def divisors(number: int) -> list[int]:
    """From the largest to 1."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def choose(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, gpus: int) -> Way:
    """The simplest way that fits, with the largest batch of a pass, unless another is more than a tenth faster.

    Less sharding is simpler, and then less that is computed again. A tenth, for what this estimate of time leaves out,
    such as the many small messages of stage 3, is not less. A pass is taken to grow with its pictures, so that a
    smaller batch saves memory and no time.

    Raises:
        UserError: when none fits, with what would.
    """
    found = list(ways(settings, gpu, tokenizer, gpus))
    fitting = [one for one in found if one.fits(settings.hardware.reserve)]
    if not fitting:
        raise UserError(too_small(settings, found, tokenizer))
    best = min(one.time.total for one in fitting)
    return next(one for one in fitting if one.time.total <= (1 + MARGIN) * best)


def too_small(settings: PlanSettings, found: list[Way], tokenizer: TokenizerSize) -> str:
    """What to do where nothing fits: the least that is needed, and what has it."""
    least = min(found, key=lambda one: one.memory.total)
    gpu, gpus, reserve = least.gpu, least.gpus, settings.hardware.reserve
    count = f"{gpus} {gpu.key}" if gpus > 1 else f"one {gpu.key}"
    said = (
        f"{settings.preset} does not fit {count}: the least, {describe(least)}, takes "
        f"{human_bytes(least.memory.total)} of the {human_bytes(room(gpu, reserve))} that tensors may take of "
        f"{gpu.memory_gb:g} GB"
    )
    remedies = []
    given = settings.train.micro_batch or settings.train.recompute != "none"
    if given or settings.zero.stage is not None or settings.zero.config or settings.zero.offload:
        freed = settings.model_copy(
            update={
                "train": settings.train.model_copy(update={"micro_batch": None, "recompute": "none"}),
                "zero": settings.zero.model_copy(update={"stage": None, "config": None, "offload": False}),
            }
        )
        fitting = [one for one in ways(freed, gpu, tokenizer, gpus) if one.fits(reserve)]
        if fitting:
            remedies.append(f"{describe(fitting[0])} fits it")
    larger = [
        other.key
        for other in GPUS.values()
        if other.memory_gb > gpu.memory_gb and least.memory.total <= room(other, reserve)
    ]
    if larger:
        remedies.append(f"{either(larger)} would have room for it")
    if not remedies:
        remedies.append("make the model smaller: model.depth, model.width or data.image_size")
    return f"{said}; {', and '.join(remedies)}."


def either(names: Sequence[str]) -> str:
    """`h200`, `h200 or b200`, `h200, h100 or b200`."""
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def describe(one: Way) -> str:
    """`ZeRO stage 1 with passes of 32 images` and the like."""
    images = "1 image" if one.micro_batch == 1 else f"{one.micro_batch} images"
    also = [name for name, used in (("offload", one.offload), (recomputing(one), one.recompute != "none")) if used]
    return f"ZeRO stage {one.stage}{''.join(f' and {name}' for name in also)} with passes of {images}"


def recomputing(one: Way) -> str:
    """The option of `pretrain.py` for it."""
    return f"--train.recompute {one.recompute}"
