"""Which residual branches are dropped: a pure function of seed, sample, block and branch.

No random state is kept, so the draws do not depend on the number of ranks, on accumulation or on where a run resumed.

B pictures, L blocks; 2 branches a block (attention, MLP).
"""

import torch
from torch import Tensor

# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), section 4 and variant 13.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

DRAW_BITS = 24
"""Bits of a draw; rates are exact to 2^-24, and a draw is exact in fp32."""


def signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's keeps the sign of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix64(values: Tensor) -> Tensor:
    """SplitMix64's bijection of the 64-bit integers, in wrapping int64 arithmetic."""
    values = (values ^ shift_right(values, 30)) * signed(MIX_1)
    values = (values ^ shift_right(values, 27)) * signed(MIX_2)
    return values ^ shift_right(values, 31)


def keep_scales(sample_ids: Tensor, rates: Tensor, seed: int) -> Tensor:
    """DropPath's factor for every block, branch and picture (stochastic depth, arXiv:1603.09382, section 3).

    sample_ids: int64 [B]  place of each picture in the whole training stream
    rates:      [L]        probability, for each block, that a branch is dropped; on the device of sample_ids
    seed:       of the run
    ->          fp32 [L, 2, B]: 0 for a dropped branch, else 1 / (1 - rate); attention first, then MLP

    The branches of a block are drawn independently. Nothing waits for the device.
    Raises ValueError for other shapes, TypeError for sample_ids that are not int64.
    """
    if sample_ids.dim() != 1 or rates.dim() != 1:
        raise ValueError(
            f"keep_scales: expected sample_ids [B] and rates [L], but got {list(sample_ids.shape)} and "
            f"{list(rates.shape)}"
        )
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"keep_scales: expected int64 sample_ids, but got {sample_ids.dtype}")
    num_blocks = rates.shape[0]
    branches_L21 = torch.arange(2 * num_blocks, device=sample_ids.device).view(num_blocks, 2, 1)
    # Each key is mixed before the next comes in, so that neighbouring seeds and samples share no draws. The branch
    # comes in by xor: torch.compile would do sums and products of an arange without wrapping, and fail.
    hash_B = mix64(mix64(torch.full_like(sample_ids, signed(seed + GOLDEN))) + sample_ids + signed(GOLDEN))
    draws_L2B = shift_right(mix64(mix64(hash_B ^ branches_L21)), 64 - DRAW_BITS)
    rates_L11 = rates.float()[:, None, None]
    kept_L2B = draws_L2B.float() >= rates_L11 * (1 << DRAW_BITS)
    return kept_L2B / (1 - rates_L11)
