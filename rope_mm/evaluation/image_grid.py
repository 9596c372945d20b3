"""A contact sheet: rows of pictures, each with its caption, as a PNG that a person can judge."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch import Tensor

from rope_mm.files import write_file

GAP, TEXT, TILE = 4, 14, 48  # pixels between pictures, of a letter, and of a picture at least


def save_sheet(path: Path, pictures: Tensor, captions: Sequence[str]) -> None:
    """Write pictures (n, ch, y, x) in [-1, 1], n / len(captions) in a row, the caption beside it.

    Raises:
        ValueError: pictures that do not fill the rows.
    """
    columns, rest = divmod(len(pictures), len(captions))
    if rest or not columns:
        raise ValueError(f"{len(pictures)} pictures do not fill {len(captions)} rows of equal length")
    zoom = -(-TILE // max(pictures.shape[-2:]))
    height, width = (size * zoom for size in pictures.shape[-2:])
    font = ImageFont.load_default(TEXT)
    margin = int(max(font.getlength(caption) for caption in captions)) + 2 * GAP
    sheet = Picture.new("RGB", (margin + columns * (width + GAP), len(captions) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        draw.text((GAP, row * (height + GAP) + (height - TEXT) // 2), caption, fill="black", font=font)
    grey = pictures.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    for place, pixels in enumerate(grey.permute(0, 2, 3, 1).squeeze(-1).numpy()):
        row, column = divmod(place, columns)
        picture = Picture.fromarray(pixels).resize((width, height), Picture.Resampling.NEAREST)
        sheet.paste(picture, (margin + column * (width + GAP), row * (height + GAP)))
    write_file(path, lambda part: sheet.save(part, format="PNG"))
