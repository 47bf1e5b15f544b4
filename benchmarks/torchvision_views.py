"""torchvision's way from picture files to both views: the peer of our data loading.

What its user would write: a dataset whose transform draws one `RandomResizedCrop` and a flip and applies them twice, by
`functional.resized_crop` on PIL pictures, and torch's DataLoader around it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_beit.engine.config import DataSettings
from fused_beit.engine.models.mim import MEAN_AND_STD

from .rounds import AbsentError


class Box(NamedTuple):
    """Of a crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Views(NamedTuple):
    """The patch view, fp32 [3, S, S], normalised; and the token view, uint8 [3, T, T]."""

    patch_view: Tensor
    token_view: Tensor


class TorchvisionPictures(Dataset[Views]):
    """Picture files with random views. Raises AbsentError where torchvision is not installed."""

    def __init__(self, paths: list[Path], data: DataSettings, token_size: int) -> None:
        try:
            from torchvision import transforms
            from torchvision.transforms import functional
        except Exception as error:  # a build for another torch raises what it likes
            raise AbsentError(
                "not installed" if isinstance(error, ImportError) else f"does not load: {type(error).__name__}"
            ) from None
        self.functional = functional
        self.bicubic, self.lanczos = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.LANCZOS
        self.crop = transforms.RandomResizedCrop(data.image_size, scale=(data.min_scale, 1.0), ratio=(3 / 4, 4 / 3))
        self.flip_share = data.horizontal_flip
        self.patch_size_px, self.token_size_px = data.image_size, token_size
        self.mean_and_std = MEAN_AND_STD[data.normalize]
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Views:
        image = self.load(index)
        patch_view, token_view = self.views(image, self.box(image), flip=bool(torch.rand(()) < self.flip_share))
        tensor = self.functional.to_tensor(patch_view)
        return Views(self.functional.normalize(tensor, *self.mean_and_std), self.functional.pil_to_tensor(token_view))

    def load(self, index: int) -> Image.Image:
        with open(self.paths[index], "rb") as file:
            return Image.open(file).convert("RGB")

    def box(self, image: Image.Image) -> Box:
        return Box(*self.crop.get_params(image, self.crop.scale, self.crop.ratio))

    def views(self, image: Image.Image, box: Box, *, flip: bool) -> tuple[Image.Image, Image.Image]:
        """Patch view and token view as pictures."""
        crop = self.functional.resized_crop
        views = (
            crop(image, *box, [self.patch_size_px] * 2, self.bicubic),
            crop(image, *box, [self.token_size_px] * 2, self.lanczos),
        )
        return tuple(map(self.functional.hflip, views)) if flip else views  # type: ignore[return-value]


def batches(pictures: TorchvisionPictures, batch_size: int, workers: int) -> Iterator[Views]:
    """Batches without an end, in an order that is drawn anew for every pass over the pictures."""
    loader = DataLoader(
        pictures,
        batch_size=batch_size,
        sampler=Endless(len(pictures)),
        num_workers=workers,
        # torch's default on Linux until Python 3.14.
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


class Endless(torch.utils.data.Sampler[int]):
    """Permutations of 0 .. size - 1, one after the other."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.size).tolist()
