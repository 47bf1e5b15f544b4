"""Whose time it is in a training step. Marks cost a clock's reading on a CPU, an event on a GPU, and wait for nothing.

The loop names the phases of its step. What happens inside a phase is told apart only while it is profiled, by marks
that `profiling/parts.py` puts around the model from outside.
"""

import time
from collections import defaultdict
from enum import StrEnum

import torch


class Phase(StrEnum):
    """What the loop does one after the other."""

    DATA = "data"
    """It waits for the next batch."""
    TRANSFER = "transfer"
    """The batch goes to the device."""
    TOKENIZER = "tokenizer"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    REST = "rest"
    """Everything between two steps: sums, log lines, the progress bar."""


class Part(StrEnum):
    """What happens inside a phase."""

    EMBED = "embed"
    ATTENTION = "attention"
    MLP = "mlp"
    NORMS = "norms"
    HEAD = "head"
    COMMUNICATION = "communication"
    OTHER = "other"
    """Nothing that a mark names."""
    MARKING = "marking"
    """The profiler's own work."""


Key = tuple[Phase, Part]


class Timeline:
    """Gives every moment from its start on to the phase and part that were entered last, so that nothing is left over.

    This one reads the host's clock: on a CPU an operator is done when its call returns.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was, and begin now, between two steps."""
        self.phase, self.part = Phase.REST, Part.OTHER
        self._seconds: dict[Key, float] = defaultdict(float)
        self._since = time.perf_counter()

    def enter(self, phase: Phase, part: Part = Part.OTHER) -> None:
        """Another phase begins here."""
        self._mark()
        self.phase, self.part = phase, part

    def enter_part(self, part: Part) -> Part:
        """Another part of this phase begins here; returns the one that ends."""
        before = self.part
        if part != before:
            self.enter(self.phase, part)
        return before

    def seconds(self) -> dict[Key, float]:
        """Seconds of each phase and part up to now. It waits for a GPU: only for where the host does anyway."""
        self._mark()
        return dict(self._seconds)

    def _mark(self) -> None:
        now = time.perf_counter()
        self._seconds[self.phase, self.part] += now - self._since
        self._since = now


class StreamTimeline(Timeline):
    """The same on a GPU's own clock, for operators that the host has only queued.

    A mark is an event in the stream that was current when the timeline was made, the one that computes, whichever is
    current where the mark is set: times between two streams' events mean nothing, and DeepSpeed starts collectives
    inside a stream of its own. What a phase gets is the time from when the device reached its first mark until it
    reached the next one: its operators, and the pauses before them in which the device had nothing to do. Waiting for
    data counts only where the device really ran dry, and a collective in another stream where this one waits for it.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()
        super().__init__()

    def restart(self) -> None:
        self._events: list[tuple[torch.cuda.Event, Key]] = []
        super().restart()
        self._mark()

    def enter(self, phase: Phase, part: Part = Part.OTHER) -> None:
        self.phase, self.part = phase, part
        self._mark()

    def seconds(self) -> dict[Key, float]:
        self._mark()
        self._events[-1][0].synchronize()
        for (start, key), (end, _) in zip(self._events, self._events[1:], strict=False):
            self._seconds[key] += start.elapsed_time(end) / 1000
        del self._events[:-1]
        return dict(self._seconds)

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._events.append((event, (self.phase, self.part)))


def timeline(device: torch.device) -> Timeline:
    """The timeline for steps on this device."""
    return StreamTimeline() if device.type == "cuda" else Timeline()


def by_phase(seconds: dict[Key, float]) -> dict[Phase, float]:
    """Seconds of all phases, the parts of each together."""
    return {phase: sum(value for key, value in seconds.items() if key[0] == phase) for phase in Phase}
