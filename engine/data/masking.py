"""Block-wise masking (BEiT, arXiv 2106.08254, algorithm 1), with the attempts of the published generator.

A mask is one big integer, a bit for each patch, row by row: a block is a shifted constant, and the patches it adds are
counted in one operation.

Shapes: B pictures, M masked patches, G patches along one side of the grid.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..config import MaskSettings
from .seeding import uniforms

PADDING = -1

Attempt = tuple[float, float, float, float]

_ATTEMPTS = 10  # in a row to place one block, before masking ends
_MAX_ASPECT = 1 / 0.3  # height / width of a block is log-uniform in [0.3, 1/0.3]
_CHUNK = 24  # attempts whose numbers are drawn together
_EMPTY_ATTEMPTS = 200  # to place a first block, before one random patch is masked instead
_FILL = 1 << 32  # key that keeps the numbers of the top-up apart from those of the blocks


def sample_masks(grid: int, settings: MaskSettings, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Masked positions, int64 `[B, M]`: patches 0 .. grid^2 - 1, row by row, ascending; `PADDING` (-1) last.

    grid:  patches along one side
    seeds: uint64 `[B]`; a mask depends on its own seed alone

    With `settings.exact` blocks are topped up with random patches to exactly M, as BEiT v2 does; without it the blocks
    of BEiT v1 stay as they are, at most M. Blocks alone may mask nothing at all (for M = 1 mostly), and a mean over no
    patch is not a number: until the first block is placed, attempts go on.
    """
    count = settings.num_patches
    if not 1 <= count <= grid * grid:
        raise ValueError(f"num_patches must be in 1 .. {grid * grid}; got {count}")
    seeds = np.asarray(seeds, dtype=np.uint64)
    size = (grid * grid + 7) // 8
    place = functools.partial(_blocks, grid, count, settings.min_block, settings.max_block or count)
    attempts = (zip(*numbers, strict=True) for numbers in zip(*_draw(seeds, 0), strict=True))
    packed = b"".join([place(*each).to_bytes(size, "little") for each in zip(attempts, seeds, strict=True)])
    bytes_BS = np.frombuffer(packed, dtype=np.uint8).reshape(len(seeds), size)
    masked_BP = np.unpackbits(bytes_BS, axis=1, count=grid * grid, bitorder="little").astype(bool)
    masked_B = masked_BP.sum(1)
    short = np.flatnonzero(masked_B < (count if settings.exact else 1))
    if len(short):
        _top_up(masked_BP, short, count if settings.exact else 1, seeds)
        masked_B = masked_BP.sum(1)
    positions_BM = np.full((len(seeds), count), PADDING, dtype=np.int64)
    rows, columns = np.nonzero(masked_BP)
    starts_B = np.cumsum(masked_B) - masked_B
    positions_BM[rows, np.arange(len(rows)) - starts_B[rows]] = columns
    return positions_BM


def _blocks(grid: int, count: int, low: int, high: int, attempts: Iterable[Attempt], seed: np.uint64) -> int:
    """The bits of blocks drawn until `count` patches are masked or no block could be placed in ten attempts.

    low, high: smallest and largest block, in patches
    attempts:  numbers of the first `_CHUNK` attempts; more are drawn from the seed
    """
    shapes = _shapes(grid)
    mask = masked = failed = 0
    chunk = 0
    budget = min(count, high)
    spread = budget - low  # negative once fewer patches are left than the smallest block has; published so
    while True:
        for area_share, root_aspect, top_share, left_share in attempts:
            side = math.sqrt(low + spread * area_share)
            height, width = round(side * root_aspect), round(side / root_aspect)
            if 0 < height < grid and 0 < width < grid:
                top, left = int(top_share * (grid - height + 1)), int(left_share * (grid - width + 1))
                block = shapes[height][width] << (top * grid + left)
                added = (block & ~mask).bit_count()
                if 0 < added <= budget:
                    mask |= block
                    masked += added
                    if masked >= count:
                        return mask
                    budget = min(count - masked, high)
                    spread = budget - low
                    failed = 0
                    continue
            failed += 1
            if failed >= (_ATTEMPTS if masked else _EMPTY_ATTEMPTS):
                return mask
        chunk += 1
        attempts = zip(*(numbers[0] for numbers in _draw(np.array([seed]), chunk)), strict=True)


def _draw(seeds: NDArray[np.uint64], chunk: int) -> list[list[list[float]]]:
    """Numbers of `_CHUNK` attempts for each seed: area shares, roots of the aspect ratio, top shares, left shares."""
    drawn_4BK = uniforms(seeds, chunk, count=4 * _CHUNK).reshape(len(seeds), 4, _CHUNK).swapaxes(0, 1)
    drawn_4BK[1] = np.exp((drawn_4BK[1] - 0.5) * math.log(_MAX_ASPECT))
    return drawn_4BK.tolist()


@functools.lru_cache(maxsize=8)
def _shapes(grid: int) -> list[list[int]]:
    """`[height][width]` -> the bits of a block in the top left corner."""
    columns = [sum(1 << (row * grid) for row in range(height)) for height in range(grid)]
    return [[column * ((1 << width) - 1) for width in range(grid)] for column in columns]


def _top_up(masked_BP: NDArray[np.bool_], rows: NDArray[np.int64], count: int, seeds: NDArray[np.uint64]) -> None:
    """Mask random further patches in these rows, in place, so that each has `count`."""
    order_RP = uniforms(seeds[rows], _FILL, count=masked_BP.shape[1])
    order_RP[masked_BP[rows]] = -1.0  # what is masked comes first and stays
    chosen_RM = np.argsort(order_RP, axis=1)[:, :count]
    masked_BP[rows[:, None], chosen_RM] = True
