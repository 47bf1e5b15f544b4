"""A few steps of a run, timed as they are and with marks in turn, and a few more under torch's profiler for a trace."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ...cpu import has_bf16
from ...errors import UserError
from ...models.flops import pretraining_flops_by_part
from ...tokenizer.flops import encoding_flops
from .. import zero
from ..bottleneck import Circumstances
from ..loop import Interval
from ..pace import Pace
from ..pretraining import Run
from ..timeline import Key, Part, Phase, Timeline, by_phase
from .parts import marked

WARM_STEPS = 3
TRACED_STEPS = 2
ROUNDS = (3, 10)  # least and most; each is some steps as they are, then as many with marks
MOST_STEPS = 10  # of one kind in a round
ROUND_SECONDS = 1.0  # that one kind of steps takes in a round, where a step is shorter
BUDGET_SECONDS = 30.0  # for all rounds, where the least number of them takes less
LEAST_STEPS = WARM_STEPS + 2 * ROUNDS[0] + TRACED_STEPS
PRODUCTS = 3  # in a round
PRODUCT_SIDE = {"cpu": 1536, "cuda": 8192}
IMITATED_SIDE = 256  # at most, for bf16 on a processor that has none, where a product of the usual side takes seconds
WAITS = {"Event Sync", "Stream Wait Event", "Stream Sync", "Context Sync", "Unknown Sync"}  # kineto's names, on a GPU


@dataclass(frozen=True)
class Stretch:
    """Some steps in a row, on one rank."""

    steps: int = 0
    seconds: Mapping[Key, float] = field(default_factory=dict)
    """By phase and part; together they are all the time there was."""
    taken: Pace = field(default_factory=Pace)
    processor_seconds: float = 0.0
    """Of all threads of this process."""

    def __add__(self, other: "Stretch") -> "Stretch":
        keys = {*self.seconds, *other.seconds}
        return Stretch(
            self.steps + other.steps,
            {key: self.seconds.get(key, 0.0) + other.seconds.get(key, 0.0) for key in keys},
            self.taken + other.taken,
            self.processor_seconds + other.processor_seconds,
        )

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values()) / max(self.steps, 1)


@dataclass(frozen=True)
class Profile:
    """Where the time of one step went, on one rank."""

    marked: Stretch
    plain: Stretch
    """The same number of steps without marks, timed in turn with the marked ones."""
    flops: Mapping[str, float]
    """Of a step on this rank: by part of the model, and of the tokenizer."""
    product_flops_per_s: float
    """What a large product of matrices reached in the precision of the run, measured in turn with the steps."""
    device_idle: float | None
    """Share of the traced steps in which the GPU had nothing to do; None on a CPU."""
    on_cpu: bool
    circumstances: Circumstances
    facts: Mapping[str, str]
    """What was run on what, label to value."""

    @property
    def seconds(self) -> dict[Key, float]:
        """Of a marked step, by phase and part, without the profiler's own work."""
        sums = self.marked.seconds.items()
        return {key: value / self.marked.steps for key, value in sums if key[1] != Part.MARKING}

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def pace(self) -> Pace:
        """Of the marked steps, without the profiler's own work."""
        phases = by_phase({key: value * self.marked.steps for key, value in self.seconds.items()})
        return replace(self.marked.taken, phases=phases, processor_seconds=self.marked.processor_seconds)

    @property
    def overhead(self) -> float:
        """What marks cost: a marked step, the profiler's own work included, against a plain one.

        On a CPU in processor time, which other processes do not change.
        """
        if self.on_cpu:
            return self.marked.processor_seconds / max(self.plain.processor_seconds, 1e-9) - 1
        return self.marked.step_seconds / self.plain.step_seconds - 1


def profile(run: Run, trace: Path) -> Profile:
    """Measure a run that was just opened. Every rank calls this and measures itself; rank 0 writes its trace.

    Raises:
        UserError: where the run is too short.
    """
    length = run.end_step - run.start_step
    if length < LEAST_STEPS:
        raise UserError(
            f"the run has {length} steps and a profile takes at least {LEAST_STEPS}; raise --train.max_steps or "
            f"--train.epochs."
        )
    steps = Steps(run)
    steps.take(WARM_STEPS - 1)
    warm = steps.take(1)
    rounds, count = zero.on_first_rank(partial(plan, warm.step_seconds, length))
    device = run.runtime.device
    product = Product(device, torch.bfloat16 if run.bf16 else torch.float32)
    plain, with_marks = Stretch(), Stretch()
    for _ in range(rounds):
        plain += steps.take(count)
        with_marks += steps.take(count, marks=True)
        product.measure()
    return Profile(
        marked=with_marks,
        plain=plain,
        flops=step_flops(run),
        device_idle=write_trace(steps, trace),
        product_flops_per_s=product.flops_per_s,
        on_cpu=device.type == "cpu",
        circumstances=run.circumstances(),
        facts=facts_of(run),
    )


def plan(step_seconds: float, length: int) -> tuple[int, int]:
    """How many rounds of how many steps of each kind, for a run of `length` steps."""
    room = (length - WARM_STEPS - TRACED_STEPS) // 2
    count = max(1, min(round(ROUND_SECONDS / step_seconds), MOST_STEPS, room // ROUNDS[0]))
    within_budget = int(BUDGET_SECONDS / (2 * count * step_seconds))
    return max(ROUNDS[0], min(ROUNDS[1], within_budget, room // count)), count


class Steps:
    """The run's own steps, one after the other: its loop takes them, as in training."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.next = run.start_step

    def take(
        self, count: int, *, marks: bool = False, marks_backward: bool = True, timeline: Timeline | None = None
    ) -> Stretch:
        """Take some steps. The host waits for the device after the last, as it does to log."""
        interval = Interval(self.run.runtime.device)
        if timeline is not None:
            interval.timeline = timeline
        inside = marked(self.run.engine, interval.timeline, backward=marks_backward) if marks else nullcontext()
        with inside:
            interval.restart()
            began = time.process_time()
            for step in range(self.next, self.next + count):
                self.run.loop.train_step(step, interval)
            interval.sums.tolist()
            seconds = interval.timeline.seconds()
            processor_seconds = time.process_time() - began
            taken = replace(interval.taken, queued_seconds=interval.queue.seconds())
        self.next += count
        return Stretch(count, seconds, taken, processor_seconds)


class RangedTimeline(Timeline):
    """Names phases and parts in the trace that torch's profiler takes."""

    def __init__(self) -> None:
        self._range: record_function | None = None
        super().__init__()

    def enter(self, phase: Phase, part: Part = Part.OTHER) -> None:
        super().enter(phase, part)
        self._end_range()
        self._range = record_function(f"{phase}: {part}" if part != Part.OTHER else str(phase))
        self._range.__enter__()

    def seconds(self) -> dict[Key, float]:
        self._end_range()
        return super().seconds()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def write_trace(steps: Steps, path: Path) -> float | None:
    """Take some steps under torch's profiler and write what it saw on rank 0; how idle the GPU was, None on a CPU."""
    on_gpu = steps.run.runtime.device.type == "cuda"
    if not steps.run.first:
        steps.take(TRACED_STEPS)
        return None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    trace = torch.profiler.profile(activities=activities)
    with without_stderr():
        trace.start()
    # Backward runs in a thread of its own on a GPU, collectives in it, and a range may not end in another thread than
    # it began in.
    steps.take(TRACED_STEPS, marks=True, marks_backward=not on_gpu, timeline=RangedTimeline())
    with without_stderr():
        trace.stop()
    trace.export_chrome_trace(str(path))
    if not on_gpu:
        return None
    return device_idle(trace.events() or [])


def device_idle(events: Iterable[Any]) -> float:
    """Share of a trace in which the GPU had nothing to do.

    Kineto also puts on the device what is no work: the ranges that a person named, which cover all that is between
    their first and last kernel, and the waits of one stream for another.
    """
    return idle_share(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and event.name not in WAITS
    )


@contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing of this process reaches stderr: the tracer of torch announces itself there at any log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first span's start to the last one's end that no span covers."""
    covered, first, last = 0.0, None, 0.0
    for start, end in sorted(spans):
        if first is None:
            first = last = start
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return 0.0 if first is None or last <= first else 1 - covered / (last - first)


def step_flops(run: Run) -> dict[str, float]:
    """Floating point operations of a step on one rank, by part of the model, and of the tokenizer."""
    settings, tokenizer = run.settings, run.tokenizer
    pictures = settings.train.global_batch / run.runtime.world_size
    parts = pretraining_flops_by_part(
        settings.model, settings.data.image_size, settings.mask.num_patches, tokenizer.vocab_size
    )
    flops = {name: pictures * (part.forward + part.backward) for name, part in parts.items()}
    encoding = encoding_flops(tokenizer.encoder_size, settings.grid * tokenizer.stride)
    return flops | {Phase.TOKENIZER: pictures * sum(encoding)}


class Product:
    """A large square product of matrices, to judge FLOP/s by, in the same minutes as the steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        imitated = device.type == "cpu" and dtype == torch.bfloat16 and not has_bf16()
        self.side = min(PRODUCT_SIDE[device.type], IMITATED_SIDE) if imitated else PRODUCT_SIDE[device.type]
        self.left, self.right = (torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2))
        self.flops = self.seconds = 0.0
        self.once()

    def once(self) -> float:
        """Seconds of one product."""
        began = time.perf_counter()
        (self.left @ self.right)[0, 0].tolist()  # waits until it is done
        return time.perf_counter() - began

    def measure(self) -> None:
        for _ in range(PRODUCTS):
            self.seconds += self.once()
            self.flops += 2.0 * self.side**3

    @property
    def flops_per_s(self) -> float:
        return self.flops / max(self.seconds, 1e-9)


def facts_of(run: Run) -> dict[str, str]:
    settings, engine, runtime = run.settings, run.engine, run.runtime
    facts: dict[str, Any] = {
        "preset": settings.preset,
        "parameters": f"{run.num_parameters:,}",
        "step": f"{engine.micro_batch} pictures x {engine.accumulation} passes on each of {runtime.world_size} rank(s)",
        "precision": "bf16 autocast" if run.bf16 else "fp32",
        "ZeRO stage": engine.stage,
        "CPU threads of a rank": runtime.threads,
        "data workers of a rank": settings.data.workers,
    }
    return {name: str(value) for name, value in facts.items()} | run.facts
