"""Pictures in a folder and its sub-folders, found once; and parts of a set of pictures."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserError
from .decode import decode
from .folder_index import EXTENSIONS, find_index
from .seeding import Purpose, permuted
from .source import Needed, Source


class ImageFolder:
    """All pictures below a folder, in sorted order; classes are the folders directly in it, where there are any.

    Files are pictures by their extension (`EXTENSIONS`, in any case). Hidden files and folders are left out, links are
    followed, and a folder reached twice is read once. Nothing is opened here: a broken file shows when it is loaded.

    Raises:
        UserError: where there is no such folder, it cannot be read, or it holds no picture
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"the folder of pictures {self.path} does not exist; give an existing folder.")
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder; give the folder that holds the pictures.")
        if not os.access(self.path, os.R_OK | os.X_OK):
            raise UserError(f"the folder of pictures {self.path} cannot be read; allow this user to read it.")
        self._index = find_index(self.path.absolute())
        if not len(self._index):
            raise UserError(
                f"there is no picture in {self.path} or its sub-folders; files with these endings are looked for: "
                f"{' '.join(EXTENSIONS)}."
            )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def classes(self) -> list[str]:
        """Names of the folders directly in this one that hold pictures, sorted."""
        return self._index.classes

    def label(self, index: int) -> int:
        """Position of the picture's class in `classes`; -1 for a picture directly in the folder."""
        return self._index.label(index)

    def name(self, index: int) -> str:
        """The picture's path."""
        # Undecodable bytes of a file name are replaced: a log or report must be able to print it.
        return os.fsencode(self.path / self._index.relative_path(index)).decode(errors="replace")

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        return decode(self.path / self._index.relative_path(index), needed)


class Subset:
    """Some pictures of a source, in the order of `indices`, int64 `[N]`."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        return self.source.load(int(self.indices[index]), needed)


class AllBut:
    """All pictures of a source but `left_out`, int64 `[N]`, ascending; as small as that list when it is pickled."""

    def __init__(self, source: Source, left_out: NDArray[np.int64]) -> None:
        self.source = source
        self._kept_before = left_out - np.arange(len(left_out))  # pictures kept before each one left out

    def __len__(self) -> int:
        return len(self.source) - len(self._kept_before)

    def name(self, index: int) -> str:
        return self.source.name(self._original(index))

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        return self.source.load(self._original(index), needed)

    def _original(self, index: int) -> int:
        return index + int(np.searchsorted(self._kept_before, index, side="right"))


def split(source: Source, share: float, seed: int, maximum: int) -> tuple[AllBut, Subset]:
    """Part a source into (training, held-out) pictures, drawn by the seed: the same in every run with this seed.

    share:   of the pictures, in [0, 1], that are held out; at least one picture unless it is 0
    maximum: of pictures held out

    Raises:
        UserError: where a share below 1 leaves nothing to train on
    """
    size = len(source)
    count = min(maximum, max(1, round(size * share))) if share else 0
    if count >= size and share < 1:
        raise UserError(
            f"data.val_share = {share} of {size} pictures leaves none to train on; give more pictures, "
            f"or held-out pictures of their own as data.val_path."
        )
    held_out = np.sort(permuted(np.arange(min(count, size)), size, seed, int(Purpose.SPLIT)))
    return AllBut(source, held_out), Subset(source, held_out)
