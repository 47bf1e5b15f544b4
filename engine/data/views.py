"""The two views of a picture: one crop, seen by the encoder (patch view) and by the tokenizer (token view).

As published for BEiT (`RandomResizedCropAndInterpolationWithTwoPic`): scale and ratio are drawn once and the same crop
is resized twice, bicubic for patches and Lanczos for tokens, also where both have one size. Two things differ, both for
speed. The colour jitter is one affine map of the colours, made from the crop and applied to both views, where the
published code changes the whole picture before it is cropped, rounding and clipping after each of three operations.
And a JPEG much larger than its crop needs is decoded at a reduced size.

Shapes: H, W pixels; S side of a view.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import DataSettings
from .source import Source

Pixels = NDArray[np.uint8]

_RATIO = 4 / 3  # width / height of a crop is log-uniform in [3/4, 4/3]
_ATTEMPTS = 10
# Of one picture: an area and a ratio for each attempt, then top, left, flip, angle, three colour factors, their order.
NUM_UNIFORMS = 2 * _ATTEMPTS + 8

_COLORS = ("brightness", "contrast", "saturation")
_COLOR_ORDERS = tuple(itertools.permutations(_COLORS))
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's mode L


@dataclass(frozen=True)
class Crop:
    """What is done to one picture, for both views alike."""

    left: float
    """Of the box, in pixels of the full-size picture, upright."""
    top: float
    width: float
    height: float
    flip: bool = False
    angle: float = 0.0
    """Rotation about the box's centre, degrees, counter-clockwise."""
    colors: tuple[tuple[str, float], ...] = ()
    """Colour operations in order, each with its factor."""


def random_crop(width: int, height: int, numbers: NDArray[np.float64], data: DataSettings) -> Crop:
    """Draw a crop of a `width` x `height` picture; numbers: `[NUM_UNIFORMS]` in [0, 1)."""
    areas = width * height * (data.min_scale + (1 - data.min_scale) * numbers[:_ATTEMPTS])
    ratios = np.exp((2 * numbers[_ATTEMPTS : 2 * _ATTEMPTS] - 1) * math.log(_RATIO))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = np.flatnonzero((widths <= width) & (heights <= height) & (widths > 0) & (heights > 0))
    top, left, flip, angle, *color_shares, color_order = numbers[2 * _ATTEMPTS :].tolist()
    if len(fits):
        crop_width, crop_height = int(widths[fits[0]]), int(heights[fits[0]])
        crop_left, crop_top = int(left * (width - crop_width + 1)), int(top * (height - crop_height + 1))
    else:  # the largest centred box of an allowed ratio
        crop_width = min(width, max(1, round(height * _RATIO)))
        crop_height = min(height, max(1, round(width * _RATIO)))
        crop_left, crop_top = (width - crop_width) // 2, (height - crop_height) // 2
    colors: tuple[tuple[str, float], ...] = ()
    if data.color_jitter:
        low = max(0.0, 1 - data.color_jitter)
        factors = [low + (1 + data.color_jitter - low) * share for share in color_shares]
        order = _COLOR_ORDERS[int(color_order * len(_COLOR_ORDERS))]
        colors = tuple((name, factors[_COLORS.index(name)]) for name in order)
    return Crop(
        crop_left,
        crop_top,
        crop_width,
        crop_height,
        flip=flip < data.horizontal_flip,
        angle=(2 * angle - 1) * data.rotation,
        colors=colors,
    )


def center_crop(width: int, height: int) -> Crop:
    """The largest centred square, for evaluation: all of the short side is seen."""
    side = min(width, height)
    return Crop((width - side) // 2, (height - side) // 2, side, side)


class TwoViews:
    """Loads pictures and makes their two views.

    token_size: side of the token view; that of the patch view is `data.image_size`
    """

    def __init__(self, data: DataSettings, token_size: int) -> None:
        self.data = data
        self.patch_size_px = data.image_size
        self.token_size_px = token_size

    def __call__(self, source: Source, index: int, numbers: NDArray[np.float64] | None) -> tuple[Pixels, Pixels]:
        """Patch view `[S, S, 3]` and token view of picture `index`; a centred crop where `numbers` is None.

        Raises:
            BadPicture: where the picture cannot be read
        """
        crop: Crop | None = None
        full_width = 0

        def choose(width: int, height: int) -> tuple[int, int]:
            nonlocal crop, full_width
            full_width = width
            crop = center_crop(width, height) if numbers is None else random_crop(width, height, numbers, self.data)
            largest = max(self.patch_size_px, self.token_size_px)
            return math.ceil(width * largest / crop.width), math.ceil(height * largest / crop.height)

        image = source.load(index, choose)
        if crop is None:  # a source that always gives the full size
            choose(*image.size)
        assert crop is not None
        return self.render(image, crop, image.width / full_width)

    def render(self, image: Image.Image, crop: Crop, scale: float = 1.0) -> tuple[Pixels, Pixels]:
        """Both views of a crop; `scale` is the size of `image` as a share of the full size that the crop counts in."""
        left, top = crop.left * scale, crop.top * scale
        box = (left, top, min(left + crop.width * scale, image.width), min(top + crop.height * scale, image.height))
        if crop.angle:
            image, box = _rotated(image, box, crop.angle)
        patch_view = _resized(image, self.patch_size_px, Image.Resampling.BICUBIC, box)
        token_view = _resized(image, self.token_size_px, Image.Resampling.LANCZOS, box)
        if crop.colors:
            matrix = _color_map(crop.colors, patch_view)
            patch_view, token_view = patch_view.convert("RGB", matrix), token_view.convert("RGB", matrix)
        return _pixels(patch_view, crop.flip), _pixels(token_view, crop.flip)


Box = tuple[float, float, float, float]


def _resized(image: Image.Image, side: int, resample: Image.Resampling, box: Box) -> Image.Image:
    return image.resize((side, side), resample, box=box)


def _rotated(image: Image.Image, box: Box, angle: float) -> tuple[Image.Image, Box]:
    """The picture about the box, turned about the box's centre, and where the box is in it.

    Beyond its edges the picture is continued by its mirror image, so no black corner gives the rotation away.
    """
    left, top, right, bottom = box
    center_x, center_y = (left + right) / 2, (top + bottom) / 2
    reach = math.hypot(right - left, bottom - top) / 2 + 2  # the corners, and what bicubic looks at beyond them
    x0, y0 = math.floor(center_x - reach), math.floor(center_y - reach)
    x1, y1 = math.ceil(center_x + reach), math.ceil(center_y + reach)
    inner = image.crop((max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)))
    margins = ((max(-y0, 0), max(y1 - image.height, 0)), (max(-x0, 0), max(x1 - image.width, 0)), (0, 0))
    if any(sum(pair) for pair in margins):
        inner = Image.fromarray(np.pad(np.asarray(inner), margins, mode="symmetric"))
    turned = inner.rotate(angle, Image.Resampling.BICUBIC, center=(center_x - x0, center_y - y0))
    # Without what lies around the box: a filter looks beyond it, and the corners of the turned picture are black.
    u0, v0 = math.floor(left - x0), math.floor(top - y0)
    turned = turned.crop((u0, v0, math.ceil(right - x0), math.ceil(bottom - y0)))
    return turned, (left - x0 - u0, top - y0 - v0, right - x0 - u0, bottom - y0 - v0)


def _color_map(colors: tuple[tuple[str, float], ...], view: Image.Image) -> tuple[float, ...]:
    """The colour operations as one affine map, 3 x 4 row by row; contrast is about the view's mean grey.

    brightness: x -> f x;  contrast: x -> f x + (1 - f) mean grey;  saturation: x -> f x + (1 - f) grey of x
    """
    mean_rgb = np.array(view.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    linear, offset = np.eye(3), np.zeros(3)
    for name, factor in colors:
        step = factor * np.eye(3)
        shift = np.zeros(3)
        if name == "contrast":
            shift += (1 - factor) * (_GREY @ (linear @ mean_rgb + offset))
        elif name == "saturation":
            step += (1 - factor) * _GREY
        linear, offset = step @ linear, step @ offset + shift
    return tuple(np.column_stack([linear, offset]).ravel().tolist())


def _pixels(view: Image.Image, flip: bool) -> Pixels:
    pixels = np.asarray(view)
    return pixels[:, ::-1] if flip else pixels
