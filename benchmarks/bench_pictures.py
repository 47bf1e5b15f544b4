"""Pictures from files to batches: decoding, the crop, both views, normalising; ours beside torchvision's transforms.

Both draw one crop from the same distribution and a flip, and make a patch view, normalised in fp32, and a token view.
Ours draws the masks too, and decodes a JPEG much larger than its crop at a reduced size, as it does in a run; the
colour jitter is off, for the two do not mean the same by it.

What is checked: from the same box, ours and torchvision's views differ by less than either differs from itself when the
box is moved by one pixel of the view; and the boxes that both draw have the same distribution.

In this process both have one thread, as a worker has, so that its pictures/s are those of a core.

With workers a run takes batches from processes that stay and work ahead. Before it is timed it waits until the
processes of all providers rest, as many batches ready as they may have, so that nobody else's work is timed. Then it
takes as many of its own as lie ready, so that what is timed is what the processes can keep up.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fused_beit.engine.config import DataSettings, MaskSettings, ModelSettings
from fused_beit.engine.data.folder import ImageFolder
from fused_beit.engine.data.loading import Batch, train_loader
from fused_beit.engine.data.views import NUM_UNIFORMS, Crop, TwoViews, random_crop
from fused_beit.engine.models.mim import MaskedImageModel

from .rounds import AbsentError, quartiles, time_in_turn
from .spread import add_spread
from .timers import Staged
from .torchvision_views import Box, TorchvisionPictures, batches

pytestmark = pytest.mark.filterwarnings("ignore")  # torchvision's, and of a fork beside torch's threads

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"pictures": 8, "batch": 2, "batches": 4, "image_size": 32, "small": (100, 75), "large": (320, 240)},
    "full": {"pictures": 8, "batch": 4, "batches": 12, "image_size": 224, "small": (500, 375), "large": (2000, 1500)},
}
TOKEN_STRIDE = 8  # DALL-E's encoder: a token covers 8 x 8 pixels of the token view
PREFETCH = 2  # batches that a worker has ready, with us and by default with torch
BOXES = 2000


def make_pictures(folder: Path, count: int, side: tuple[int, int]) -> Path:
    """JPEGs of soft colours with some noise, about as hard to decode as photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        colours = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(colours).resize(side, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = soft + generator.normal(0, 12, soft.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)
    return folder


class Pictures:
    """Picture files of one size, and how a run asks for them."""

    def __init__(self, folder: Path, size: dict[str, Any], side: tuple[int, int]) -> None:
        self.side, self.count, self.batch, self.image_size = side, size["pictures"], size["batch"], size["image_size"]
        self.batches = size["batches"]
        self.paths = sorted(make_pictures(folder, self.count, side).iterdir())
        self.source = ImageFolder(folder)
        self.data = DataSettings(path=folder, image_size=self.image_size, color_jitter=0.0)
        self.grid = self.image_size // 16
        self.token_size = self.grid * TOKEN_STRIDE
        self.masks = MaskSettings(num_patches=max(1, int(0.4 * self.grid**2)), min_block=min(16, self.grid))

    def ours(self, workers: int) -> Iterator[tuple[Batch, Tensor]]:
        """Batches without an end, each with its patch view normalised as the model does it first."""
        model = MaskedImageModel(
            ModelSettings(width=16, depth=1, num_heads=1), self.image_size, 2, normalize=self.data.normalize
        )
        loader = train_loader(
            self.source,
            self.data.model_copy(update={"workers": workers}),
            self.masks,
            self.grid,
            self.token_size,
            global_batch=self.batch,
            micro_batch=self.batch,
            seed=0,
            num_steps=10**6,
        )
        for batch in loader:
            yield batch, model.normalize(batch.patch_view)


def fused_beit(pictures: Pictures, workers: int) -> Iterator[Any]:
    return pictures.ours(workers)


def torchvision(pictures: Pictures, workers: int) -> Iterator[Any]:
    peer = TorchvisionPictures(pictures.paths, pictures.data, pictures.token_size)
    check_same_views(pictures, peer)
    check_same_boxes(pictures, peer)
    return batches(peer, pictures.batch, workers)


PROVIDERS: dict[str, Callable[[Pictures, int], Iterator[Any]]] = {"fused_beit": fused_beit, "torchvision": torchvision}


def check_our_batch(pictures: Pictures) -> None:
    """Shapes, and that both views are of one crop: shrunk to the same few pixels they look alike."""
    stream = pictures.ours(0)
    batch, normalized = next(stream)
    assert batch.bad == []
    size, token_size = pictures.image_size, pictures.token_size
    assert normalized.shape == batch.patch_view.shape == (pictures.batch, 3, size, size)
    torch.testing.assert_close(normalized, (batch.patch_view.float() / 255 - 0.5) / 0.5)  # the default, "inception"
    assert batch.token_view.shape == (pictures.batch, 3, token_size, token_size)
    views = [torch.nn.functional.adaptive_avg_pool2d(v.float(), 4) for v in (batch.patch_view, batch.token_view)]
    other_crops = (views[0] - views[1].roll(1, dims=0)).abs().mean()
    assert (views[0] - views[1]).abs().mean() < other_crops / 4, "the two views are not of the same crop"


def uniforms(rows: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).random((rows, NUM_UNIFORMS))


def check_same_views(pictures: Pictures, peer: TorchvisionPictures) -> None:
    """Hold torchvision's views of our boxes to ours: nearer than views of a box that is one pixel of the view off."""
    views = TwoViews(pictures.data, pictures.token_size)
    for index, numbers in enumerate(uniforms(4)):
        crop = random_crop(*pictures.side, numbers, pictures.data)
        ours = views(pictures.source, index, numbers)
        box = Box(int(crop.top), int(crop.left), int(crop.height), int(crop.width))
        theirs = peer.views(peer.load(index), box, flip=crop.flip)
        moved = views.render(Image.open(pictures.paths[index]).convert("RGB"), moved_by_a_pixel(crop, pictures))
        for name, one, other, shifted in zip(("patch view", "token view"), ours, theirs, moved, strict=True):
            off, pixel = difference(one, other), difference(one, shifted)
            assert off < pixel, f"torchvision: its {name} is {off:.2f} grey levels off, a pixel would be {pixel:.2f}"


def moved_by_a_pixel(crop: Crop, pictures: Pictures) -> Crop:
    """The crop one pixel of the patch view further to the right, or to the left where there is no room."""
    pixel = crop.width / pictures.image_size
    fits = crop.left + crop.width + pixel <= pictures.side[0]
    return replace(crop, left=max(0.0, crop.left + (pixel if fits else -pixel)))


def difference(one: Any, other: Any) -> float:
    """Mean difference of two pictures in grey levels, 0 to 255."""
    return float(np.abs(np.asarray(one, dtype=np.float32) - np.asarray(other, dtype=np.float32)).mean())


def check_same_boxes(pictures: Pictures, peer: TorchvisionPictures) -> None:
    """Kolmogorov and Smirnov's test of two samples of boxes, in each of their four numbers, at a level of 0.1 %."""
    ours = [random_crop(*pictures.side, numbers, pictures.data) for numbers in uniforms(BOXES)]
    image = Image.new("RGB", pictures.side)
    torch.manual_seed(0)
    theirs = [peer.box(image) for _ in range(BOXES)]
    allowed = 1.95 * (2 / BOXES) ** 0.5
    for name in ("left", "top", "width", "height"):
        distance = largest_gap([getattr(crop, name) for crop in ours], [getattr(box, name) for box in theirs])
        assert distance <= allowed, f"torchvision: boxes differ from ours in {name}: {distance:.3f} > {allowed:.3f}"


def largest_gap(ones: list[float], others: list[float]) -> float:
    """The largest distance between two samples' distribution functions."""
    values = np.unique([*ones, *others])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ones, others)]
    return float(np.abs(shares[0] - shares[1]).max())


def wait_for_workers(rest: float = 0.1, limit: float = 60.0) -> None:
    """Wait until no worker of this process has used its processor for `rest` seconds.

    Raises:
        RuntimeError: where one still does after `limit` seconds.
    """
    began, used = time.monotonic(), -1.0
    while (now := seconds_of_workers()) != used:
        if time.monotonic() - began > limit:
            raise RuntimeError(f"data workers are still at work after {limit:g} s, so that no one's time is its own")
        used = now
        time.sleep(rest if multiprocessing.active_children() else 0)


def seconds_of_workers() -> float:
    """Processor time of all workers so far."""
    times = [psutil.Process(worker.pid).cpu_times() for worker in multiprocessing.active_children()]
    return sum(one.user + one.system for one in times)


def begin(stream: Iterator[Any], ready: int) -> None:
    """What precedes a timed part: all workers at rest, then none of this stream's batches ready."""
    wait_for_workers()
    take(stream, ready)


def take(stream: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(stream)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers have it, so that a picture costs the same in this process; torchvision's small operators would only
    wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "workers"), [("small", 0), ("large", 0), ("small", 1), ("small", 2)])
def test_pictures(drive, keep, num_rounds, sizes, tmp_path, kind, workers):
    if sizes == "smoke" and workers == 1:
        pytest.skip("smoke sizes start two workers once")
    pictures = Pictures(tmp_path, SIZES[sizes], SIZES[sizes][kind])
    check_our_batch(pictures)

    streams, runs, absent = {}, {}, {}
    number = pictures.batches if workers else pictures.count // pictures.batch
    for name, make in PROVIDERS.items():
        try:
            streams[name] = stream = make(pictures, workers)
        except AbsentError as error:
            absent[name] = str(error)
            continue
        ready = workers * PREFETCH
        runs[name] = Staged(
            lambda stream=stream, ready=ready: begin(stream, ready), lambda _, stream=stream: take(stream, number)
        )
    where = f"{workers} worker{'s' if workers > 1 else ''}" if workers else "in one process"
    label = f"{number * pictures.batch} JPEGs of {pictures.side[0]} x {pictures.side[1]}, {where}"
    rows = time_in_turn(label, runs, rounds=num_rounds(5), drive=drive, absent=absent)
    for stream in streams.values():
        if hasattr(stream, "close"):
            stream.close()
    add_spread(rows)
    for row in rows:
        if row.seconds:
            row.facts["pictures_per_s"] = number * pictures.batch / quartiles(row.seconds)[1]
    keep(rows)
