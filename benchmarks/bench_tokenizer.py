"""Token views to token ids: the forward pass of the frozen tokenizer, of DALL-E's size, that every step waits for.

Each provider must choose codes that are as good as the best in float64 up to twice the error of plain torch's scores in
the same precision; the share of ids that are the same ones stands in the JSON as `same_ids`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.flops import encoding_flops

from .rounds import quartiles, time_in_turn
from .spread import add_spread
from .timers import device_timer, memory
from .tokenizer import DALL_E, SMALL, build_tokenizer, check_ids, random_views, scores_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"smoke": SMALL, "full": DALL_E}
BATCHES = {"smoke": 2, "full": 64 if DEVICE.type == "cuda" else 1}


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and its way to the ids; timed by calling it."""

    encode: Callable[[Tensor], Tensor]
    """uint8 [B, 3, T, T] -> int64 [B, G*G]"""
    views: Tensor
    about: str

    def __call__(self) -> Tensor:
        return self.encode(self.views)


def fused_beit(tokenizer: DiscreteVAE, views: Tensor) -> Tokens:
    return Tokens(tokenizer.encode, views, "as the engine calls it: features with channels last, then nearest_code")


def plain_torch(tokenizer: DiscreteVAE, views: Tensor) -> Tokens:
    """As DALL-E's and BEiT's published code: all scores, then their argmax."""

    @torch.no_grad()
    def encode(views: Tensor) -> Tensor:
        return tokenizer.encoder(tokenizer.prepare(views)).argmax(dim=1).flatten(1)

    return Tokens(encode, views, "all scores [B, V, G, G], then argmax")


PROVIDERS = {"fused_beit": fused_beit, "plain torch": plain_torch}


def test_tokenizer(drive, keep, num_rounds, limits, sizes):
    shape, batch = SHAPES[sizes], BATCHES[sizes]
    tokenizer, views = build_tokenizer(shape, DEVICE), random_views(shape, batch, DEVICE)

    eager = scores_of(tokenizer, views)
    exact = scores_of(copy.deepcopy(tokenizer).double(), views)
    runs = {name: make(tokenizer, views) for name, make in PROVIDERS.items()}
    errors = {name: check_ids(name, run(), eager, exact) for name, run in runs.items()}
    del eager, exact

    flops = batch * sum(encoding_flops(tokenizer.encoder_size, shape.side))
    peaks = {name: memory(run, DEVICE) if DEVICE.type == "cuda" else {} for name, run in runs.items()}
    label = f"{batch} token views of {shape.side} x {shape.side}, {shape.vocab_size} codes, float32"
    rows = time_in_turn(
        label,
        runs,
        rounds=num_rounds(5 if DEVICE.type == "cuda" else 3),
        timer=device_timer(DEVICE, runs.values()),
        drive=drive,
    )
    add_spread(rows)
    for row in (row for row in rows if row.seconds):
        seconds = quartiles(row.seconds)[1]
        row.facts |= peaks[row.provider] | errors[row.provider] | {"about": runs[row.provider].about}
        row.facts |= {"pictures_per_s": batch / seconds, "gflop_per_s": flops / seconds / 1e9}
        if DEVICE.type == "cpu":  # there the limit was measured in fp32
            row.facts["share_of_limit"] = flops / seconds / limits["flops_per_s"]
    keep(rows)
