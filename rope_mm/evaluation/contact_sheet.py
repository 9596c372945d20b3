"""An image grid: rows of images, each with its caption, as a PNG file."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import Tensor

from rope_mm.checks.extras import extra
from rope_mm.files import write_file

with extra("train"):
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    from rope_mm.data.pixels import to_image

GAP, TEXT, TILE = 4, 14, 48  # pixels between images, of a letter, and of an image at least
MARGIN = 320  # pixels of a caption's line at most
MORE = "…"


def save_sheet(path: Path, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> None:
    """Write images, as many in each row, with the row's caption beside them.

    A caption is wrapped, and cut where it is taller than its row. An image that is smaller than another one
    stands at the top left of its place.

    Args:
        path: of the PNG file.
        images: n of (ch, y, x) in [-1, 1], n a multiple of the captions; alpha is composited on white.
        captions: one for each row.

    Raises:
        ValueError: images that do not fill the rows.
    """
    columns, rest = divmod(len(images), len(captions)) if captions else (0, 1)
    if rest or not columns:
        raise ValueError(f"{len(images)} images do not fill {len(captions)} rows of equal length")
    most = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
    zoom = -(-TILE // max(most))
    height, width = (size * zoom for size in most)
    font: Any = ImageFont.load_default(TEXT)
    texts = [fit_caption(caption, font, height) for caption in captions]
    margin = int(max(font.getlength(line) for lines in texts for line in lines)) + 2 * GAP
    sheet = PILImage.new("RGB", (margin + columns * (width + GAP), len(captions) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, lines in enumerate(texts):
        top = row * (height + GAP) + (height - len(lines) * TEXT) // 2
        for number, line in enumerate(lines):
            draw.text((GAP, top + number * TEXT), line, fill="black", font=font)
    for place, pixels in enumerate(images):
        row, column = divmod(place, columns)
        size = pixels.shape[-1] * zoom, pixels.shape[-2] * zoom
        tile = to_image(pixels).resize(size, PILImage.Resampling.NEAREST)
        sheet.paste(tile, (margin + column * (width + GAP), row * (height + GAP)))
    write_file(path, lambda part: sheet.save(part, format="PNG"))


def fit_caption(caption: str, font: Any, height: int) -> list[str]:
    """The lines of a caption, as many as fit a row; the last one ends in three dots where text is cut.

    Args:
        caption: of any length.
        font: what lines are written in.
        height: of the row, in pixels.
    """
    text, most = " ".join(caption.split()), max(height // TEXT, 1)
    if font.getlength(text) <= MARGIN:
        return [text]
    letters = max(int(MARGIN / font.getlength("n")), 1)
    lines = wrap(text, letters, max_lines=most, placeholder=MORE)
    return [shorten(line, font) for line in lines]


def shorten(line: str, font: Any) -> str:
    """The line, or as much of it as the margin has room for."""
    if font.getlength(line) <= MARGIN:
        return line
    fits = next(n for n in range(len(line) - 1, -1, -1) if not n or font.getlength(line[:n] + MORE) <= MARGIN)
    return line[:fits] + MORE
