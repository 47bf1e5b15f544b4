"""A profile as a table, as a sentence and as plain figures."""

from dataclasses import dataclass
from typing import Any

from ..bottleneck import bottleneck, is_crowded, processors, queued
from ..timeline import Part, Phase
from .measure import Profile

OF_MODEL = {
    Part.EMBED: "embed",
    Part.ATTENTION: "attention",
    Part.MLP: "MLP",
    Part.NORMS: "norms, residuals",
    Part.HEAD: "head",
}
ALONE = {Phase.DATA: "waiting for pictures", Phase.TRANSFER: "to the device", Phase.TOKENIZER: "tokenizer"}
MEANING = {
    "waiting for pictures": "the loop asked for a batch that no data worker had ready",
    "to the device": "the batch goes to where the model is",
    "tokenizer": "the pictures' visual tokens, the targets",
    "embed": "pixels normalised, patches embedded, mask tokens, positions; dropped paths drawn, targets picked",
    "attention": "qkv, scores, softmax, values, projection, and the position bias",
    "MLP": "both linear maps and the GELU",
    "norms, residuals": "LayerScale, dropped paths, residual and LayerNorm in one; the masked rows of a residual",
    "head": "the linear map to the vocabulary and the loss",
    "optimizer": "norm of the gradient, clipping, AdamW",
    "communication": "collectives that DeepSpeed starts or waits for, wherever in the step",
    "rest": "what no mark names: DeepSpeed around the model, the loop",
}


@dataclass(frozen=True)
class Row:
    """One part of the step; seconds of a step, flops of a step where they are known."""

    name: str
    forward: float | None
    backward: float | None
    seconds: float
    flops: float | None = None

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.seconds if self.flops and self.seconds > 0 else None


def rows(profile: Profile) -> list[Row]:
    """The step in parts; their seconds add up to the step's."""
    seconds, known = dict(profile.seconds), dict(profile.flops)
    if profile.circumstances.tokens_ahead:
        known.pop(Phase.TOKENIZER)
    result = [
        Row(name, None, None, seconds.pop((phase, Part.OTHER), 0.0), known.get(phase)) for phase, name in ALONE.items()
    ]
    for part, name in OF_MODEL.items():
        forward, backward = (seconds.pop((phase, part), 0.0) for phase in (Phase.FORWARD, Phase.BACKWARD))
        result.append(Row(name, forward, backward, forward + backward, known.get(part)))
    result.append(Row("optimizer", None, None, seconds.pop((Phase.OPTIMIZER, Part.OTHER), 0.0)))
    exchanged = [seconds.pop(key) for key in list(seconds) if key[1] == Part.COMMUNICATION]
    result.append(Row("communication", None, None, sum(exchanged)))
    forward, backward = (seconds.get((phase, Part.OTHER), 0.0) for phase in (Phase.FORWARD, Phase.BACKWARD))
    result.append(Row("rest", forward, backward, sum(seconds.values())))
    return result


def table(profile: Profile) -> str:
    """The table, with what must be known to read it."""
    lines = [f"{'':<20}  forward  backward  together   share   {unit(profile)}"]
    for row in rows(profile):
        rate = "" if row.flops_per_s is None else f"{row.flops_per_s / scale(profile):.1f}"
        columns = [milliseconds(row.forward), milliseconds(row.backward), milliseconds(row.seconds)]
        share = row.seconds / profile.step_seconds
        lines.append(f"{row.name:<20} {columns[0]:>8}  {columns[1]:>8}  {columns[2]:>8}  {share:>6.1%}  {rate:>8}")
    total = f"{sum(profile.flops.values()) / profile.step_seconds / scale(profile):.1f}"
    lines.append(f"{'step':<20} {'':>8}  {'':>8}  {milliseconds(profile.step_seconds):>8}  {1:>6.1%}  {total:>8}")
    return "\n".join([*lines, *notes(profile)])


def notes(profile: Profile) -> list[str]:
    """How it was measured, and what the table cannot say."""
    marked, plain, product = profile.marked, profile.plain, profile.product_flops_per_s / scale(profile)
    result = [
        f"milliseconds of a step, mean of {marked.steps} with marks; {plain.steps} without, taken in turn with these, "
        f"took {milliseconds(plain.step_seconds)} each",
        f"marks cost a step {profile.overhead:+.1%} {'processor time' if profile.on_cpu else 'time'}; of that the "
        f"profiler's own {milliseconds(marking_seconds(profile))} ms are left out",
        f"a large product of matrices, in turn with the steps, reached {product:.1f} {unit(profile)}",
    ]
    if profile.circumstances.tokens_ahead:
        result.append(
            "tokens are made beside the steps (train.prefetch): their row is what a step waited for them, and other "
            "rows took longer for them"
        )
    if profile.on_cpu:
        result.append(f"the process had {processors(profile.pace, profile.circumstances)}")
        if is_crowded(profile.pace, profile.circumstances):
            result[-1] += f"; {queued(profile.pace)}, and alone it is faster than this"
    if profile.device_idle is not None:
        result.append(
            f"under the trace, which slows the host, the GPU had nothing to do {profile.device_idle:.0%} of the time"
        )
    return result


def sentence(profile: Profile) -> str:
    """What bounds the step and what to change."""
    parts = rows(profile)
    communication = next(row.seconds for row in parts if row.name == "communication") / profile.step_seconds
    largest = max((row for row in parts if row.name in OF_MODEL.values()), key=lambda row: row.seconds)
    detail = f" ({largest.name} {largest.seconds / profile.step_seconds:.0%}"
    if largest.flops_per_s is not None and not is_crowded(profile.pace, profile.circumstances):
        detail += f" at {largest.flops_per_s / profile.product_flops_per_s:.0%} of a large product's FLOP/s"
    return bottleneck(profile.pace, profile.circumstances, communication, f"{detail})")


def figures(profile: Profile) -> dict[str, Any]:
    """Everything as plain values: seconds, FLOPs and shares of a step."""
    return {
        "sentence": sentence(profile),
        "step_seconds": profile.step_seconds,
        "plain_step_seconds": profile.plain.step_seconds,
        "steps": profile.marked.steps,
        "pictures_per_s": profile.pace.per_s,
        "made_per_s": profile.pace.made_per_s(profile.circumstances.workers),
        "product_flops_per_s": profile.product_flops_per_s,
        "device_idle": profile.device_idle,
        "parts": [
            {
                "name": row.name,
                "forward": row.forward,
                "backward": row.backward,
                "seconds": row.seconds,
                "flops": row.flops,
            }
            for row in rows(profile)
        ],
        "facts": dict(profile.facts),
    }


def marking_seconds(profile: Profile) -> float:
    own = sum(value for key, value in profile.marked.seconds.items() if key[1] == Part.MARKING)
    return own / profile.marked.steps


def scale(profile: Profile) -> float:
    return 1e9 if profile.on_cpu else 1e12


def unit(profile: Profile) -> str:
    return "GFLOP/s" if profile.on_cpu else "TFLOP/s"


def milliseconds(seconds: float | None) -> str:
    """Three digits or more: 0.42, 4.21, 42.1, 421, 4210."""
    if seconds is None:
        return ""
    value = 1000 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
