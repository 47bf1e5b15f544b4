"""How good a tokenizer is on held-out pictures: what it loses, and how it uses its codes."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dvae import DiscreteVAE


class CodeUse:
    """Counts codes on the device; the host waits only when a figure is asked for.

    counts_V: int64 `[V]`
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.counts_V = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def add(self, ids: Tensor) -> None:
        """Count token ids, int64, of any shape."""
        ids = ids.flatten()
        self.counts_V.index_add_(0, ids, torch.ones_like(ids))

    def clear(self) -> None:
        self.counts_V.zero_()

    def used(self) -> int:
        """Codes that occur."""
        return int((self.counts_V > 0).sum())

    def shares(self) -> Tensor:
        """Frequencies, float64 `[V]` on the CPU; zeros before anything is counted."""
        counts = self.counts_V.cpu().double()
        return counts / counts.sum().clamp(min=1)

    def entropy(self) -> float:
        """Entropy of the frequencies, nats."""
        return float(torch.special.entr(self.shares()).sum())


@dataclass(frozen=True)
class Quality:
    """Figures of a tokenizer over a set of pictures."""

    pictures: int
    mse: float
    """Mean squared error of the reconstruction, pixels in [0, 1]; NaN without a decoder."""
    codes_used: int
    vocab_size: int
    entropy: float
    """Of the token frequencies, nats: the loss of a model that knows nothing else."""
    commonest_share: float
    """Share of the commonest token."""

    def __str__(self) -> str:
        return (
            f"on {self.pictures} held-out pictures: mean squared error {self.mse:.5f}, {self.codes_used} of "
            f"{self.vocab_size} codes used, token entropy {self.entropy:.2f} nats, commonest token "
            f"{self.commonest_share:.1%}"
        )


@torch.no_grad()
def measure(model: DiscreteVAE, batches: Iterable[Tensor]) -> Quality:
    """Encode and decode token views, uint8 `[B, 3, T, T]`, on the model's device."""
    device = next(model.parameters()).device
    use = CodeUse(model.vocab_size, device)
    squared, pictures = 0.0, 0
    for pixels in batches:
        pixels = pixels.to(device)
        ids = model.encode(pixels)
        use.add(ids)
        pictures += len(pixels)
        if model.has_decoder:
            rebuilt = model.decode(ids.view(len(pixels), pixels.shape[2] // model.stride, -1))
            squared += float((rebuilt - pixels / 255).square().mean(dim=(1, 2, 3)).sum())
    return Quality(
        pictures=pictures,
        mse=squared / max(pictures, 1) if model.has_decoder else float("nan"),
        codes_used=use.used(),
        vocab_size=model.vocab_size,
        entropy=use.entropy(),
        commonest_share=float(use.shares().max()),
    )


@torch.no_grad()
def sheet(model: DiscreteVAE, pixels: Tensor, columns: int = 8) -> NDArray[np.uint8]:
    """Pictures and, below each row of them, what their codes decode to, as one picture.

    pixels: uint8 `[B, 3, T, T]` -> uint8 `[rows * 2 * T, columns * T, 3]`; the last row is filled up with black
    """
    ids = model.encode(pixels.to(next(model.parameters()).device))
    rebuilt = model.decode(ids.view(len(pixels), pixels.shape[2] // model.stride, -1)).mul(255).round().byte().cpu()
    pairs = torch.stack([pixels.cpu(), rebuilt])
    missing = -len(pixels) % columns
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, 0, 0, missing))
    rows = pairs.unflatten(1, (-1, columns)).permute(1, 0, 4, 2, 5, 3)  # row, pair, y, column, x, channel
    return np.ascontiguousarray(rows.flatten(3, 4).flatten(0, 2).numpy())
