"""Dead codes are given new work, so that a small codebook trained from scratch does not collapse.

Without it a few codes win early, and one that is never the likeliest gets hardly a gradient. A dead code takes over a
part of a living one: a cell of a picture is drawn in proportion to its reconstruction error, the cell's code becomes
the dead code's parent, and the dead code starts as the parent's copy, pushed towards that cell. So codes go where
pictures are rebuilt badly, never to a flat background, which would split one thing into many names.

The push is no stronger than the spread of the parent's cells asks for. A cell hard by their mean would otherwise make
a slope so steep that the new code wins cells far away, and the reconstruction is lost for tens of steps.

Shapes: R cells of a batch, V codes, D channels before the encoder's last layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from .dvae import DiscreteVAE

DEAD_SHARE = 0.01
"""A code is dead that was used less than this share of an even use."""
MARGIN = 1.0
"""Logits by which a revived code beats its parent at its cell, and its parent beats it at the parent's mean; less where
the cell is nearer to that mean than the parent's cells are on average."""


@torch.no_grad()
def revive(
    model: DiscreteVAE,
    optimizer: Optimizer,
    *,
    counts_V: Tensor,
    hidden_RD: Tensor,
    ids_R: Tensor,
    error_R: Tensor,
    generator: torch.Generator,
) -> None:
    """Give the codes that are dead by `counts_V` new weights, in place; the host does not wait for the device.

    counts_V:  int64, uses of each code of late
    hidden_RD: fp32, what the encoder's last layer read in the last batch
    ids_R:     int64, the likeliest code of each cell
    error_R:   fp32, reconstruction error of each cell
    """
    assert model.decoder is not None
    dead_V = counts_V < DEAD_SHARE * counts_V.sum() / model.vocab_size
    # Gumbel's trick: the largest of log weight + noise are a draw without replacement, in proportion to the weights.
    noise_R = -torch.empty_like(error_R).exponential_(generator=generator).log()
    drawn = (error_R.clamp(min=1e-12).log() + noise_R).topk(min(model.vocab_size, error_R.numel())).indices
    cell_V = drawn[(dead_V.cumsum(0) - 1).clamp(0, drawn.numel() - 1)]
    parent_V = ids_R[cell_V]

    uses_VR = F.one_hot(ids_R, model.vocab_size).to(hidden_RD.dtype).T
    mean_VD = uses_VR @ hidden_RD / uses_VR.sum(1, keepdim=True).clamp(min=1)
    away_VD = hidden_RD[cell_V] - mean_VD[parent_V]
    distance_R = (hidden_RD - mean_VD[ids_R]).square().sum(1)
    spread_V = (uses_VR @ distance_R) / uses_VR.sum(1).clamp(min=1)
    reach_V = torch.maximum(away_VD.square().sum(1), spread_V[parent_V]).clamp(min=1e-6)
    push_VD = 2 * MARGIN * away_VD / reach_V[:, None]
    middle_VD = (hidden_RD[cell_V] + mean_VD[parent_V]) / 2

    last, first = model.encoder.output, model.decoder.input
    assert last.bias is not None
    for parameter, dim in ((last.weight, 0), (last.bias, 0), (first.weight, 1)):
        inherit(parameter, dim, dead_V, parent_V)
        for moment in ("exp_avg", "exp_avg_sq"):
            inherit(optimizer.state[parameter][moment], dim, dead_V, parent_V)
    last.weight += (push_VD * dead_V[:, None])[:, :, None, None]
    last.bias -= (push_VD * middle_VD).sum(1) * dead_V


def inherit(values: Tensor, dim: int, dead_V: Tensor, parent_V: Tensor) -> None:
    """Replace the dead codes' slices along `dim` by their parents', in place."""
    shape = [-1 if axis == dim else 1 for axis in range(values.ndim)]
    values.copy_(torch.where(dead_V.view(shape), values.index_select(dim, parent_V), values))
