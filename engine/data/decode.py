"""A picture file to RGB pixels in one guarded step: whatever is wrong with the file becomes a `BadPicture`."""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .source import BadPicture, Needed

# Pillow's own bound, at which it warns of a decompression bomb: a quarter of a GiB as RGB. A header of a few bytes may
# claim billions of pixels, and a worker that runs out of memory takes the run with it.
MAX_PIXELS = 89_478_485

# A fixed list, for the name of a file says nothing: an EPS called x.jpg would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

_READ_AT_ONCE = 1 << 20  # bytes: most pictures in one request, where Pillow alone makes dozens

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def decode(path: str | Path, needed: Needed | None = None) -> Image.Image:
    """The first frame of a picture file, upright, mode RGB.

    With `needed`, a JPEG much larger than `needed(width, height)` is decoded at 1/2, 1/4 or 1/8 of its size by leaving
    out high frequencies, never smaller than needed; width and height are the upright ones.
    Transparent pictures lie on white, 16-bit grey is scaled to 8 bits. Raises `BadPicture`.
    """
    name = os.fsdecode(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
            raise BadPicture(name, "not a regular file")
        if status.st_size == 0:
            raise BadPicture(name, "the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: every worker would print them in every epoch
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open(path, "rb", buffering=_READ_AT_ONCE) as file, Image.open(file, formats=_FORMATS) as image:
                return _decode_opened(name, image, needed)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture(name, "not a picture in a known format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture(name, f"it claims more than {MAX_PIXELS} pixels") from None
    except OSError as error:
        raise BadPicture(name, error.strerror or _one_line(error)) from error
    except Exception as error:
        # Pillow's readers raise whatever a broken file makes them stumble on: ValueError, SyntaxError, EOFError,
        # struct.error, IndexError, TypeError, MemoryError ... One file must not end a run of days.
        raise BadPicture(name, f"{type(error).__name__}: {_one_line(error)}") from error


def _decode_opened(name: str, image: Image.Image, needed: Needed | None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture(name, f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    orientation = _orientation(image)
    if needed is not None:
        if orientation in _TURNED:
            height, width = needed(image.height, image.width)
        else:
            width, height = needed(image.width, image.height)
        image.draft(None, (max(1, width), max(1, height)))  # does nothing but for JPEG
    rgb = _to_rgb(name, image)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) where it is missing or cannot be read."""
    if image.format in ("JPEG", "MPO") and not image.info.keys() & {"exif", "xmp"}:
        return 1  # most pictures: spares a parse
    if image.format == "PNG":
        image.load()  # outside the guard below, for a broken picture is no broken EXIF
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata of a sound picture raises anything at all
        return 1


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode.startswith("I"):
        # `convert` would clip at 255. Pillow reads 16-bit grey as I;16 or as I, by format and version.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadPicture(name, "its pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        # Pixels that nobody sees have any colour; most such pictures are drawn for a white page.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
