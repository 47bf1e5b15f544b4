"""What a run's speed is bound by, and what to change, in one sentence with the figures that say so."""

import math
from dataclasses import dataclass

from .pace import Pace
from .timeline import Phase

WAITING = 0.10  # share of the time spent waiting for pictures from which on they are what bounds the run
STORAGE = 0.5  # share of a worker's time in which a processor works, below which it is storage that it waits for
CROWDED = 0.25  # share of the time in which threads could run that they waited for a core, from which on it is said
WORTH_NAMING = 0.2  # share of the time from which on a part beside the largest is worth a word

MODEL, TOKENIZER, OPTIMIZER = "the model", "the tokenizer", "the optimizer"
TRANSFER, COMMUNICATION, REST = "the way to the device", "communication between the ranks", "what is between the steps"

TOO_SHORT = (
    "Too short to tell what bounds it: all steps were within the first log line, where everything is done for the "
    "first time; train more steps, or lower train.log_every."
)
"""In place of the sentence where no step is past the start-up."""


@dataclass(frozen=True)
class Circumstances:
    """What a sentence must know of the run besides its times."""

    workers: int
    """`data.workers`"""
    cores: int
    """Processors that a rank has for its own threads and its workers."""
    threads: int | None
    """CPU threads that train; None where a GPU does."""
    bf16_untried: bool
    """The run is in fp32 on a device that has fast bf16."""
    trains_tokenizer: bool
    """The run's settings say the tokenizer's size; false where one is given."""
    tokens_ahead: bool = False
    """The tokenizer works beside the steps, so that their times hold its work too."""


def bottleneck(pace: Pace, run: Circumstances, communication: float = 0.0, detail: str = "") -> str:
    """The sentence.

    communication: share of the time in which ranks exchanged; it is part of other phases, known when they are profiled
    detail:        further figures about the model, put behind its share
    """
    if not pace.pictures or pace.seconds <= 0:
        return "No step was timed."
    if pace.share(Phase.DATA) >= WAITING:
        return starved(pace, run)
    rank, waited = pace.most_waiting
    if waited >= WAITING:
        return (
            f"Waits for rank {rank}, which waits {waited:.0%} of the time for pictures, where rank 0 waits "
            f"{pace.share(Phase.DATA):.0%}; ranks wait for each other when they exchange: look at what else that "
            f"rank's machine does and at its storage, or raise --data.workers."
        )
    shares = {
        MODEL: pace.share(Phase.FORWARD, Phase.BACKWARD) - communication,
        TOKENIZER: pace.share(Phase.TOKENIZER),
        OPTIMIZER: pace.share(Phase.OPTIMIZER),
        TRANSFER: pace.share(Phase.TRANSFER),
        COMMUNICATION: communication,
        REST: pace.share(Phase.REST),
    }
    largest = max(shares, key=lambda name: shares[name])
    takes = f"{shares[largest]:.0%} of the time"
    takes = f"forward and backward take {takes}{detail}" if largest == MODEL else f"it takes {takes}"
    beside = [f"{name} {share:.0%}" for name, share in shares.items() if name != largest and share >= WORTH_NAMING]
    takes = ", ".join([takes, *beside, *(["with the tokenizer's work beside them"] if run.tokens_ahead else [])])
    return (
        f"Bound by {largest}: {takes}, waiting for pictures {pace.share(Phase.DATA):.0%} "
        f"({loaders(run)} {amount(pace.made_per_s(run.workers))}/s, {amount(pace.per_s)}/s are used); "
        f"{crowding(pace, run)}{advice(largest, run)}."
    )


def starved(pace: Pace, run: Circumstances) -> str:
    """The sentence of a run that waits for pictures."""
    made_per_s = pace.made_per_s(run.workers)
    facts = (
        f"Waits {pace.share(Phase.DATA):.0%} of the time for pictures: {loaders(run)} "
        f"{amount(made_per_s)}/s, the rest of the step could take {amount(pace.could_per_s)}/s"
    )
    slow = pace.slowest(run.workers)
    if slow is not None:
        number, times = slow
        return (
            f"{facts}; worker {number} takes {times:.1f} times as long as the others, and batches are taken in turn: "
            f"look at what slows that process, or raise --data.workers."
        )
    needed = max(run.workers + 1, math.ceil(pace.could_per_s / max(pace.worker_per_s(run.workers), 1e-9)))
    if run.workers and made_per_s >= pace.could_per_s:
        return (
            f"{facts}, but some batches take far longer to make or to hand over than others, and all wait their turn: "
            f"raise --data.workers to {needed}."
        )
    if pace.making_share < STORAGE:
        return (
            f"{facts}; {1 - pace.making_share:.0%} of a worker's time is not spent computing but waiting, for storage "
            f"or a free core: raise --data.workers to {needed}, or put the pictures on faster storage."
        )
    if needed <= run.cores:
        return f"{facts}; raise --data.workers to {needed}."
    return (
        f"{facts}; it would take {needed} workers and there are {run.cores} cores, so store the pictures at a size "
        f"nearer to data.image_size, which is faster to decode{raise_to(run)}."
    )


def raise_to(run: Circumstances) -> str:
    return f", and set --data.workers to {run.cores}" if run.workers < run.cores else ""


def loaders(run: Circumstances) -> str:
    """Who makes the pictures, with its verb."""
    if run.workers == 0:
        return "the training process itself makes"
    return f"{run.workers} worker{' makes' if run.workers == 1 else 's make'}"


def advice(largest: str, run: Circumstances) -> str:
    """What would make the largest part smaller."""
    if largest == TOKENIZER:
        return f"a smaller tokenizer{' (--tokenizer.width)' if run.trains_tokenizer else ''} costs less"
    if largest == OPTIMIZER:
        return "it costs the same for any batch, so a larger --train.global_batch needs it less often"
    if largest == TRANSFER:
        return "the pictures' way to the device is slow; look at what else uses it"
    if largest == COMMUNICATION:
        return "a lower --zero.stage or a larger --train.global_batch exchanges less for a picture"
    if largest == REST:
        return "raise --train.log_every"
    if run.bf16_untried:
        return "try --train.precision bf16, which this device computes fast"
    return "a faster device, more ranks or a smaller model is what makes it faster"


def processors(pace: Pace, run: Circumstances) -> str:
    """`1.63 processors for its 2 threads`"""
    return f"{pace.processors:.2f} processors for its {run.threads} thread{'' if run.threads == 1 else 's'}"


def crowding(pace: Pace, run: Circumstances) -> str:
    """What comes before any other advice where the threads that train had to share their cores."""
    if not is_crowded(pace, run):
        return ""
    return f"{queued(pace)}, so look first at what else runs on the cores; then, "


def queued(pace: Pace) -> str:
    """`its threads waited 45% of their time for a core`"""
    return f"its threads waited {pace.queued_share:.0%} of their time for a core"


def is_crowded(pace: Pace, run: Circumstances) -> bool:
    """Whether the threads that train had to share their cores; threads that wait for each other leave them free."""
    return run.threads is not None and pace.queued_share >= CROWDED


def amount(per_s: float) -> str:
    """A rate as one reads it: 1.6, 23, 1,300."""
    return f"{per_s:.1f}" if per_s < 10 else f"{per_s:,.0f}"
