"""How fast some training steps were and where their time went, on one rank, from what the loop measures anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from statistics import median

from ..data.loading import Batch, Making
from .timeline import Phase

UNEVEN = 1.5  # how much longer than the others one worker takes when it is the one to look at
LEAST_BATCHES = 3  # that each worker made before one is told from the others: single batches differ by as much


@dataclass(frozen=True)
class Made:
    """What one data worker made."""

    pictures: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    batches: int = 0

    def __add__(self, other: "Made") -> "Made":
        return Made(
            self.pictures + other.pictures,
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            self.batches + other.batches,
        )

    @property
    def per_s(self) -> float:
        """Pictures that it makes in a second, when it makes any."""
        return self.pictures / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Pace:
    """Steps of this rank: pictures, seconds, and whose seconds they were."""

    pictures: int = 0
    phases: Mapping[Phase, float] = field(default_factory=dict)
    """Seconds of each phase; together they are all the time there was."""
    made: Mapping[int, Made] = field(default_factory=dict)
    """What each worker made, by its number."""
    processor_seconds: float = 0.0
    """Of all threads of this process, its data workers not counted."""
    queued_seconds: float = 0.0
    """That these threads were ready to run and had no processor; 0 where the system does not tell."""
    rank_waits: tuple[float, ...] = ()
    """Seconds that each rank waited for pictures, where they are known; the others wait for it when they exchange."""

    def __add__(self, other: "Pace") -> "Pace":
        phases = {phase: self.phases.get(phase, 0.0) + other.phases.get(phase, 0.0) for phase in Phase}
        made = {
            worker: self.made.get(worker, Made()) + other.made.get(worker, Made())
            for worker in sorted({*self.made, *other.made})
        }
        return Pace(
            self.pictures + other.pictures,
            phases,
            made,
            self.processor_seconds + other.processor_seconds,
            self.queued_seconds + other.queued_seconds,
            tuple(a + b for a, b in zip_longest(self.rank_waits, other.rank_waits, fillvalue=0.0)),
        )

    def taking(self, batch: Batch) -> "Pace":
        """With the pictures of one more batch."""
        making: Making = batch.making
        pictures = len(batch.sample_ids)
        made = Made(pictures, making.seconds, making.processor_seconds, batches=1)
        before = self.made.get(making.worker, Made())
        return replace(self, pictures=self.pictures + pictures, made={**self.made, making.worker: before + made})

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def per_s(self) -> float:
        """Pictures trained on in a second."""
        return self.pictures / max(self.seconds, 1e-9)

    def share(self, *phases: Phase) -> float:
        """Share of the time that these phases took."""
        return sum(self.phases.get(phase, 0.0) for phase in phases) / max(self.seconds, 1e-9)

    @property
    def most_waiting(self) -> tuple[int, float]:
        """The rank that waited longest for pictures, and which share of the time."""
        waits = self.rank_waits or (self.phases.get(Phase.DATA, 0.0),)
        rank = max(range(len(waits)), key=lambda rank: waits[rank])
        return rank, waits[rank] / max(self.seconds, 1e-9)

    @property
    def could_per_s(self) -> float:
        """Pictures a second if none had to be waited for."""
        return self.per_s / max(1 - self.share(Phase.DATA), 1e-9)

    def slowest(self, workers: int) -> tuple[int, float] | None:
        """A worker much slower than the others: its number, and how many times as long it takes for a picture.

        None where there is no such, or not every one of the `workers` made enough batches to tell.
        """
        if workers < 2 or len(self.made) < workers:
            return None
        if min(made.batches for made in self.made.values()) < LEAST_BATCHES:
            return None
        worker = min(self.made, key=lambda number: self.made[number].per_s)
        others = median(made.per_s for number, made in self.made.items() if number != worker)
        times = others / max(self.made[worker].per_s, 1e-9)
        return (worker, times) if times >= UNEVEN else None

    def worker_per_s(self, workers: int) -> float:
        """Pictures a second that each of the `workers` can contribute, by those that made any.

        Batches are taken in turn, so where one is much slower than the others it sets the pace of all.
        """
        slow = self.slowest(workers)
        if slow is not None:
            return self.made[slow[0]].per_s
        return sum(self.made.values(), Made()).per_s

    def made_per_s(self, workers: int) -> float:
        """Pictures a second that `workers` can make together; 0 workers: the training process itself does."""
        return max(workers, 1) * self.worker_per_s(workers)

    @property
    def processors(self) -> float:
        """Processors that this process had on average while it did not wait for pictures."""
        return self.processor_seconds / max(self.seconds - self.phases.get(Phase.DATA, 0.0), 1e-9)

    @property
    def queued_share(self) -> float:
        """Share of the time in which the threads of this process could have run that they waited for a processor."""
        return self.queued_seconds / max(self.queued_seconds + self.processor_seconds, 1e-9)

    @property
    def making_share(self) -> float:
        """Share of the workers' own time in which a processor worked."""
        seconds = sum(made.seconds for made in self.made.values())
        return sum(made.processor_seconds for made in self.made.values()) / max(seconds, 1e-9)
