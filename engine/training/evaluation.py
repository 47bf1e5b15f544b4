"""Held-out loss and accuracy beside what knowing the token frequencies alone would give, and pictures filled in."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.loading import Batch
from ..models.mim import MaskedImageModel
from ..tokenizer.dvae import DiscreteVAE
from .report import PictureRow, mask_picture
from .zero import ZeroEngine, reduce_sum


@dataclass(frozen=True)
class Evaluation:
    """Figures over the masked patches of held-out pictures; losses in nats."""

    loss: float
    accuracy: float
    token_entropy: float
    """Entropy of the token frequencies: the loss of a model that knows nothing else."""
    commonest_share: float
    """Share of the commonest token: the accuracy of always guessing it."""
    codes_used: int
    """Codes that occur at all."""
    pictures: int


def tokens_of(engine: ZeroEngine, tokenizer: DiscreteVAE, batch: Batch) -> Tensor:
    """Token ids, int64 `[B, P]`, of a batch's token views, made in the precision of training."""
    with engine.autocast():
        return tokenizer.encode(batch.token_view)


@contextmanager
def evaluating(engine: ZeroEngine) -> Iterator[None]:
    """No gradients, no dropped paths, the precision of training.

    Compiled blocks run as they are written: they are compiled for the shapes of training, and these are others.
    """
    eager = torch.compiler.set_stance("force_eager") if engine.compiled else nullcontext()
    engine.module.eval()
    try:
        with torch.no_grad(), engine.autocast(), eager:
            yield
    finally:
        engine.module.train()


def evaluate(engine: ZeroEngine, tokenizer: DiscreteVAE, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate on all ranks together; every rank passes its own, equally many, batches."""
    device = engine.runtime.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, accuracy, pictures
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.float64, device=device)
    with evaluating(engine):
        for batch in batches:
            batch = batch.to(device)
            token_ids = tokens_of(engine, tokenizer, batch)
            loss, accuracy = engine.module(batch.patch_view, batch.masked_positions, token_ids)
            size = batch.patch_view.shape[0]
            sums += torch.stack([loss * size, accuracy * size, loss.new_tensor(size)]).double()
            targets = token_ids.gather(1, batch.masked_positions.clamp(min=0))
            counts += torch.bincount(
                targets.flatten(), (batch.masked_positions >= 0).flatten().double(), minlength=tokenizer.vocab_size
            )
    loss_sum, accuracy_sum, pictures = reduce_sum(sums).tolist()
    shares = reduce_sum(counts).cpu() / counts.sum().cpu().clamp(min=1)
    pictures = max(pictures, 1)
    return Evaluation(
        loss=loss_sum / pictures,
        accuracy=accuracy_sum / pictures,
        token_entropy=float((shares * -shares.clamp(min=1e-30).log()).sum()),
        commonest_share=float(shares.max()),
        codes_used=int((shares > 0).sum()),
        pictures=int(pictures),
    )


def fill_pictures(engine: ZeroEngine, tokenizer: DiscreteVAE, batch: Batch) -> list[PictureRow]:
    """Pictures as given, masked, as the tokenizer reconstructs them, and with the masked tokens filled in."""
    model = engine.module
    assert isinstance(model, MaskedImageModel)
    batch = batch.to(engine.runtime.device)
    token_ids = tokens_of(engine, tokenizer, batch)
    with evaluating(engine):
        guesses = model.logits(batch.patch_view, batch.masked_positions).argmax(-1)
    grid = math.isqrt(token_ids.shape[1])
    masked = batch.masked_positions
    spare = torch.nn.functional.pad(token_ids, (0, 1))  # a last column for the padding slots to write to
    filled_ids = spare.scatter(1, torch.where(masked >= 0, masked, grid * grid), guesses)[:, :-1]
    given = to_pictures(batch.patch_view)
    if tokenizer.has_decoder:
        reconstructed = to_pictures(tokenizer.decode(token_ids.unflatten(1, (grid, grid))) * 255)
        filled = to_pictures(tokenizer.decode(filled_ids.unflatten(1, (grid, grid))) * 255)
    right = (filled_ids == token_ids).gather(1, masked.clamp(min=0)) & (masked >= 0)
    rows = []
    for i, picture in enumerate(given):
        positions = [position for position in masked[i].tolist() if position >= 0]
        patch_size = picture.shape[0] // grid
        rows.append(
            PictureRow(
                given=picture,
                masked=mask_picture(picture, positions, patch_size),
                reconstructed=reconstructed[i] if tokenizer.has_decoder else None,
                filled=filled[i] if tokenizer.has_decoder else None,
                masked_positions=positions,
                patch_size=patch_size,
                tokens_right=int(right[i].sum()),
            )
        )
    return rows


def to_pictures(pixels_BCHW: Tensor) -> list[np.ndarray]:
    """Pixels in 0..255 as a list of uint8 `[H, W, 3]` arrays."""
    return list(pixels_BCHW.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
