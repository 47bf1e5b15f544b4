"""The built-in pictures: scikit-learn's 1797 handwritten digits, so that a first run needs no data."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .seeding import hash64_array
from .source import Needed

NUM_HELD_OUT = 297
INK = 16  # the largest value of a pixel in the data
MARGIN = 1  # pixels of paper added around the 8 x 8 pixels, so that a turned stroke is not cut off
SIZE = 60  # pixels a side: a crop of a third of the area is still 32 or more


class Digits:
    """Handwritten digits, 0 to 9, light on dark: RGB, `SIZE` x `SIZE`, enlarged smoothly from 8 x 8.

    split: "train" (1500 pictures) or "val" (297); fixed, with the same share of every digit in both
    `labels` holds the digit of each picture, int64 `[N]`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), CC BY 4.0.
    """

    classes = tuple("0123456789")

    def __init__(self, split: Literal["train", "val"]) -> None:
        # Imported late: it takes a second, and the workers get the pixels without it.
        from sklearn.datasets import load_digits

        pixels_NHW, labels = load_digits(return_X_y=True)
        pixels_NHW = np.pad(pixels_NHW.reshape(-1, 8, 8), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
        held_out = _held_out(labels)
        chosen = np.flatnonzero(held_out if split == "val" else ~held_out)
        self.split = split
        self.labels: NDArray[np.int64] = labels[chosen].astype(np.int64)
        self._originals = chosen
        self._pixels_NHW = np.round(pixels_NHW[chosen] * (255 / INK)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digits[{self._originals[index]}]"

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        small = Image.fromarray(self._pixels_NHW[index])
        return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pictures are held out: of every class the first in a hashed order, the same share of each."""
    keys = hash64_array(np.arange(len(labels)))
    rank_in_class = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank_in_class[members[np.argsort(keys[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[np.argsort(rank_in_class, kind="stable")[:NUM_HELD_OUT]] = True
    return held_out
