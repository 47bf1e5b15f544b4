"""Batches: what step s trains on is a function of the seed and s, for any number of ranks, workers and passes.

Epoch e visits the pictures in a permutation f(seed, e). Step s takes the next `global_batch` positions of it, ranks
take equal slices of those, and passes of accumulation equal slices of a rank's. A worker makes a whole batch from its
number alone, so a run is entered at any step at once.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..config import DataSettings, MaskSettings
from ..errors import UserError
from .masking import sample_masks
from .seeding import Purpose, hash64, hash64_array, permuted, uniforms
from .source import BadPicture, Source
from .views import NUM_UNIFORMS, TwoViews
from .workers import iterate

_REPLACEMENTS = 20  # other pictures tried in place of a bad one
_MIN_READS = 100  # before a share of bad pictures is judged
_STANDARD_ERRORS = 4.0  # by which it must be above the allowed share
_PROBES = 32  # pictures tried before a run


class BadFile(NamedTuple):
    """A picture that could not be read and was replaced."""

    name: str
    reason: str


class Making(NamedTuple):
    """What it took to make a batch."""

    worker: int
    """Number of the data worker that made it, from 0; 0 also where the training process makes its own."""
    seconds: float
    """From the first read to the last mask."""
    processor_seconds: float
    """The part of them in which a processor worked on it; for the rest, it waited: for storage or for a processor."""


class Batch(NamedTuple):
    """B pictures as the model takes them: P of S x S pixels, T the side of the token view, M masked patches."""

    patch_view: Tensor
    """uint8 `[B, 3, S, S]`"""
    token_view: Tensor
    """uint8 `[B, 3, T, T]`, the same crops"""
    masked_positions: Tensor
    """int64 `[B, M]`, ascending, -1 last as padding"""
    sample_ids: Tensor
    """int64 `[B]`: place in the whole training stream, epoch x pictures + position"""
    bad: list[BadFile]
    """Pictures that could not be read, whose places others took."""
    making: Making

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on a device."""
        patch_view, token_view, masked_positions, sample_ids = (
            tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors
        )
        return Batch(patch_view, token_view, masked_positions, sample_ids, self.bad, self.making)


class _Batches(Dataset[Batch | str]):
    """Batches by number; where no readable picture is found, a sentence that says so."""

    def __init__(
        self, source: Source, data: DataSettings, mask: MaskSettings, grid: int, token_size: int, seed: int
    ) -> None:
        self.source = source
        self.mask = mask
        self.grid = grid
        self.seed = seed
        self.views = TwoViews(data, token_size)

    def make(self, indices: NDArray[np.int64], sample_ids: NDArray[np.int64], epoch: int | None) -> Batch | str:
        """The batch of these pictures; an epoch of None: centred crops, and masks that depend on the picture alone."""
        began, processor_began = time.perf_counter(), time.thread_time()
        numbers = None
        if epoch is not None:
            numbers = uniforms(self.seed, epoch, indices, int(Purpose.VIEW), count=NUM_UNIFORMS)
        stream = -1 if epoch is None else epoch
        bad: list[BadFile] = []
        patch_views, token_views = [], []
        for row, index in enumerate(indices.tolist()):
            views = self._views(index, stream, None if numbers is None else numbers[row], bad)
            if isinstance(views, str):
                return views
            patch_views.append(views[0])
            token_views.append(views[1])
        masks = sample_masks(self.grid, self.mask, hash64_array(self.seed, stream, indices, int(Purpose.MASK)))
        worker = get_worker_info()
        return Batch(
            patch_view=_channels_first(patch_views),
            token_view=_channels_first(token_views),
            masked_positions=torch.from_numpy(masks),
            sample_ids=torch.from_numpy(sample_ids),
            bad=bad,
            making=Making(
                0 if worker is None else worker.id,
                time.perf_counter() - began,
                time.thread_time() - processor_began,
            ),
        )

    def _views(
        self, index: int, stream: int, numbers: NDArray[np.float64] | None, bad: list[BadFile]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | str:
        tried = index
        for attempt in range(_REPLACEMENTS + 1):
            try:
                return self.views(self.source, tried, numbers)
            except BadPicture as error:
                bad.append(BadFile(self.source.name(tried), error.reason))
            tried = hash64(self.seed, stream, index, int(Purpose.REPLACEMENT), attempt) % len(self.source)
        return (
            f"{_REPLACEMENTS + 1} pictures drawn one after the other could not be read, last {bad[-1].name}: "
            f"{bad[-1].reason}; check that the pictures are complete and can be reached."
        )


class _TrainBatches(_Batches):
    """Micro-batch k of a rank: pass k % accumulation of step start_step + k // accumulation."""

    def __init__(
        self, *args: object, global_batch: int, micro_batch: int, rank: int, world_size: int, steps: range
    ) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.first = rank * (global_batch // world_size)
        self.accumulation = global_batch // world_size // micro_batch
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __getitem__(self, number: int) -> Batch | str:
        step = self.steps[number // self.accumulation]
        size = len(self.source)
        epoch, step_of_epoch = divmod(step, size // self.global_batch)
        start = step_of_epoch * self.global_batch + self.first + number % self.accumulation * self.micro_batch
        positions = np.arange(start, start + self.micro_batch)
        indices = permuted(positions, size, self.seed, epoch, int(Purpose.ORDER))
        return self.make(indices, epoch * size + positions, epoch)


class _ValBatches(_Batches):
    """Batch k of a rank's share of the held-out pictures."""

    def __init__(self, *args: object, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        size = len(self.source)
        each = max(1, size // world_size) if size else 0
        self.indices = (np.arange(each) + rank * each) % max(1, size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, number: int) -> Batch | str:
        indices = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        return self.make(indices, indices.copy(), None)


def train_loader(
    source: Source,
    data: DataSettings,
    mask: MaskSettings,
    grid: int,
    token_size: int,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    start_step: int = 0,
    num_steps: int,
) -> Generator[Batch]:
    """Micro-batches of this rank for steps `start_step` .. `num_steps` - 1, those of one step after each other.

    grid:         patches along one side of the patch view
    token_size:   side of the token view, in pixels
    global_batch: pictures in a step over all ranks; a multiple of world_size x micro_batch
    num_steps:    steps of the whole run, those before `start_step` included

    The last pictures of an epoch that do not fill a step are left out of that epoch. The workers start with the first
    batch that is asked for, and end with the iterator.

    Raises:
        UserError:    where there are too few pictures, or sizes do not divide; while iterating, where no readable
                      picture is found
        RuntimeError: while iterating, where a worker ends or does not answer within `data.timeout` seconds
    """
    if len(source) < global_batch:
        raise UserError(
            f"there are {len(source)} pictures to train on, fewer than the {global_batch} of one optimizer step; "
            f"set train.global_batch to {len(source)} or less, or give more pictures."
        )
    if global_batch % (world_size * micro_batch):
        raise UserError(
            f"train.global_batch = {global_batch} is not a multiple of {world_size} ranks x "
            f"train.micro_batch = {micro_batch}; change one of them."
        )
    batches = _TrainBatches(
        source,
        data,
        mask,
        grid,
        token_size,
        seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        steps=range(start_step, num_steps),
    )
    return _checked(iterate(batches, len(batches), data.workers, data.timeout))


def val_batches(
    source: Source,
    data: DataSettings,
    mask: MaskSettings,
    grid: int,
    token_size: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
) -> Iterator[Batch]:
    """This rank's held-out pictures: centred crops, masks from hash(seed, index), `sample_ids` the index.

    Every rank gets equally many pictures and batches, for a sharded model runs only where all ranks do: the last
    `len(source) % world_size` pictures are left out; fewer pictures than ranks are used more than once.
    """
    batches = _ValBatches(
        source, data, mask, grid, token_size, seed, batch_size=batch_size, rank=rank, world_size=world_size
    )
    return _checked(iterate(batches, len(batches), data.workers, data.timeout))


class BadPictureLog:
    """Counts the pictures that could not be read, and stops a run that has too many.

    Too many is a share of all reads above `max_share` by four standard errors, judged from 100 reads on: one bad
    picture among the first four stops nothing, and a share just below the limit is not stopped by bad luck. With a
    `max_share` of 0 the first bad picture stops the run.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.reads = 0
        """Pictures read or tried."""
        self.bad_reads = 0
        """Those of them that failed; a bad picture counts again in each epoch."""
        self.reasons: dict[str, str] = {}
        """Name of each bad picture -> why it cannot be read, in the order found."""

    @property
    def count(self) -> int:
        """Bad pictures, each counted once."""
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        """Names of the bad pictures, in the order found."""
        return list(self.reasons)

    def add(self, batch: Batch) -> None:
        """Take a batch into account.

        Raises:
            UserError: where there are now too many bad pictures
        """
        self.reads += len(batch.sample_ids) + len(batch.bad)
        self.bad_reads += len(batch.bad)
        self.reasons |= {bad.name: bad.reason for bad in batch.bad}
        share = self.max_share
        by_chance = _STANDARD_ERRORS * math.sqrt(share * (1 - share) * self.reads)
        if (self.reads >= _MIN_READS or share == 0) and self.bad_reads > share * self.reads + by_chance:
            name, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{self.bad_reads} of {self.reads} pictures read could not be decoded, more than "
                f"data.max_bad_share = {share} allows; the first was {name}: {reason}. "
                f"Mend or remove them, or raise data.max_bad_share."
            )


def check_readable(source: Source) -> None:
    """Try pictures spread over the source until one can be read.

    Raises:
        UserError: where none of up to 32 can, with what is wrong with the first
    """
    if not len(source):
        raise UserError("there are no pictures; give at least one.")
    failures: list[BadFile] = []
    for index in np.unique(np.linspace(0, len(source) - 1, _PROBES).round().astype(np.int64)).tolist():
        try:
            source.load(index, lambda width, height: (1, 1))
            return
        except BadPicture as error:
            failures.append(BadFile(source.name(index), error.reason))
    raise UserError(
        f"none of {len(failures)} pictures tried can be read; the first, {failures[0].name}: {failures[0].reason}. "
        f"Give a folder of whole pictures."
    )


def _checked(batches: Generator[Batch | str]) -> Generator[Batch]:
    with contextlib.closing(batches):
        for batch in batches:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch


def _channels_first(views_HWC: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 `[B, 3, S, S]` from `[S, S, 3]` each."""
    side = views_HWC[0].shape[0]
    batch_BCHW = np.empty((len(views_HWC), 3, side, side), dtype=np.uint8)
    for row_CHW, view_HWC in zip(batch_BCHW, views_HWC, strict=True):
        row_CHW[:] = view_HWC.transpose(2, 0, 1)
    return torch.from_numpy(batch_BCHW)
