"""What the engine asks of a set of pictures."""

from collections.abc import Callable
from typing import Protocol

from PIL import Image

# Full size (width, height) of a picture -> the smallest (width, height) of the whole picture that is sharp enough.
Needed = Callable[[int, int], tuple[int, int]]


class BadPicture(Exception):
    """A picture that cannot be read. `path` names it, `reason` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Source(Protocol):
    """Pictures by index. It is pickled to the workers, so it should be small."""

    def __len__(self) -> int:
        """Number of pictures."""

    def name(self, index: int) -> str:
        """What a message calls the picture: its path, say."""

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        """The picture in mode RGB; raises `BadPicture`.

        Given `needed`, it may be a reduction of the picture, by the same factor in width and height, that is at least
        as large as `needed(full width, full height)`; a source may ignore it. Only then is `needed` called.
        """
