"""The pictures of a run: the built-in digits, or folders, parted into training and held-out ones."""

from typing import NamedTuple

from ..config import DataSettings
from .digits import Digits
from .folder import ImageFolder, split
from .loading import check_readable
from .source import Source


class Pictures(NamedTuple):
    """The two sets of pictures of a run."""

    train: Source
    val: Source | None
    """Held out; None where nothing is."""
    subject: str
    """What they show, as it stands in a sentence."""


def open_pictures(data: DataSettings, seed: int) -> Pictures:
    """Training and held-out pictures; the seed chooses which are held out.

    Raises:
        UserError: for a folder without readable pictures.
    """
    train: Source
    val: Source | None
    if data.path is None:
        train, val, subject = Digits("train"), Digits("val"), "handwritten digits"
    else:
        train, val, subject = ImageFolder(data.path), None, f"the pictures in {data.path.name}"
        check_readable(train)
        if data.val_path is not None:
            val = ImageFolder(data.val_path)
            check_readable(val)
        elif data.val_share > 0:
            train, val = split(train, data.val_share, seed, data.val_max)
    if val is not None and len(val) > data.val_max:
        val = split(val, 1.0, seed, data.val_max)[1]
    return Pictures(train, val, subject)
