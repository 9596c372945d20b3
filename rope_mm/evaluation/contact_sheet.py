"""An image grid: rows of images, each with its caption, as a PNG file."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from importlib.util import find_spec
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
HEAD = TEXT + GAP  # pixels above the first row
DATA_ROWS = 32  # of a sheet of data
LOOKED_AT = 512  # rows at most, of which a sheet shows each kind of file
MARGIN = 320  # pixels of a caption's line at most
MORE = "…"
NO_LETTER = "\uffff"  # which no font has
SYSTEM_FONTS = "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf"


def save_sheet(path: Path, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> None:
    """Write images, as many in each row, with the row's caption beside them.

    A caption is wrapped, and cut where it is taller than its row. An image that is smaller than another one
    stands at the top left of its place. Above the columns is the size of their images, height x width, where
    it is another one than to the left.

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
    font = caption_font(captions)
    texts = [fit_caption(caption, font, height) for caption in captions]
    margin = int(max(font.getlength(line) for lines in texts for line in lines)) + 2 * GAP
    sizes = [describe_size(images[column::columns]) for column in range(columns)]
    width = max(width, *(int(font.getlength(text)) + 1 for text in sizes))  # a narrow image has a wide size
    size = margin + columns * (width + GAP), HEAD + len(captions) * (height + GAP)
    sheet = PILImage.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(sizes):
        if column == 0 or text != sizes[column - 1]:
            draw.text((margin + column * (width + GAP), 1), text, fill="black", font=font)
    for row, lines in enumerate(texts):
        top = HEAD + row * (height + GAP) + (height - len(lines) * TEXT) // 2
        for number, line in enumerate(lines):
            draw.text((GAP, top + number * TEXT), line, fill="black", font=font)
    for place, pixels in enumerate(images):
        row, column = divmod(place, columns)
        size = pixels.shape[-1] * zoom, pixels.shape[-2] * zoom
        tile = to_image(pixels).resize(size, PILImage.Resampling.NEAREST)
        sheet.paste(tile, (margin + column * (width + GAP), HEAD + row * (height + GAP)))
    write_file(path, lambda part: sheet.save(part, format="PNG"))


def save_data_sheet(
    path: Path,
    train: Sized,
    held_out: Sized,
    read: Callable[[Any, int], Iterable[tuple[Tensor, str]]],
    kind: Callable[[Any, int], Hashable] = lambda split, row: None,
) -> None:
    """Write images of some rows of a data set below one another, with size, height x width, and caption.

    Each kind of file has a row, as far as there is room, and the others are evenly apart.

    Args:
        path: of the PNG file; without an image none is written.
        train: rows to train on.
        held_out: held-out ones, named as such.
        read: (train or held_out, number of a row) -> its images (ch, y, x) in [-1, 1] with their captions.
        kind: (train or held_out, number of a row) -> what kind of file it holds; None for no matter which.
    """

    def place(number: int) -> tuple[Sized, int]:
        held = number >= len(train)
        return (held_out, number - len(train)) if held else (train, number)

    images, texts = [], []
    for number in choose_rows(len(train) + len(held_out), lambda number: kind(*place(number))):
        split, row = place(number)
        held = split is held_out
        for image, caption in read(split, row):
            images.append(image)
            texts.append(f"{describe_size([image])} {'held out: ' if held else ''}{caption}")
    if images:
        save_sheet(path, images, texts)


def describe_size(images: Tensor | Sequence[Tensor]) -> str:
    """Height x width of images; empty where they differ."""
    sizes = {tuple(image.shape[-2:]) for image in images}
    return "x".join(map(str, sizes.pop())) if len(sizes) == 1 else ""


def choose_rows(count: int, kind: Callable[[int], Hashable]) -> list[int]:
    """Numbers of at most DATA_ROWS rows of `count`: the first of each kind, the others evenly apart.

    Args:
        count: rows.
        kind: number of a row -> its kind, or None.
    """
    first: dict[Hashable, int] = {}
    for number in spread(count, LOOKED_AT):
        first.setdefault(kind(number), number)
    first.pop(None, None)
    chosen = set(list(first.values())[:DATA_ROWS])
    others = [number for number in range(count) if number not in chosen] if count <= LOOKED_AT else ()
    rest = DATA_ROWS - len(chosen)
    more = [others[i] for i in spread(len(others), rest)] if others else spread(count, rest)
    return sorted(chosen.union(more))


def spread(count: int, most: int = DATA_ROWS) -> list[int]:
    """Numbers of at most `most` rows of `count`, evenly apart."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def caption_font(captions: Sequence[str]) -> Any:
    """The first font that has every letter of the captions, or else the most of them.

    Args:
        captions: in any language.
    """
    letters = {letter for caption in captions for letter in caption if not letter.isspace()}
    best, most = None, -1
    for font in find_fonts():
        unknown = bytes(font.getmask(NO_LETTER))
        known = sum(bytes(font.getmask(letter)) != unknown for letter in letters)
        if known > most:
            best, most = font, known
        if known == len(letters):
            break
    return best


def find_fonts() -> Iterator[Any]:
    """PIL's own font, which has hardly more than ASCII, then those of matplotlib and of the system."""
    yield ImageFont.load_default(TEXT)
    package = find_spec("matplotlib")
    folders = package.submodule_search_locations if package else None
    carried = [
        str(Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf") for folder in folders or ()
    ]
    for name in (*carried, *SYSTEM_FONTS):
        with suppress(OSError):  # it is not installed
            yield ImageFont.truetype(name, TEXT)


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
