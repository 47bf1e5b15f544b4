"""The two views: the same crop, flip, rotation and colours in both, drawn as published."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from fused_beit.engine.config import DataSettings
from fused_beit.engine.data.decode import decode
from fused_beit.engine.data.seeding import uniforms
from fused_beit.engine.data.source import Needed
from fused_beit.engine.data.views import NUM_UNIFORMS, Crop, TwoViews, center_crop, random_crop

PLAIN = DataSettings(image_size=64, color_jitter=0.0, horizontal_flip=0.0)


class One:
    """A source of one picture in memory."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "one"

    def load(self, index: int, needed: Needed | None = None) -> Image.Image:
        return self.image


def gradient(width: int, height: int) -> Image.Image:
    """Red rises to the right, green downwards, blue along the diagonal."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    return Image.fromarray(np.round(np.stack([x, y, (x + y) / 2], -1) * 200 + 25).astype(np.uint8))


def halved(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (pixels[::2, ::2].astype(float) + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4


def numbers(count: int, seed: int = 0) -> NDArray[np.float64]:
    return uniforms(seed, np.arange(count), count=NUM_UNIFORMS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"horizontal_flip": 1.0}, {"rotation": 40.0}, {"color_jitter": 0.4}],
    ids=lambda settings: next(iter(settings), "crop"),
)
def test_both_views_show_the_same(settings: dict[str, float]) -> None:
    views = TwoViews(PLAIN.model_copy(update={"min_scale": 0.3, **settings}), 32)
    source = One(gradient(200, 160))
    for drawn in numbers(20):
        patch_view, token_view = views(source, 0, drawn)
        assert patch_view.shape == (64, 64, 3)
        assert token_view.shape == (32, 32, 3)
        # Each view is rounded, before the colours are changed (by factors up to 1.4^3) and after; inside, for at its
        # edge the picture may be continued by its mirror image, where the filters see a fold.
        difference = np.abs(halved(patch_view) - token_view)[4:-4, 4:-4]
        rounding = 0.5 + 0.5
        if "color_jitter" in settings:
            rounding += (0.5 + 0.5) * 1.4**3
        if "rotation" in settings:
            assert np.median(difference) <= rounding
        else:
            assert difference.max() <= rounding


def test_a_crop_shows_its_box() -> None:
    image = gradient(200, 160)
    views = TwoViews(PLAIN, 32)
    patch_view, _ = views.render(image, Crop(40, 20, 64, 64))
    assert np.array_equal(patch_view, np.asarray(image)[20:84, 40:104])
    flipped, _ = views.render(image, Crop(40, 20, 64, 64, flip=True))
    assert np.array_equal(flipped, patch_view[:, ::-1])


def test_a_quarter_turn_is_a_rotation_about_the_centre() -> None:
    image = gradient(200, 160)
    views = TwoViews(PLAIN, 32)
    straight, _ = views.render(image, Crop(40, 20, 64, 64))
    turned, _ = views.render(image, Crop(40, 20, 64, 64, angle=90.0))
    assert np.abs(np.rot90(straight).astype(int) - turned).max() <= 1


@pytest.mark.parametrize("angle", [-45.0, 10.0, 90.0, 180.0])
@pytest.mark.parametrize("size", [(40, 30), (5, 90), (1, 1)])
def test_a_rotation_shows_nothing_but_the_picture(angle: float, size: tuple[int, int]) -> None:
    white = Image.new("RGB", size, "white")
    for view in TwoViews(PLAIN, 32).render(white, Crop(0, 0, *size, angle=angle)):
        assert view.min() == 255


def test_the_same_numbers_give_the_same_views_and_others_give_others() -> None:
    views = TwoViews(DataSettings(image_size=64, rotation=20.0), 32)
    source = One(gradient(200, 160))
    first, again, other = (views(source, 0, drawn) for drawn in numbers(2)[[0, 0, 1]])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_crops_have_the_published_areas_and_ratios() -> None:
    count = 4000
    crops = [random_crop(2000, 2000, drawn, DataSettings()) for drawn in numbers(count)]
    ratios = np.log([crop.width / crop.height for crop in crops]) / math.log(4 / 3)
    areas = np.array([crop.width * crop.height / 2000**2 for crop in crops])
    assert areas.min() >= 0.08 - 1e-3  # sides are rounded
    assert areas.max() <= 1
    assert np.abs(ratios).max() <= 1 + 1e-2
    assert abs(ratios.mean()) < 4.5 / math.sqrt(3 * count)
    small = areas < 0.75  # up to 3/4 of a square every ratio fits, so areas are uniform there
    expected = (0.08 + 0.75) / 2
    assert abs(areas[small].mean() - expected) < 4.5 * (0.75 - 0.08) / math.sqrt(12 * small.sum())
    assert abs(np.mean([crop.flip for crop in crops]) - 0.5) < 4.5 * 0.5 / math.sqrt(count)
    for crop in crops:
        assert 0 <= crop.left <= 2000 - crop.width
        assert 0 <= crop.top <= 2000 - crop.height
    inner = [crop for crop in crops if max(crop.width, crop.height) < 1500]
    room = np.array([(crop.left / (2000 - crop.width), crop.top / (2000 - crop.height)) for crop in inner])
    assert np.abs(room.mean(0) - 0.5).max() < 4.5 / math.sqrt(12 * len(room)) + 1e-3


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (13, 10)), ((10, 1000), (10, 13)), ((1, 1), (1, 1))])
def test_where_no_crop_fits_the_largest_centred_one_is_taken(size: tuple[int, int], box: tuple[int, int]) -> None:
    data = DataSettings(min_scale=1.0)
    crop = random_crop(*size, numbers(1)[0], data)
    assert (crop.width, crop.height) == box
    assert (crop.left, crop.top) == ((size[0] - box[0]) // 2, (size[1] - box[1]) // 2)


def test_colour_operations_come_in_every_order_with_their_own_factors() -> None:
    crops = [random_crop(100, 100, drawn, DataSettings(color_jitter=0.4)) for drawn in numbers(3000)]
    orders = [tuple(name for name, _ in crop.colors) for crop in crops]
    shares = np.array([orders.count(order) for order in set(orders)]) / 3000
    assert len(shares) == 6
    assert np.abs(shares - 1 / 6).max() < 4.5 * math.sqrt(1 / 6 * 5 / 6 / 3000)
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([dict(crop.colors)[name] for crop in crops])
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4
        assert abs(factors.mean() - 1) < 4.5 * 0.8 / math.sqrt(12 * 3000)


def test_the_colour_map_is_the_operations_one_after_the_other() -> None:
    image = Image.blend(Image.new("RGB", (64, 64), (128, 128, 128)), gradient(64, 64), 0.5)  # nothing will be clipped
    colors = (("saturation", 1.3), ("contrast", 0.5), ("brightness", 0.6))
    expected = image
    for name, factor in colors:
        operation = {
            "brightness": ImageEnhance.Brightness,
            "contrast": ImageEnhance.Contrast,
            "saturation": ImageEnhance.Color,
        }[name]
        expected = operation(expected).enhance(factor)
    got, _ = TwoViews(PLAIN, 32).render(image, Crop(0, 0, 64, 64, colors=colors))
    # Pillow cuts off fractions after each operation (three times up to 1, changed by the factors that follow) and
    # rounds the mean grey; this rounds once.
    assert np.abs(got.astype(int) - np.asarray(expected)).max() <= 4


def test_evaluation_sees_the_centred_square() -> None:
    assert center_crop(200, 160) == Crop(20, 0, 160, 160)
    image = gradient(96, 64)
    patch_view, _ = TwoViews(PLAIN, 32)(One(image), 0, None)
    assert np.array_equal(patch_view, np.asarray(image)[:, 16:80])


def test_a_reduced_jpeg_gives_the_views_of_the_full_one(tmp_path: Path) -> None:
    gradient(1600, 1200).save(tmp_path / "large.jpg", quality=95)
    full = decode(tmp_path / "large.jpg")

    class Reduced(One):
        def load(self, index: int, needed: Needed | None = None) -> Image.Image:
            self.image = decode(tmp_path / "large.jpg", needed)
            return self.image

    reduced = Reduced(full)
    for drawn in numbers(10):
        views = TwoViews(PLAIN.model_copy(update={"min_scale": 0.2}), 32)
        from_reduced, from_full = views(reduced, 0, drawn), views(One(full), 0, drawn)
        assert reduced.image.width < full.width
        # The gradient changes by 200 in 1600 pixels, and the box is moved by less than a pixel of the reduced picture.
        shift = 200 / 1200 * 8
        for a, b in zip(from_reduced, from_full, strict=True):
            assert np.abs(a.astype(int) - b).max() <= shift + 1


def test_a_source_is_asked_for_enough_pixels_for_the_larger_view() -> None:
    class Asked(One):
        def load(self, index: int, needed: Needed | None = None) -> Image.Image:
            assert needed is not None
            asked.append(needed(*self.image.size))
            return self.image

    asked: list[tuple[int, int]] = []
    drawn = numbers(50)
    for token_size in (32, 100):
        asked.clear()
        views = TwoViews(PLAIN, token_size)
        for each in drawn:
            views(Asked(gradient(200, 160)), 0, each)
        for (width, height), each in zip(asked, drawn, strict=True):
            crop = random_crop(200, 160, each, PLAIN)
            assert crop.width * width / 200 >= max(64, token_size) > crop.width * (width - 1) / 200
            assert crop.height * height / 160 >= max(64, token_size) > crop.height * (height - 1) / 160


def test_a_jpeg_is_never_reduced_below_what_the_crop_needs(tmp_path: Path) -> None:
    gradient(800, 600).save(tmp_path / "large.jpg")
    for side in (64, 75, 76, 149, 151, 300):
        crop = Crop(100, 100, 300, 300)
        needed = (math.ceil(800 * side / crop.width), math.ceil(600 * side / crop.height))
        image = decode(tmp_path / "large.jpg", lambda width, height, needed=needed: needed)
        scale = image.width / 800
        assert crop.width * scale >= side
        assert image.width // 2 < needed[0] or scale == 1 / 8  # and it is not larger than it has to be
