"""Pictures of a report: covering patches, embedding, the four captioned rows, the sheet for documentation."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from .content import PictureRow, Pixels

# A cool grey of middle lightness reads as "covered" on paper and on black, and differs from the grey of a drawing.
COVER = (138, 146, 160)
COVER_EDGE = (122, 130, 145)

STAGES = ("given", "masked", "reconstructed", "filled")


def mask_picture(picture: Pixels, masked_positions: Sequence[int] | np.ndarray, patch_size: int) -> Pixels:
    """A copy of a picture with patches covered in a neutral tone, their edges drawn.

    Args:
        picture: uint8 [H, W, 3], sides divisible by the patch.
        masked_positions: patches counted row by row in the [H / patch, W / patch] grid; -1 is padding and ignored.
        patch_size: side of a patch in pixels.

    Raises:
        ValueError: the picture is not uint8 [H, W, 3], its sides are not divisible, or a position is outside the grid.
    """
    check_picture(picture)
    height, width = picture.shape[:2]
    rows, columns = height // patch_size, width // patch_size
    if (rows * patch_size, columns * patch_size) != (height, width):
        raise ValueError(f"a picture of {width} x {height} is not divisible into patches of {patch_size}")
    covered = picture.copy()
    for position in (int(p) for p in masked_positions if p != -1):
        if not 0 <= position < rows * columns:
            raise ValueError(f"position {position} is outside the {columns} x {rows} patches of the picture")
        top, left = (index * patch_size for index in divmod(position, columns))
        patch = covered[top : top + patch_size, left : left + patch_size]
        patch[:] = COVER
        if patch_size >= 4:
            patch[-1] = COVER_EDGE
            patch[:, -1] = COVER_EDGE
    return covered


def check_picture(picture: np.ndarray) -> None:
    """Raise ValueError unless the array is uint8 [H, W, 3]."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"expected a uint8 picture [H, W, 3], got {picture.dtype} {list(picture.shape)}")


def data_uri(picture: Pixels) -> str:
    """A picture as a `data:` address holding a PNG, lossless."""
    check_picture(picture)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def outline(row: PictureRow) -> str:
    """The border of the hidden region as an SVG laid over a picture; empty when the positions are not known."""
    height, width = row.given.shape[:2]
    size = row.patch_size or 0
    hidden = {int(position) for position in row.masked_positions if position != -1}
    if not size or not hidden or width % size or height % size:
        return ""
    columns = width // size
    cells = {divmod(position, columns) for position in hidden}
    edges = []
    for y, x in sorted(cells):
        edges += [f"M{x} {y}h1"] * ((y - 1, x) not in cells) + [f"M{x} {y + 1}h1"] * ((y + 1, x) not in cells)
        edges += [f"M{x} {y}v1"] * ((y, x - 1) not in cells) + [f"M{x + 1} {y}v1"] * ((y, x + 1) not in cells)
    path = "".join(edges)
    return (
        f'<svg class="outline" viewBox="0 0 {columns} {height // size}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="under" d="{path}"/><path d="{path}"/></svg>'
    )


def captions(rows: Sequence[PictureRow]) -> dict[str, tuple[str, str]]:
    """Title and sentence of each stage that every example has, in order."""
    hidden = {sum(position != -1 for position in row.masked_positions) for row in rows}
    first = rows[0]
    patches = ""
    if first.patch_size and len(hidden) == 1 and (count := hidden.pop()):
        total = (first.given.shape[0] // first.patch_size) * (first.given.shape[1] // first.patch_size)
        patches = f": {count} of {total} patches are hidden"
    texts = {
        "given": ("As given", "Held-out pictures, never trained on."),
        "masked": ("Masked", f"All that the model gets{patches}."),
        "reconstructed": ("Tokenizer", "Everything seen, coded into tokens and decoded: the best that can be reached."),
        "filled": ("Model", "The hidden tokens guessed by the model, the others as above."),
    }
    return {stage: texts[stage] for stage in STAGES if all(getattr(row, stage) is not None for row in rows)}


def picture_rows(rows: Sequence[PictureRow]) -> str:
    """The stages as captioned rows of pictures, one column an example; HTML, complete without a script.

    Raises ValueError for an array that is not uint8 [H, W, 3].
    """
    if not rows:
        return '<p class="absent">No held-out pictures were kept for this report.</p>'
    shown = captions(rows)
    parts = [f'<div class="pictures" style="--n:{len(rows)};--stages:{len(shown)}">']
    for r, (stage, (title, sentence)) in enumerate(shown.items(), start=1):
        parts.append(f'<figure class="stage {stage}"><figcaption style="--r:{r}">')
        parts.append(f"<b>{escape(title)}</b> <span>{escape(sentence)}</span></figcaption>")
        for c, row in enumerate(rows, start=1):
            picture: Pixels = getattr(row, stage)
            height, width = picture.shape[:2]
            parts.append(
                f'<div class="cell" style="--r:{r};--c:{c}"><div class="frame">'
                f'<img src="{data_uri(picture)}" width="{width}" height="{height}" '
                f'alt="Held-out picture {c}: {escape(title.lower())}">'
            )
            parts.append(outline(row) if stage == "filled" else "")
            parts.append("</div>")
            if stage == "filled" and row.tokens_right is not None:
                hidden = sum(position != -1 for position in row.masked_positions)
                of = f" of {hidden}" if hidden else ""
                parts.append(f"<small>{row.tokens_right}{of} right</small>")
            parts.append("</div>")
        parts.append("</figure>")
    parts.append("</div>")
    if "filled" not in shown:
        parts.append(
            '<p class="absent">This tokenizer has no decoder, so neither its tokens nor the guesses can be drawn.</p>'
        )
    return "".join(parts)


def picture_sheet(rows: Sequence[PictureRow], path: Path) -> None:
    """Write the stages as one PNG, a stage a row and an example a column, on white.

    Small pictures are enlarged by a whole factor. Raises ValueError when there is no example.
    """
    if not rows:
        raise ValueError("a picture sheet needs at least one example")
    stages = list(captions(rows))
    height, width = rows[0].given.shape[:2]
    factor = max(1, 128 // width)
    cell_h, cell_w, gap = height * factor, width * factor, max(4, width * factor // 16)
    size = (gap + len(rows) * (cell_w + gap), gap + len(stages) * (cell_h + gap))
    sheet = Image.new("RGB", size, "white")
    for r, stage in enumerate(stages):
        for c, row in enumerate(rows):
            picture = Image.fromarray(getattr(row, stage)).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + c * (cell_w + gap), gap + r * (cell_h + gap)))
    sheet.save(path, "PNG", optimize=True)
