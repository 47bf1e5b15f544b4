"""The frozen tokenizer that is timed, alone and as a part of a step, and how the ids that it gives are checked.

B pictures, T side of a token view, G = T / stride tokens a side, V codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_beit.engine.tokenizer.dvae import DiscreteVAE


@dataclass(frozen=True)
class TokenizerShape:
    """A tokenizer and the side of its pictures."""

    side: int
    vocab_size: int
    width: int
    groups: int
    blocks_per_group: int


DALL_E = TokenizerShape(side=112, vocab_size=8192, width=256, groups=4, blocks_per_group=2)
SMALL = TokenizerShape(side=32, vocab_size=64, width=16, groups=3, blocks_per_group=1)


def build_tokenizer(shape: TokenizerShape, device: torch.device) -> DiscreteVAE:
    """With random weights, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DiscreteVAE(shape.vocab_size, shape.width, shape.groups, shape.blocks_per_group, output_channels=0)
    return made.to(device).eval().requires_grad_(False)


def random_views(shape: TokenizerShape, batch: int, device: torch.device) -> Tensor:
    """uint8 [B, 3, T, T]"""
    size = (batch, 3, shape.side, shape.side)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)


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
