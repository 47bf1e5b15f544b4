"""What operators and training step are to reach on an H200 in bf16, and whether rows of results say that they do."""

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


ATTENTION = "rel_pos_attention"


def microseconds(operator: str, case: str, direction: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        row = rows.get((operator, case, direction, "triton"))
        return None if row is None else 1e6 * row["median"]

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


def mfu(case: str) -> Callable[[Rows], float | None]:
    """Share of the measured matrix rate in percent, tokens given: of our step as it is or compiled, the faster."""

    def value(rows: Rows) -> float | None:
        ours = ((step.AS_THEY_ARE, step.OURS), (step.COMPILED, step.OURS_COMPILED))
        return max((100 * row["mfu"] for key in ours if "mfu" in (row := step_row(rows, case, *key))), default=None)

    return value


def step_over_ours(group: str, *providers: str) -> Callable[[Rows], float | None]:
    """How many times our time the fastest of these takes; ours is the faster of those in the same rounds."""

    def value(rows: Rows) -> float | None:
        found = {name: step_row(rows, step.BASE, group, name) for name in (*providers, step.OURS_COMPILED)}
        ratios = {name: row["ratio"] for name, row in found.items() if row.get("over") == step.OURS}
        ours = min(1.0, ratios.pop(step.OURS_COMPILED, 1.0))
        return min(ratios.values()) / ours if ratios else None

    return value


def speed_with_tokenizer(rows: Rows) -> float | None:
    """Share in percent of the speed with cached tokens that is left with the tokenizer in the loop."""
    row = step_row(rows, step.BASE, step.VARIED, step.IN_THE_LOOP)
    return 100 / row["ratio"] if row.get("over") == step.OURS else None


def share_of_deepspeed(rows: Rows) -> float | None:
    """Percent of a step at ZeRO stage 1 that the same step without DeepSpeed does not take."""
    sharded, plain = (step_row(rows, step.BASE, step.VARIED, name) for name in (step.ZERO_1, step.NO_DEEPSPEED))
    same = sharded.get("over") == plain.get("over") == step.OURS
    return 100 * (1 - plain["ratio"] / sharded["ratio"]) if same else None


def share_of_memory(rows: Rows) -> float | None:
    """Our memory at the peak, weights and all, over that of the eager provider that takes least."""

    def peak(provider: str) -> float | None:
        row = step_row(rows, step.BASE, step.AS_THEY_ARE, provider)
        return row["state_bytes"] + row["peak_bytes"] if {"state_bytes", "peak_bytes"} <= row.keys() else None

    ours, peers = peak(step.OURS), [size for name in (step.TIMM, *step.TRANSFORMERS) if (size := peak(name))]
    return ours / min(peers) if ours and peers else None


LOSS, CODE = "token_loss", "nearest_code"
MATMULS = ("matmul-max", "matmul-max-rounded")
TARGETS = (
    Target(f"{ATTENTION}: forward", 60, True, "us", microseconds(ATTENTION, "base", FORWARD)),
    Target(f"{ATTENTION}: backward", 160, True, "us", microseconds(ATTENTION, "base", BACKWARD)),
    Target(f"{ATTENTION}: the fastest exact alternative over ours", 3, False, "x", over_ours(ATTENTION, "base", BOTH)),
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
    Target(f"{step.SUBJECT}: share of the matrix rate, base", 60, False, "%", mfu(step.BASE)),
    Target(f"{step.SUBJECT}: share of the matrix rate, large", 65, False, "%", mfu(step.LARGE)),
    Target(f"{step.SUBJECT}: timm over ours", 2, False, "x", step_over_ours(step.AS_THEY_ARE, step.TIMM)),
    Target(
        f"{step.SUBJECT}: transformers over ours", 2, False, "x", step_over_ours(step.AS_THEY_ARE, *step.TRANSFORMERS)
    ),
    Target(
        f"{step.SUBJECT}: compiled timm over ours", 1.3, False, "x", step_over_ours(step.COMPILED, step.TIMM_COMPILED)
    ),
    Target(
        f"{step.SUBJECT}: compiled transformers over ours",
        1.3,
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
        found.append({"target": target.what, "wanted": bound, "value": value, "unit": target.unit, "verdict": verdict})
    return found
