"""Odd and broken files: each is read rightly or becomes a bad picture with its reason, and none ends a run."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fused_beit.engine.config import DataSettings, MaskSettings
from fused_beit.engine.data import decode as decode_module
from fused_beit.engine.data.decode import decode
from fused_beit.engine.data.folder import ImageFolder
from fused_beit.engine.data.loading import (
    BadFile,
    BadPictureLog,
    Batch,
    Making,
    check_readable,
    train_loader,
    val_batches,
)
from fused_beit.engine.data.source import BadPicture
from fused_beit.engine.errors import UserError

DATA = DataSettings(image_size=16, workers=0)
MASK = MaskSettings(num_patches=4, min_block=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = BytesIO()
    (image or noise()).save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG with this header and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"<html>404 not found</html>", "not a picture in a known format"),
    "half a JPEG": (lambda: encoded("JPEG")[:1500], "truncated"),
    "half a PNG": (lambda: encoded("PNG")[:3000], "truncated|broken|unexpected"),
    "half a WebP": (lambda: encoded("WEBP")[:1500], "."),
    "half a TIFF": (lambda: encoded("TIFF", compression="tiff_lzw")[:1500], "."),
    "PNG with a flipped byte": (lambda: flipped(encoded("PNG"), 4000), "."),
    "large PNG header": (lambda: png_of_size(10_000, 10_000), "more than 89478485 pixels"),
    "bomb": (lambda: png_of_size(60_000, 60_000), "more than 89478485 pixels"),
    "floating point": (lambda: encoded("TIFF", Image.fromarray(np.ones((4, 4), np.float32))), "floating-point"),
    "PostScript": (lambda: encoded("EPS"), "not a picture in a known format"),
}


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_a_bad_picture_with_its_reason(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    path = tmp_path / "bad.jpg"
    path.write_bytes(make())
    with pytest.raises(BadPicture, match=reason) as caught:
        decode(path)
    assert caught.value.path == str(path)
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("error", [ValueError, IndexError, TypeError, struct.error, MemoryError, SyntaxError, EOFError])
def test_whatever_a_reader_raises_is_a_bad_picture(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))

    def fail(self: object) -> None:
        raise error("inside the decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadPicture, match=rf"{error.__name__.rsplit('.', 1)[-1]}: inside the decoder"):
        decode(tmp_path / "a.png")


def test_an_interrupt_is_not_a_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(tmp_path / "a.png")


def test_the_size_in_the_header_is_bounded_before_pixels_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 64 * 64)
    assert decode(tmp_path / "a.png").size == (64, 64)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadPicture, match="64 x 64 is more than 4095 pixels"):
        decode(tmp_path / "a.png")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadPicture, match="not a regular file"):
        decode(tmp_path / "pipe.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_bad_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadPicture, match="Permission denied"):
        decode(tmp_path / "a.png")


def test_a_file_that_the_storage_refuses_is_a_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decode_module.os, "stat", refuse)
    with pytest.raises(BadPicture, match=r"a\.png: Permission denied$"):
        decode(tmp_path / "a.png")


def decoded(tmp_path: Path, data: bytes) -> np.ndarray:
    (tmp_path / "picture").write_bytes(data)
    image = decode(tmp_path / "picture")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = decoded(tmp_path, encoded(kind, Image.fromarray(ramp)))
        assert np.array_equal(pixels[0], np.arange(256)[:, None].repeat(3, 1)), kind


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    expected = [[255, 0, 0], [255, 255, 255]]
    assert decoded(tmp_path, encoded("PNG", half))[0].tolist() == expected
    palette = half.quantize(4)
    assert decoded(tmp_path, encoded("PNG", palette))[0].tolist() == expected
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decoded(tmp_path, encoded("PNG", grey))[0].tolist() == [[255, 255, 255]]
    keyed = Image.new("RGB", (1, 1), (9, 9, 9))
    assert decoded(tmp_path, encoded("PNG", keyed, transparency=(9, 9, 9)))[0].tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_other_colour_models_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), "white").convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    assert decoded(tmp_path, encoded(kind, image)).min() >= 253


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_read(kind: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ("black", "white"))
    pixels = decoded(tmp_path, encoded(kind, first, save_all=True, append_images=[second]))
    assert pixels.max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_and_its_size_told_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 24, 16))  # bright top left
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a").write_bytes(encoded(kind, image, exif=exif))
    told = []

    def needed(width: int, height: int) -> tuple[int, int]:
        told.append((width, height))
        return 24, 16

    got = decode(tmp_path / "a", needed)
    assert told == [(48, 32)]
    assert got.size == ((24, 16) if kind == "JPEG" else (48, 32))
    small = np.asarray(got.resize((2, 2), Image.Resampling.BOX))[..., 0] > 127
    assert small.tolist() == [[True, False], [False, False]]


def test_damaged_metadata_spoils_no_picture(tmp_path: Path) -> None:
    assert decoded(tmp_path, encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (64, 64, 3)


def folder_of(tmp_path: Path, good: int, bad: int) -> ImageFolder:
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(good):
        Image.new("RGB", (20, 20), (i, i, i)).save(root / f"good {i:03}.png")
    for i in range(bad):
        (root / f"schlecht {i:03} ü.jpg").write_bytes(b"no picture")
    return ImageFolder(root)


def batches(source: ImageFolder, steps: int = 5, **changes: object) -> list[Batch]:
    arguments = {"global_batch": 8, "micro_batch": 8, "seed": 0, "num_steps": steps} | changes
    return list(train_loader(source, DATA, MASK, 4, 16, **arguments))  # type: ignore[arg-type]


def test_bad_pictures_are_replaced_and_told(tmp_path: Path) -> None:
    source = folder_of(tmp_path, good=30, bad=10)
    epoch = batches(source)
    assert all(batch.patch_view.shape == (8, 3, 16, 16) for batch in epoch)
    assert sorted(torch.cat([batch.sample_ids for batch in epoch]).tolist()) == list(range(40))
    bad = [file for batch in epoch for file in batch.bad]
    assert {Path(file.name).name for file in bad} == {f"schlecht {i:03} ü.jpg" for i in range(10)}
    assert {file.reason for file in bad} == {"not a picture in a known format"}
    for batch in epoch:
        assert len({int(view.max()) for view in batch.patch_view}) > 1  # not always the same replacement


def test_the_replacement_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    source = folder_of(tmp_path, good=30, bad=10)
    whole = torch.cat([batch.patch_view for batch in batches(source)])
    parts = torch.cat([batch.patch_view for batch in batches(source, micro_batch=2)])
    assert torch.equal(whole, parts)


def test_one_odd_picture_of_one_pixel_is_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    Image.new("RGB", (1, 1), "red").save(root / "dot.png")
    (batch,) = batches(ImageFolder(root), steps=1, global_batch=1, micro_batch=1)
    assert batch.patch_view.shape == (1, 3, 16, 16)


def test_a_source_with_hardly_a_readable_picture_stops(tmp_path: Path) -> None:
    source = folder_of(tmp_path, good=0, bad=10)
    with pytest.raises(UserError, match=r"21 pictures drawn.*schlecht.*not a picture"):
        batches(source)
    with pytest.raises(UserError, match="21 pictures drawn"):
        list(val_batches(source, DATA, MASK, 4, 16, batch_size=4, seed=0))


def test_a_folder_without_a_readable_picture_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of 10 pictures tried.*schlecht 000 ü\.jpg: not a picture"):
        check_readable(folder_of(tmp_path, good=0, bad=10))


def test_one_readable_picture_among_bad_ones_is_found(tmp_path: Path) -> None:
    check_readable(folder_of(tmp_path, good=1, bad=9))


def batch_of(good: int, bad: int, start: int = 0) -> Batch:
    nothing = torch.zeros(0)
    files = [BadFile(f"{start + i}.jpg", "the file is empty") for i in range(bad)]
    return Batch(nothing, nothing, nothing, torch.arange(good), files, Making(0, 0.0, 0.0))


def test_bad_pictures_are_counted_once_and_listed() -> None:
    log = BadPictureLog(0.5)
    log.add(batch_of(8, 2))
    log.add(batch_of(8, 2, start=1))
    assert log.count == 3
    assert log.names == ["0.jpg", "1.jpg", "2.jpg"]
    assert log.reasons["0.jpg"] == "the file is empty"
    assert (log.reads, log.bad_reads) == (20, 4)


def test_too_many_bad_pictures_stop_the_run_with_the_first_reason() -> None:
    log = BadPictureLog(0.05)
    log.add(batch_of(1000, 50))
    with pytest.raises(UserError, match=r"data\.max_bad_share = 0\.05.*0\.jpg: the file is empty"):
        log.add(batch_of(400, 150))


def test_a_few_bad_pictures_at_the_start_stop_nothing() -> None:
    log = BadPictureLog(0.05)
    log.add(batch_of(3, 3))
    log.add(batch_of(90, 0))
    assert log.count == 3


def test_bad_luck_at_the_allowed_share_stops_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        log = BadPictureLog(0.05)
        for bad in rng.binomial(64, 0.045, 200):
            log.add(batch_of(64 - bad, bad))


def test_where_no_bad_picture_is_allowed_the_first_stops() -> None:
    log = BadPictureLog(0.0)
    log.add(batch_of(8, 0))
    with pytest.raises(UserError, match="1 of 17 pictures"):
        log.add(batch_of(8, 1))
