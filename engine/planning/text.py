"""A plan in words and tables, as the terminal shows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fused_beit.kernels import Impl

from ..command_line import options_of
from ..config import Settings
from ..errors import UserError
from ..hardware import GPUS, Gpu
from ..launching import launch_command
from ..models.flops import parameter_count, pretraining_flops
from ..tokenizer.flops import DALLE, TokenizerSize, encoding_flops
from ..training.header import RECOMPUTED, human_bytes, when_compiled
from .choice import Way, recomputing, room, uses_bf16, way
from .count import counted_impl
from .pass_time import BANDWIDTH, CONVOLUTIONS, LAUNCH_S, OWN_STARTS, PRODUCTS, attention_rate, implementation
from .settings import PlanSettings
from .step_time import StepTime, link, traffic
from .sweep import BOUND, Row, alone, binds, efficiency

PARTS = (
    "weights", "gathered weights", "gradients", "optimizer state", "buckets", "tokenizer", "batch",
    "tokens of the next batch", "bf16 copies of weights", "activations", "working tensors",
)  # fmt: skip
"""Parts of a GPU's memory in the order in which they are shown."""


def block(title: str, values: dict[str, str]) -> list[str]:
    """A title and lines of names and values below it."""
    width = max(len(name) for name in values)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in values.items())]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, aligned to the right but for the last."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        ("  " + "  ".join(
            cell.ljust(width) if i == len(head) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )).rstrip()
        for row in (head, *rows)
    ]  # fmt: skip


def plan_text(
    settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, chosen: Way, *, pictures: int, pictures_are: str
) -> str:
    """The whole plan but for the sweep."""
    lines = [
        *block("plan", subject(settings, gpu, tokenizer, pictures, pictures_are)),
        *block("assumed, not measured", assumptions(settings, gpu)),
        *block("chosen", choice(settings, chosen)),
        *memory_lines(settings, chosen),
        *stage_lines(settings, tokenizer, chosen),
        *block("step", step(settings, gpu, tokenizer, chosen)),
        *block("run", run(settings, chosen, pictures)),
        "start it with",
        f"  {command(settings, gpu, tokenizer)}",
    ]
    return "\n".join(lines)


def subject(
    settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, pictures: int, pictures_are: str
) -> dict[str, str]:
    """What is planned, on what."""
    image_size = settings.data.image_size
    parameters = parameter_count(settings.model, image_size, tokenizer.vocab_size)
    flops = pretraining_flops(settings.model, image_size, settings.mask.num_patches, tokenizer.vocab_size)
    coding = sum(encoding_flops(tokenizer, settings.grid * tokenizer.stride))
    nodes = -(-settings.gpus // gpu.gpus_per_node)
    machines = "1 machine" if nodes == 1 else f"{nodes} machines of {gpu.gpus_per_node}"
    return {
        "preset": settings.preset,
        "machine": f"{settings.gpus} x {gpu.key} ({gpu.memory_gb:g} GB), {machines}",
        "pictures": f"{pictures:,}: {pictures_are}",
        "parameters": f"{parameters:,}",
        "FLOPs an image": f"{flops / 1e9:.4g} G, and {coding / 1e9:.4g} G for its tokens",
        "precision": "fp32 weights, bf16 autocast" if uses_bf16(settings) else "fp32",
    }


def assumptions(settings: PlanSettings, gpu: Gpu) -> dict[str, str]:
    """What the plan rests on that nobody measured here, and how to replace it."""
    published = vars(GPUS.get(gpu.key, gpu))
    given = [name for name, value in vars(gpu).items() if value != published[name]]
    source = "as described on the command line" if gpu.key == "custom" else "as published"
    if given:
        source += ", but for " + ", ".join(f"hardware.{name} {vars(gpu)[name]:g}" for name in given)
    return {
        **speed(settings, gpu),
        "host": f"{settings.dispatch_us:g} us to start an operator of torch (--dispatch_us), {OWN_STARTS} times that "
        f"for one by Triton",
        "links": f"{gpu.node_link_gb_s:g} GB/s in a machine, {gpu.network_gb_s:g} GB/s between machines, all of it",
        "offload": f"{gpu.host_link_gb_s:g} GB/s to the host, none of it hidden; AdamW's own time there is not counted",
        "memory": f"{settings.hardware.reserve:.0%} of it left to driver and libraries (--hardware.reserve)",
        "hardware": source,
    }


def speed(settings: PlanSettings, gpu: Gpu) -> dict[str, str]:
    """What of a GPU's published speed is taken to be reached."""
    bf16 = uses_bf16(settings)
    rate, inner = (gpu.bf16_tflops,) * 2 if bf16 else (gpu.fp32_tflops, gpu.tf32_tflops)
    if settings.mfu is not None:
        codes = "" if bf16 else f", of the tokenizer's convolutions {inner:g} TFLOP/s"
        return {"products": f"{settings.mfu:.0%} of {rate:g} TFLOP/s{codes} (--mfu), all else included"}
    impl = counted_impl(settings.train.impl)
    lines = {
        "counted": implementation(settings),
        "products": f"{PRODUCTS:.0%} of {rate:g} TFLOP/s; convolutions {CONVOLUTIONS:.0%} of {inner:g}",
    }
    if bf16 and impl != Impl.REFERENCE:
        forward, backward = (
            1e-12 * attention_rate(gpu, own=impl == Impl.TRITON, backward=backward) for backward in (False, True)
        )
        lines["attention"] = f"{forward:.3g} TFLOP/s forward, {backward:.3g} backward"
    lines["all else"] = (
        f"{BANDWIDTH:.0%} of {gpu.bandwidth_gb_s:g} GB/s; {1e6 * LAUNCH_S:g} us to start and end a kernel"
    )
    return lines


def count(number: int, thing: str) -> str:
    """`1 pass`, `2 passes`."""
    return f"{number} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"


def choice(settings: PlanSettings, chosen: Way) -> dict[str, str]:
    """Stage, batch and recomputation."""
    return {
        "ZeRO stage": f"{chosen.stage}{' with offload' if chosen.offload else ''}",
        "batch": f"{chosen.global_batch} = {count(chosen.gpus, 'GPU')} x {count(chosen.accumulation, 'pass')} of "
        f"{count(chosen.micro_batch, 'image')}",
        "recomputed": recomputed(chosen),
    }


def recomputed(chosen: Way) -> str:
    """What is computed twice, the option for it and its cost."""
    if chosen.recompute == "none":
        return RECOMPUTED["none"]
    cost = chosen.time.recomputed / (chosen.time.model_on_device - chosen.time.recomputed)
    return f"{RECOMPUTED[chosen.recompute]} ({recomputing(chosen)}): {cost:.0%} more time of the model"


def memory_lines(settings: PlanSettings, chosen: Way) -> list[str]:
    """Memory of a GPU by part, of the way chosen."""
    memory = chosen.memory
    lines = block(
        f"memory of a GPU, when {memory.moment}",
        {name: human_bytes(memory.parts[name]) for name in PARTS if name in memory.parts},
    )
    limit = human_bytes(room(chosen.gpu, settings.hardware.reserve))
    lines.append(f"  in all {human_bytes(memory.total)} of {limit} that tensors may take{when_compiled(settings)}")
    if memory.host:
        lines.append(f"  and {human_bytes(memory.host)} of the machine's memory for each GPU")
    return lines


def stage_lines(settings: PlanSettings, tokenizer: TokenizerSize, chosen: Way) -> list[str]:
    """Memory and traffic of every stage, with the batch chosen."""
    parameters = parameter_count(settings.model, settings.data.image_size, tokenizer.vocab_size)
    rows = []
    plain = settings.model_copy(update={"zero": settings.zero.model_copy(update={"config": None})})
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)):
        one = way(
            plain, chosen.gpu, tokenizer,
            gpus=chosen.gpus, stage=stage, offload=offload, recompute=chosen.recompute,
            micro_batch=chosen.micro_batch,
        )  # fmt: skip
        sent = traffic(parameters, stage=stage, world_size=one.gpus, accumulation=one.accumulation).total
        parts = one.memory.parts
        rows.append(
            [
                f"{stage}{' offload' if offload else ''}",
                *(human_bytes(parts.get(name, 0)) for name in ("weights", "gradients", "optimizer state")),
                human_bytes(sum(parts.get(name, 0) for name in ("buckets", "gathered weights"))),
                human_bytes(one.memory.total),
                human_bytes(sent),
                short(one.time.waits),
                "" if one.fits(settings.hardware.reserve) else "does not fit",
            ]
        )
    head = ["stage", "weights", "gradients", "optimizer", "buffers", "in all", "sent a step", "waits", ""]
    return [f"stages, at passes of {chosen.micro_batch}", *table(head, rows)]


def step(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, chosen: Way) -> dict[str, str]:
    """Where the time of a step goes."""
    time = chosen.time
    lines = {
        "model": share(time.model, time.total) + host_binds(time),
        "tokenizer": share(time.tokenizer, time.total) + ", in every step: tokens are not kept",
        "optimizer": share(time.optimizer, time.total),
    }
    if chosen.gpus > 1:
        bandwidth = link(gpu, chosen.gpus) / 1e9
        lines["network"] = (
            f"{share(time.waits, time.total)} waited; {short(time.traffic)} of traffic at "
            f"{bandwidth:g} GB/s, the rest hidden behind the passes"
        )
    lines["in all"] = f"{short(time.total)}, {chosen.pictures_per_s:,.0f} images/s"
    lines["mfu"] = mfu(settings, gpu, tokenizer, chosen)
    if settings.mfu is None and (other := with_other_impl(settings, gpu, tokenizer, chosen)):
        impl, would = other
        lines["otherwise"] = (
            f"{short(would.time.total)} with --train.impl {impl}; on an H100 a step took 1.2 times what is predicted "
            "by auto, 2 times by triton"
        )
    lines["data"] = (
        f"the workers of a rank must decode {chosen.pictures_per_s / chosen.gpus:,.0f} images/s "
        f"(data.workers {settings.data.workers}); not counted here"
    )
    return lines


def mfu(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, chosen: Way) -> str:
    """FLOPs of the model as a share of the published rate, which leaves out what is computed again."""
    image_size, num_masked = settings.data.image_size, settings.mask.num_patches
    flops = chosen.global_batch / chosen.gpus
    flops *= pretraining_flops(settings.model, image_size, num_masked, tokenizer.vocab_size)
    rate = gpu.bf16_tflops if uses_bf16(settings) else gpu.fp32_tflops
    own, whole = (flops / (1e12 * rate * seconds) for seconds in (chosen.time.model, chosen.time.total))
    return f"{own:.1%} of {rate:g} TFLOP/s in the model's passes, {whole:.1%} of the whole step"


def with_other_impl(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, chosen: Way) -> tuple[str, Way] | None:
    """The step by Triton, or where that is planned by `auto`; None where the model's shape is not for it."""
    impl: Literal["auto", "triton"] = "auto" if settings.train.impl == "triton" else "triton"
    asked = settings.model_copy(update={"train": settings.train.model_copy(update={"impl": impl})})
    try:
        return impl, way(
            asked, gpu, tokenizer,
            gpus=chosen.gpus, stage=chosen.stage, offload=chosen.offload and settings.zero.config is None,
            recompute=chosen.recompute, micro_batch=chosen.micro_batch,
        )  # fmt: skip
    except UserError:
        return None


def host_binds(time: StepTime) -> str:
    """A remark where the device is not what takes the time."""
    if time.model <= time.model_on_device:
        return ""
    return f": bound by the host, which starts the operators; the GPU needs {short(time.model_on_device)}"


def share(seconds: float, total: float) -> str:
    return f"{short(seconds)} ({seconds / total:.0%})"


def short(seconds: float) -> str:
    """`63.6 ms` or `1.68 s`."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def run(settings: PlanSettings, chosen: Way, pictures: int) -> dict[str, str]:
    """How long the whole run takes, and what for."""
    steps = run_steps(settings, pictures)
    hours = steps * chosen.time.total / 3600
    lines = {
        "steps": f"{steps:,} of {chosen.global_batch} images",
        "time": f"{duration(hours)}, {hours * chosen.gpus:,.4g} GPU hours; evaluation and checkpoints not counted",
        "energy": f"{chosen.gpus * chosen.gpu.watts * hours / 1000:,.4g} kWh at {chosen.gpu.watts:g} W a GPU; "
        f"hosts and cooling not counted",
    }
    if settings.price_per_gpu_hour is None:
        lines["cost"] = "not known without --price_per_gpu_hour"
    else:
        price = settings.price_per_gpu_hour
        lines["cost"] = f"{hours * chosen.gpus * price:,.4g} at {price:g} a GPU hour"
    if settings.tokenizer.path is None and not is_published(settings):
        lines["tokenizer"] = f"trained first, {settings.tokenizer.train_steps:,} steps; not counted here"
    return lines


def run_steps(settings: Settings, pictures: int) -> int:
    """Optimizer steps of the whole run."""
    train = settings.train
    return train.max_steps or train.epochs * (pictures // train.global_batch)


def is_published(settings: Settings) -> bool:
    """Whether the preset's tokenizer is DALL-E's, which nobody trains again."""
    tokenizer = settings.tokenizer
    return (tokenizer.vocab_size, tokenizer.width, tokenizer.groups, tokenizer.blocks_per_group) == DALLE


def duration(hours: float) -> str:
    """`5 d 3 h`, `3 h 5 min`, `4 min 10 s` or `1.23 s`."""
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    raise AssertionError(hours)


def command(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize) -> str:
    """The command that starts the run as planned; `settings` with what was chosen."""
    options = options_of(settings)
    if settings.data.path is None and settings.preset != Settings().preset:
        options += ["--data.path", "FOLDER"]
    if settings.tokenizer.path is None and is_published(settings):
        options += ["--tokenizer.path", "DALLE_ENCODER"]
    return launch_command(options, ranks=settings.gpus, ranks_a_machine=gpu.gpus_per_node)


def sweep_text(rows: Sequence[Row], picture: Path) -> str:
    """Strong and weak scaling as a table."""
    head = ["GPUs", "images/s", "of ideal", "stage", "passes", "images/s", "of ideal", "batch", ""]
    cells = []
    for row in rows:
        speed, of_ideal, stage, passes, _ = scaling(row.strong)
        weak_speed, weak_of_ideal, _, _, weak_batch = scaling(row.weak)
        cells.append(
            [f"{row.gpus}", speed, of_ideal, stage, passes, weak_speed, weak_of_ideal, weak_batch, remark(row)]
        )
    titles = "scaling: with the batch of the recipe (left), and with a batch that grows with the GPUs (right)"
    return "\n".join([titles, *table(head, cells), f"drawn in {picture}"])


def scaling(one: Way | None) -> list[str]:
    """Images a second, efficiency, stage, passes and batch."""
    if one is None:
        return ["-"] * 5
    stage = f"{one.stage}{' offload' if one.offload else ''}"
    passes = f"{one.accumulation} x {one.micro_batch}"
    return [f"{one.pictures_per_s:,.0f}", f"{efficiency(one, alone(one)):.0%}", stage, passes, f"{one.global_batch:,}"]


def remark(row: Row) -> str:
    """What binds."""
    if row.strong is None:
        return "not possible"
    return f"waits for the network more than {BOUND:.0%}" if binds(row.strong) else ""
