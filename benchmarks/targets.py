"""What operators and training step are to reach on an H100 or H200 in bf16, and whether rows of results say so.

A floor and a matrix rate are those that the same run measured on its machine. Of the step, ours is that by Triton.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import step_names as step
from .cases import BACKWARD, BOTH, FORWARD
from .providers import OURS, PEER

Key = tuple[str, str, str, str]
Rows = dict[Key, dict[str, Any]]
"""Rows that have a time, by operator, case, direction and provider; of the step, the group is the direction."""


class Target(NamedTuple):
    """A figure to be reached: `wanted` at most or at least."""

    what: str
    wanted: float
    at_most: bool
    unit: str
    value: Callable[[Rows], float | None]
    """The figure that was measured; None where it was not."""
    note: str = ""
    """What a reader could mistake it for."""


ATTENTION = "rel_pos_attention"


def over_memory_floor(operator: str, case: str, direction: str) -> Callable[[Rows], float | None]:
    """How many times the time in which a copy moves the bytes that the work demands."""

    def value(rows: Rows) -> float | None:
        row = rows.get((operator, case, direction, "triton"))
        return None if row is None else row["copy_gb_per_s"] / row["gb_per_s"]

    return value


def terabytes(operator: str, case: str, direction: str) -> Callable[[Rows], float | None]:
    """TB/s of the bytes that the work demands."""

    def value(rows: Rows) -> float | None:
        row = rows.get((operator, case, direction, "triton"))
        return None if row is None else row["gb_per_s"] / 1e3

    return value


def over_ours(operator: str, case: str, direction: str, *providers: str) -> Callable[[Rows], float | None]:
    """How many times our time the fastest provider takes: of these, or of all that are exact."""

    def value(rows: Rows) -> float | None:
        ratios = [
            row["ratio"]
            for (*of, name), row in rows.items()
            if (*of, row["over"]) == (operator, case, direction, "triton")
            and (name in providers if providers else row["kind"] == PEER)
        ]
        return min(ratios, default=None)

    return value


def ours_over(operator: str, case: str, direction: str, provider: str) -> Callable[[Rows], float | None]:
    """How many times this provider's time we take."""
    ratio = over_ours(operator, case, direction, provider)

    def value(rows: Rows) -> float | None:
        found = ratio(rows)
        return None if found is None else 1 / found

    return value


def extra_megabytes(operator: str, case: str, direction: str) -> Callable[[Rows], float | None]:
    """Memory above inputs, output and gradients, in the mode of ours that takes least."""

    def value(rows: Rows) -> float | None:
        sizes = [
            row["extra_bytes"] / 1e6
            for (*of, name), row in rows.items()
            if (*of, row.get("kind")) == (operator, case, direction, OURS) and "extra_bytes" in row and name != "auto"
        ]
        return min(sizes, default=None)

    return value


def rates(operator: str, case: str, wanted: float) -> tuple[Target, ...]:
    """A memory rate to be reached in both directions."""
    return tuple(
        Target(f"{operator}: {direction}", wanted, False, "TB/s", terabytes(operator, case, direction))
        for direction in (FORWARD, BACKWARD)
    )


def step_row(rows: Rows, case: str, group: str, provider: str) -> dict[str, Any]:
    return rows.get((step.SUBJECT, case, group, provider), {})


def relative_times(rows: Rows, case: str, group: str) -> dict[str, float]:
    """Of all that were timed in turn, the time over that of the one they are compared with; empty where it has none."""
    found = {name: step_row(rows, case, group, name) for name in step.GROUPS[group]}
    first = {row["over"] for row in found.values() if row.get("over")}
    ratios = {name: 1.0 if name in first else row.get("ratio") for name, row in found.items() if row}
    return {name: ratio for name, ratio in ratios.items() if ratio}


def mfu(case: str) -> Callable[[Rows], float | None]:
    """Share of the measured matrix rate in percent, tokens given: of our step as it is or compiled, the faster."""

    def value(rows: Rows) -> float | None:
        ours = ((step.AS_THEY_ARE, step.TRITON), (step.COMPILED, step.TRITON), (step.COMPILED, step.TRITON_COMPILED))
        return max((100 * row["mfu"] for key in ours if "mfu" in (row := step_row(rows, case, *key))), default=None)

    return value


def step_over_ours(group: str, *providers: str) -> Callable[[Rows], float | None]:
    """How many times our time the fastest of these takes; ours is the faster of those in the same rounds."""

    def value(rows: Rows) -> float | None:
        times = relative_times(rows, step.BASE, group)
        ours, others = (
            min((times[name] for name in names if name in times), default=None)
            for names in ((step.TRITON, step.TRITON_COMPILED), providers)
        )
        return others / ours if ours and others else None

    return value


def speed_with_tokenizer(rows: Rows) -> float | None:
    """Share in percent of the speed with cached tokens that is left with the tokenizer in the loop."""
    times = relative_times(rows, step.BASE, step.VARIED)
    cached, in_the_loop = times.get(step.TRITON), times.get(step.by_triton(step.IN_THE_LOOP))
    return 100 * cached / in_the_loop if cached and in_the_loop else None


def share_of_deepspeed(rows: Rows) -> float | None:
    """Percent of a step at ZeRO stage 1 that the same step without DeepSpeed does not take."""
    times = relative_times(rows, step.BASE, step.VARIED)
    sharded, plain = (times.get(step.by_triton(name)) for name in (step.ZERO_1, step.NO_DEEPSPEED))
    return 100 * (1 - plain / sharded) if sharded and plain else None


def share_of_memory(rows: Rows) -> float | None:
    """Our memory at the peak, weights and all, over that of the eager provider that takes least."""

    def peak(provider: str) -> float | None:
        row = step_row(rows, step.BASE, step.AS_THEY_ARE, provider)
        return row["state_bytes"] + row["peak_bytes"] if {"state_bytes", "peak_bytes"} <= row.keys() else None

    ours, peers = peak(step.TRITON), [size for name in (step.TIMM, *step.TRANSFORMERS) if (size := peak(name))]
    return ours / min(peers) if ours and peers else None


def of_attention(direction: str) -> tuple[Target, ...]:
    """What one direction of attention is held to: the machine's memory, and the best that gives the same."""
    floor, others = over_memory_floor(ATTENTION, "base", direction), over_ours(ATTENTION, "base", direction)
    return (
        Target(f"{ATTENTION}: {direction} over its memory floor", 2, True, "x", floor),
        Target(f"{ATTENTION}: {direction}, the fastest exact alternative over ours", 2, False, "x", others),
    )


MFU_NOTE = (
    "of the matrix rate that this machine reached in a large product; the `mfu` that a run logs is of the datasheet's: "
    "where 798 TFLOP/s were measured of 989, 48 % here are 39 % there"
)
LOSS, CODE = "token_loss", "nearest_code"
MATMULS = ("matmul-max", "matmul-max-rounded")
TARGETS = (
    *of_attention(FORWARD),
    *of_attention(BACKWARD),
    Target(
        f"{ATTENTION}: speed of flash without bias",
        0.9,
        False,
        "x",
        over_ours(ATTENTION, "base", BOTH, "flash-no-bias"),
    ),
    Target(f"{ATTENTION}: extra memory in one mode", 25, True, "MB", extra_megabytes(ATTENTION, "base", BOTH)),
    Target(
        f"{ATTENTION}: the same speed, N = 577", 0.6, False, "x", over_ours(ATTENTION, "n577", BOTH, "flash-no-bias")
    ),
    Target(
        f"{ATTENTION}: the same speed, N = 1025", 0.6, False, "x", over_ours(ATTENTION, "n1025", BOTH, "flash-no-bias")
    ),
    *rates("residual_norm", "base", 3.3),
    *rates("embed_tokens", "base", 3.0),
    *rates("gather_masked", "base", 3.0),
    Target(f"{LOSS}: over the time of its products", 1.25, True, "x", ours_over(LOSS, "base", BOTH, "products")),
    Target(f"{LOSS}: eager torch over ours", 1.5, False, "x", over_ours(LOSS, "base", BOTH, "reference")),
    Target(f"{LOSS}: extra memory", 200, True, "MB", extra_megabytes(LOSS, "base", BOTH)),
    Target(f"{CODE}: matmul + argmax over ours, D = 2048", 2, False, "x", over_ours(CODE, "dvae", FORWARD, *MATMULS)),
    Target(f"{CODE}: matmul + argmax over ours, D = 32", 2, False, "x", over_ours(CODE, "vqkd", FORWARD, *MATMULS)),
    Target(f"{step.SUBJECT}: share of the matrix rate, base", 48, False, "%", mfu(step.BASE), MFU_NOTE),
    Target(f"{step.SUBJECT}: share of the matrix rate, large", 57, False, "%", mfu(step.LARGE), MFU_NOTE),
    Target(f"{step.SUBJECT}: timm over ours", 1.8, False, "x", step_over_ours(step.AS_THEY_ARE, step.TIMM)),
    Target(
        f"{step.SUBJECT}: transformers over ours", 1.8, False, "x", step_over_ours(step.AS_THEY_ARE, *step.TRANSFORMERS)
    ),
    Target(
        f"{step.SUBJECT}: compiled timm over ours", 1.4, False, "x", step_over_ours(step.COMPILED, step.TIMM_COMPILED)
    ),
    Target(
        f"{step.SUBJECT}: compiled transformers over ours",
        1.4,
        False,
        "x",
        step_over_ours(step.COMPILED, step.TRANSFORMERS_COMPILED),
    ),
    Target(f"{step.SUBJECT}: speed kept with the tokenizer in the loop", 70, False, "%", speed_with_tokenizer),
    Target(f"{step.SUBJECT}: DeepSpeed's own share at ZeRO 1", 5, True, "%", share_of_deepspeed),
    Target(f"{step.SUBJECT}: peak memory over that of eager", 0.5, True, "x", share_of_memory),
)


def verdicts(rows: Iterable[dict[str, Any]], *, rehearsal: bool = False) -> list[dict[str, Any]]:
    """Each target with what was measured: held, missed or not measured; in a rehearsal, rehearsed.

    rows: as `results.rows_of` gives them
    """
    timed: Rows = {
        (row["operator"], row["name"], row["direction"], row["provider"]): row
        for row in rows
        if "median" in row and "operator" in row
    }
    found = []
    for target in TARGETS:
        value = target.value(timed)
        if value is None:
            verdict = "not measured"
        elif rehearsal:
            verdict = "rehearsed"
        else:
            verdict = "held" if (value <= target.wanted if target.at_most else value >= target.wanted) else "missed"
        bound = f"{'at most' if target.at_most else 'at least'} {target.wanted:g} {target.unit}"
        about = {"target": target.what, "wanted": bound, "value": value, "unit": target.unit, "verdict": verdict}
        found.append(about | ({"note": target.note} if target.note else {}))
    return found
