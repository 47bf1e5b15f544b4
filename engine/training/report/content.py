"""What a report is about: plain values, no torch, nothing of the engine. Every value may be missing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class PictureRow:
    """One held-out example in the four stages; all pictures uint8 [H, W, 3], red, green, blue."""

    given: Pixels
    """The patch view before normalisation."""
    masked: Pixels
    """The same with the hidden patches covered, see `mask_picture`."""
    reconstructed: Pixels | None = None
    """The tokenizer's own tokens decoded; none: the tokenizer has no decoder."""
    filled: Pixels | None = None
    """Visible tokens from the tokenizer, hidden ones from the model, decoded; none as above."""
    masked_positions: Sequence[int] = ()
    """Hidden patches, row by row in the patch grid; they are outlined in the last stage. -1 is padding."""
    patch_size: int | None = None
    """Side of a patch in pixels of `given`; none: no outline."""
    tokens_right: int | None = None
    """Hidden tokens whose code the model named exactly."""


@dataclass(frozen=True)
class Report:
    """A finished run. Shares lie in 0..1, losses and entropies are in nats, times in seconds."""

    title: str
    """Name of the run, for instance its output folder."""
    subject: str = "pictures"
    """What the pictures show, as it stands in a sentence: "handwritten digits"."""
    model: str = "BEiT"
    """Name of the method, first word of the headline."""
    finished: str = ""
    """Date and time of the end, as it is to be shown."""

    history: Sequence[Mapping[str, Any]] = ()
    """Rows of `metrics.jsonl`. Training rows: step, loss, mlm_acc (share), lr, grad_norm, images_per_s, data_wait
    (share of the time); held-out rows: step, val_loss, val_mlm_acc. Of several rows of a step the last counts."""
    token_entropy: float | None = None
    """Entropy of the token frequencies: the loss of a model that knows only how frequent each token is."""
    commonest_share: float | None = None
    """Share of the commonest token: the accuracy of always guessing it."""
    val_loss: float | None = None
    """Final held-out loss; none: taken from the history's last held-out row."""
    val_mlm_acc: float | None = None
    """Final held-out accuracy over the hidden tokens; none: as above."""
    val_pictures: int | None = None
    """Number of held-out pictures evaluated."""
    steps: int | None = None
    """Optimizer steps; none: the history's last step."""
    images_seen: int | None = None
    """Pictures trained on, repetitions counted."""
    duration: float | None = None
    """Seconds from the first step to the end."""
    bottleneck: str = ""
    """What bound the speed and what to change, a sentence."""
    skipped_steps: int = 0
    """Steps skipped because a gradient was not finite."""

    pictures: Sequence[PictureRow] = ()
    """Held-out examples; eight fill a line well."""
    bad_pictures: Sequence[str] = ()
    """Pictures that could not be decoded, as "name: reason"; a part of them is enough."""
    bad_count: int = 0
    """How many there were."""

    settings_result: Mapping[str, Any] = field(default_factory=dict)
    """Settings that change the result, as {"section.field": value}."""
    settings_speed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that change only speed and comfort, likewise."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Label to value: device, processor, memory, versions, implementations and why, git commit."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Label to value: codes, codes in use, reconstruction error, where it came from."""
    notes: Sequence[str] = ()
    """Sentences the reader must not miss, shown under the headline."""

    checkpoint: str = ""
    """Where the weights are."""
    next_command: str = ""
    """A line to type next."""
    next_purpose: str = ""
    """What that line does, a short sentence."""

    def __post_init__(self) -> None:
        held_out = last_values(self.history, ("val_loss", "val_mlm_acc"))
        for name, value in held_out.items():
            if number(getattr(self, name)) is None:
                object.__setattr__(self, name, value)
        if self.steps is None:
            steps = [step for row in self.history if (step := number(row.get("step"))) is not None]
            object.__setattr__(self, "steps", int(max(steps)) if steps else None)


def number(value: Any) -> float | None:
    """A finite float, or none for anything that is not one: missing, NaN, infinite, a word."""
    if value is None or isinstance(value, bool | str):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def last_values(history: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """The last finite value of each name, none where there is no such value."""
    found: dict[str, float | None] = dict.fromkeys(names)
    for row in history:
        for name in names:
            if (value := number(row.get(name))) is not None:
                found[name] = value
    return found


def curve(history: Iterable[Mapping[str, Any]], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one quantity, float64 [n] each, by step.

    Rows that have the name but no finite value give NaN. A resumed run repeats the steps since its checkpoint, so of
    several rows of a step the last counts.
    """
    values: dict[float, float] = {}
    for row in history:
        if name in row and (step := number(row.get("step"))) is not None:
            value = number(row[name])
            values[step] = np.nan if value is None else value
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)
