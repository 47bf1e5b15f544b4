"""Batches: the same for any number of workers, ranks and passes, and from any step on."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from fused_beit.engine.config import DataSettings, MaskSettings
from fused_beit.engine.data.digits import Digits
from fused_beit.engine.data.folder import ImageFolder, Subset
from fused_beit.engine.data.loading import Batch, train_loader, val_batches
from fused_beit.engine.data.source import Needed, Source
from fused_beit.engine.errors import UserError

DATA = DataSettings(image_size=32, min_scale=0.6, rotation=15.0, workers=0)
MASK = MaskSettings(num_patches=26, min_block=4)


# Sources that misbehave in a worker. A module of its own, for workers import what they are sent.
FAULTY_SOURCES = """
import os, signal, time
from fused_beit.engine.data.folder import Subset

class Stuck(Subset):
    def load(self, index, needed=None):
        if index == 5:
            time.sleep(3600)
        return super().load(index, needed)

class Deadly(Subset):
    def load(self, index, needed=None):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(index, needed)

sent = []

class Signalled(Subset):  # as by a scheduler that signals a whole group of processes
    def load(self, index, needed=None):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return super().load(index, needed)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of `FAULTY_SOURCES`."""
    (tmp_path / "faulty_sources.py").write_text(FAULTY_SOURCES)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("faulty_sources")
    del sys.modules["faulty_sources"]


@pytest.fixture
def photographs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of real photographs, where there is one."""
    path = Path(os.environ.get("FUSED_BEIT_PICTURES") or root.parent / "shared" / "data" / "clothing-224")
    if not path.is_dir():
        pytest.skip(f"no photographs in {path}; FUSED_BEIT_PICTURES names their folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def part(size: int, kind: type[Subset] = Subset) -> Subset:
    """The first digits."""
    return kind(Digits("train"), np.arange(size))


def loader(source: Source, *, data: DataSettings = DATA, **changes: object) -> Iterator[Batch]:
    arguments = {"global_batch": 12, "micro_batch": 12, "seed": 0, "num_steps": 6} | changes
    return train_loader(source, data, MASK, 8, 32, **arguments)  # type: ignore[arg-type]


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    """Each field of the batches, one after the other."""
    return [torch.cat([batch[field] for batch in batches]) for field in range(4)]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    for field, (a, b) in enumerate(zip(joined(got), joined(expected), strict=True)):
        assert torch.equal(a, b), Batch._fields[field]


@pytest.fixture(scope="module")
def expected() -> list[Batch]:
    """Six steps of twelve of forty pictures: three steps an epoch."""
    return list(loader(part(40)))


def test_a_batch_is_what_the_model_takes(expected: list[Batch]) -> None:
    assert len(expected) == 6
    for batch in expected:
        assert batch.patch_view.shape == batch.token_view.shape == (12, 3, 32, 32)
        assert batch.patch_view.dtype == batch.token_view.dtype == torch.uint8
        assert batch.masked_positions.shape == (12, 26)
        assert batch.masked_positions.dtype == batch.sample_ids.dtype == torch.int64
        assert batch.bad == []
        assert all(field.is_contiguous() for field in batch[:4])


def test_sample_ids_are_places_in_the_training_stream(expected: list[Batch]) -> None:
    ids = torch.cat([batch.sample_ids for batch in expected])
    assert ids.tolist() == [*range(36), *range(40, 76)]  # the last four of each epoch fill no step


def test_every_epoch_has_its_own_order() -> None:
    class Recorded(Subset):
        def load(self, index: int, needed: Needed | None = None) -> Image.Image:
            loads.append(index)
            return super().load(index, needed)

    loads: list[int] = []
    list(loader(part(36, Recorded)))
    assert sorted(loads[:36]) == sorted(loads[36:]) == list(range(36))
    assert loads[:36] != loads[36:]


def test_every_epoch_has_its_own_crops_and_masks(expected: list[Batch]) -> None:
    first, second = joined(expected[:3]), joined(expected[3:])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[2], second[2])


def test_another_seed_gives_other_batches(expected: list[Batch]) -> None:
    for got, was in zip(joined(list(loader(part(40), seed=1)))[:3], joined(expected)[:3], strict=True):
        assert not torch.equal(got, was)


def test_workers_change_nothing(expected: list[Batch]) -> None:
    assert_same(list(loader(part(40), data=DATA.model_copy(update={"workers": 2}))), expected)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 6), (2, 3), (3, 2), (12, 1)])
def test_ranks_and_passes_together_read_the_same(expected: list[Batch], world_size: int, micro_batch: int) -> None:
    ranks = [
        list(loader(part(40), rank=rank, world_size=world_size, micro_batch=micro_batch)) for rank in range(world_size)
    ]
    passes = 12 // world_size // micro_batch
    in_order = [batch for step in range(6) for rank in ranks for batch in rank[step * passes : (step + 1) * passes]]
    assert all(len(batch.sample_ids) == micro_batch for batch in in_order)
    assert_same(in_order, expected)


@pytest.mark.parametrize("start_step", [1, 3, 5])
def test_a_resumed_run_reads_what_the_whole_one_would(expected: list[Batch], start_step: int) -> None:
    assert_same(list(loader(part(40), start_step=start_step)), expected[start_step:])
    assert_same(list(loader(part(40), start_step=start_step, micro_batch=4)), expected[start_step:])


def test_a_finished_run_reads_nothing() -> None:
    for workers in (0, 2):
        assert list(loader(part(40), data=DATA.model_copy(update={"workers": workers}), start_step=6)) == []


def test_a_resumed_run_starts_at_once() -> None:
    class Untouched(Subset):
        def load(self, index: int, needed: Needed | None = None) -> Image.Image:
            loads.append(index)
            return super().load(index, needed)

    loads: list[int] = []
    next(loader(part(40, Untouched), start_step=3_000_000, num_steps=4_000_000))
    assert len(loads) == 12


def test_fewer_pictures_than_a_step_needs_are_told() -> None:
    with pytest.raises(UserError, match=r"there are 11 pictures.*the 12 of one optimizer step.*to 11 or less"):
        loader(part(11))


def test_a_batch_that_cannot_be_shared_out_is_told() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch = 12 is not a multiple of 2 ranks x .* = 4"):
        loader(part(40), world_size=2, micro_batch=4)


def evaluation(size: int, workers: int = 0, **changes: object) -> list[Batch]:
    arguments = {"batch_size": 4, "seed": 0} | changes
    data = DATA.model_copy(update={"workers": workers})
    return list(val_batches(part(size), data, MASK, 8, 32, **arguments))  # type: ignore[arg-type]


def test_held_out_pictures_are_read_once_in_order_without_chance() -> None:
    batches = evaluation(10)
    assert [len(batch.sample_ids) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(10))
    assert_same(evaluation(10, workers=1), batches)
    assert_same(evaluation(10, batch_size=3), batches)


def test_a_held_out_mask_depends_on_the_picture_and_the_seed() -> None:
    masks = joined(evaluation(10))[2]
    assert len(masks.unique(dim=0)) == 10
    assert torch.equal(joined(evaluation(20))[2][:10], masks)
    assert not torch.equal(joined(evaluation(10, seed=1))[2], masks)


@pytest.mark.parametrize(("size", "each"), [(10, 5), (11, 5), (1, 1), (0, 0)])
def test_every_rank_evaluates_equally_many_pictures(size: int, each: int) -> None:
    ranks = [evaluation(size, rank=rank, world_size=2) for rank in range(2)]
    ids = [[i for batch in rank for i in batch.sample_ids.tolist()] for rank in ranks]
    assert [len(rank) for rank in ids] == [each, each]
    assert len(ranks[0]) == len(ranks[1])
    assert set(ids[0] + ids[1]) == set(range(min(size, 2 * each)))


def test_a_batch_moves_to_a_device_as_a_whole(expected: list[Batch]) -> None:
    moved = expected[0].to("meta")
    assert all(field.device.type == "meta" for field in moved[:4])
    assert moved.bad == expected[0].bad


def test_a_worker_that_hangs_is_told_after_the_timeout(faulty: ModuleType) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"within data\.timeout = 2 s"):
        list(loader(part(40, faulty.Stuck), data=DATA.model_copy(update={"workers": 1, "timeout": 2.0})))
    assert time.monotonic() - began < 30


def test_a_worker_that_dies_is_told_long_before_the_timeout(faulty: ModuleType) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a data worker died .*data\.workers"):
        list(loader(part(40, faulty.Deadly), data=DATA.model_copy(update={"workers": 1, "timeout": 3000.0})))
    assert time.monotonic() - began < 60


def test_workers_leave_signals_to_the_training_process(faulty: ModuleType, expected: list[Batch]) -> None:
    assert_same(list(loader(part(40, faulty.Signalled), data=DATA.model_copy(update={"workers": 1}))), expected)


KILLED_TRAINER = """
import multiprocessing, os, signal
from test_loading import DATA, loader, part
batches = loader(part(40), data=DATA.model_copy(update={"workers": 2}), num_steps=100)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_training_process_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_TRAINER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]  # the end of it would come when they end
    assert trainer.returncode == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_real_photographs_are_read(photographs: Path) -> None:
    data = DataSettings(workers=0)
    batch = next(
        train_loader(
            ImageFolder(photographs), data, MaskSettings(), 14, 112, global_batch=8, micro_batch=8, seed=0, num_steps=1
        )
    )
    assert batch.patch_view.shape == (8, 3, 224, 224)
    assert batch.token_view.shape == (8, 3, 112, 112)
    assert batch.bad == []
    assert batch.patch_view.float().std() > 20
