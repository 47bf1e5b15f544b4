"""The launches of this operator that the report compiles ahead of time: bf16 at BEiT's vocabulary and larger ones."""

from collections.abc import Iterator
from functools import partial

import torch

from .._triton.ahead_of_time import Case
from .._triton.descriptors import padded_length
from .launch import launch_loss, launch_scale

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
VOCABULARIES = (8192, 16384, 1000)
MEAN, NONE, LOSS = "mean", "none", "loss"
"""The loss with the gradient of a mean; the gradient with a factor for each row; the loss alone."""


def cases() -> Iterator[Case]:
    for arch in ARCHS:
        for vocab_size in VOCABULARIES:
            for what in (MEAN, NONE, LOSS):
                yield Case(arch, f"V={vocab_size} {what}", "in order", partial(launch_all, vocab_size, what))


def launch_all(vocab_size: int, what: str, label_smoothing: float = 0.0) -> None:
    """4096 rows, and the scaling of a weight's gradient, on tensors that hold nothing."""
    empty = partial(torch.empty, device="meta")
    rows = empty(4096)
    logits = empty(4096, padded_length(vocab_size), dtype=torch.bfloat16)[:, :vocab_size]
    targets = empty(4096, dtype=torch.int64)
    loss, scale = (None, rows) if what == NONE else (rows, None)
    launch_loss(logits, targets, loss, loss, scale, label_smoothing, -100, has_grad=what != LOSS)
    if what == MEAN:
        launch_scale(empty(vocab_size, 768), empty(()), empty((), dtype=torch.int64), empty(vocab_size, 768))
