"""Token views to token ids: the forward pass of the frozen tokenizer, of DALL-E's size, that every step waits for.

Each provider must choose codes that are as good as the best in float64 up to twice the error of plain torch's scores in
the same precision; the share of ids that are the same ones stands in the JSON as `same_ids`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_beit.engine.tokenizer.dvae import DiscreteVAE
from fused_beit.engine.tokenizer.flops import encoding_flops

from .rounds import quartiles, time_in_turn
from .spread import add_spread
from .timers import device_timer, memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "smoke": {"batch": 2, "side": 32, "vocab_size": 64, "width": 16, "groups": 3, "blocks_per_group": 1},
    "full": {
        "batch": 64 if DEVICE.type == "cuda" else 1,
        "side": 112,
        "vocab_size": 8192,
        "width": 256,
        "groups": 4,
        "blocks_per_group": 2,
    },
}


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
    return Tokens(tokenizer.encode, views, "as the engine calls it: features, then nearest_code")


def channels_last(tokenizer: DiscreteVAE, views: Tensor) -> Tokens:
    """The same with weights and pixels in the memory format that convolutions of GPUs and of oneDNN prefer."""
    other = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
    as_they_come = views.to(memory_format=torch.channels_last)
    return Tokens(other.encode, as_they_come, "the same, weights and pixels in channels_last")


def plain_torch(tokenizer: DiscreteVAE, views: Tensor) -> Tokens:
    """As DALL-E's and BEiT's published code: all scores, then their argmax."""

    @torch.no_grad()
    def encode(views: Tensor) -> Tensor:
        return tokenizer.encoder(tokenizer.prepare(views)).argmax(dim=1).flatten(1)

    return Tokens(encode, views, "all scores [B, V, G, G], then argmax")


PROVIDERS = {"fused_beit": fused_beit, "fused_beit, channels last": channels_last, "plain torch": plain_torch}


def scores_of(tokenizer: DiscreteVAE, views: Tensor) -> Tensor:
    """[B, G*G, V]"""
    with torch.no_grad():
        return tokenizer.encoder(tokenizer.prepare(views)).flatten(2).transpose(1, 2)


def check_ids(name: str, ids: Tensor, eager: Tensor, exact: Tensor) -> dict[str, float]:
    """Assert that every id is of a code that is best up to rounding; scores [B, G*G, V] of plain torch and float64.

    A provider's scores are off by at most twice plain torch's error, by the house's rule, and two codes are compared.
    """
    assert ids.shape == exact.shape[:2], f"{name}: ids have shape {list(ids.shape)}"
    allowed = 4 * (eager.double() - exact).abs().max()
    best, wanted = exact.max(dim=-1)
    behind = (best - exact.gather(-1, ids[..., None]).squeeze(-1)).max()
    assert behind <= allowed, f"{name}: chose a code {behind:.2e} worse than the best; rounding is {allowed:.2e}"
    return {"same_ids": float((ids == wanted).double().mean())}


@pytest.fixture
def tokenizer(sizes) -> DiscreteVAE:
    size = {key: value for key, value in SIZES[sizes].items() if key not in ("batch", "side")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DiscreteVAE(**size, output_channels=0)
    return made.to(DEVICE).eval().requires_grad_(False)


def test_tokenizer(drive, keep, num_rounds, limits, sizes, tokenizer):
    batch, side = SIZES[sizes]["batch"], SIZES[sizes]["side"]
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=generator).to(DEVICE)

    eager = scores_of(tokenizer, views)
    exact = scores_of(copy.deepcopy(tokenizer).double(), views)
    runs = {name: make(tokenizer, views) for name, make in PROVIDERS.items()}
    errors = {name: check_ids(name, run(), eager, exact) for name, run in runs.items()}
    del eager, exact

    flops = batch * sum(encoding_flops(tokenizer.encoder_size, side))
    peaks = {name: memory(run, DEVICE) if DEVICE.type == "cuda" else {} for name, run in runs.items()}
    label = f"{batch} token views of {side} x {side}, {tokenizer.vocab_size} codes, float32"
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
