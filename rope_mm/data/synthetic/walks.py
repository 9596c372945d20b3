"""Walk cycles of pixel-art characters, from a folder with sheets of their parts.

The sheets are those of the Liberated Pixel Cup, 832 x 1344 pixels with transparency, as
github.com/YingzhenLi/Sprites has them: body-0.png, hair-3.png and so on. Their licence, CC-BY-SA 3.0, holds
for what is rendered of them. A character is one sheet of each part, laid over each other; a video is one of
its four walks.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from torch import Tensor

from rope_mm.data.pixels import UNREADABLE
from rope_mm.data.seeding import make_generator
from rope_mm.data.synthetic.captioned_sprites import encode_images

PARTS = "body", "bottomwear", "topwear", "hair", "shoes"  # from the lowest layer up
WAYS = "walking away", "walking left", "walking towards us", "walking right"  # rows of a sheet from FIRST on
CELL, FIRST, FRAMES = (
    64,
    8,
    range(1, 9),
)  # pixels of a cell; its row; its columns: in column 0 it stands still
BOX = 8, 15, 56, 63  # of a cell, where the characters are: left, top, right, bottom
SIZE = 32  # pixels of a frame's side
TRAIN, TEST = 600, 64  # characters, four videos each


def walk_cycles(folder: str | Path, train: int = TRAIN, test: int = TEST, size: int = SIZE) -> DatasetDict:
    """Splits train and test with columns frames (8), caption ("body 1, hair 0, walking left") and way.

    Test has none of the characters of train. The same sheets give the same videos.

    Args:
        folder: with sheets PART-N.png of each part.
        train: characters to train on, at most.
        test: characters to test on, at most a tenth of all, and at least one.
        size: pixels of a side.

    Raises:
        ValueError: a part without a sheet, a sheet that is none, sheets of one character alone.
    """
    parts = [sorted(Path(folder).glob(f"{part}-*.png")) for part in PARTS]
    if missing := [part for part, sheets in zip(PARTS, parts, strict=True) if not sheets]:
        raise ValueError(f"{folder} has no sheet of {', '.join(missing)}; a sheet's name is PART-N.png")
    characters = list(product(*parts))
    if len(characters) < 2:
        raise ValueError(f"{folder} has the sheets of one character; one is held out, so give sheets of more")
    test = min(test, max(1, len(characters) // 10))
    order = torch.randperm(len(characters), generator=make_generator("walks"))[: train + test].tolist()
    chosen = {"train": order[test:], "test": order[:test]}
    return DatasetDict({name: render([characters[i] for i in rows], size) for name, rows in chosen.items()})


def render(characters: list[tuple[Path, ...]], size: int) -> Dataset:
    """The four walks of each character.

    Args:
        characters: a sheet of each part.
        size: pixels of a side.
    """
    columns: dict[str, list[Any]] = {"frames": [], "caption": [], "way": []}
    for sheets in characters:
        for way, name in enumerate(WAYS):
            columns["frames"].append(encode_images(render_walk(sheets, way, size)))
            columns["caption"].append(", ".join([*(sheet.stem.replace("-", " ") for sheet in sheets), name]))
            columns["way"].append(way)
    features = {"frames": List(Image()), "caption": Value("string"), "way": ClassLabel(names=list(WAYS))}
    return Dataset.from_dict(columns, features=Features(features))


def render_walk(sheets: tuple[Path, ...], way: int, size: int) -> Tensor:
    """The frames (8, 3, size, size) of a walk on white, uint8.

    Args:
        sheets: one of each part, from the lowest layer up.
        way: a row of what `read_walks` gives.
        size: pixels of a side.
    """
    strip = PILImage.new("RGBA", (CELL * FRAMES.stop, CELL), "white")
    for sheet in sheets:
        layer = read_walks(sheet).crop((0, CELL * way, strip.width, CELL * (way + 1)))
        strip = PILImage.alpha_composite(strip, layer)
    cells = (strip.crop((CELL * column, 0, CELL * (column + 1), CELL)) for column in FRAMES)
    frames = [cell.crop(BOX).resize((size, size), PILImage.Resampling.BOX).convert("RGB") for cell in cells]
    return torch.from_numpy(numpy.stack([numpy.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)


@cache
def read_walks(sheet: Path) -> PILImage.Image:
    """The walks of a sheet, RGBA, one below the other.

    Raises:
        ValueError: a file that is no image of this size.
    """
    try:
        with PILImage.open(sheet) as image:
            layers = image.convert("RGBA")
    except UNREADABLE as error:
        raise ValueError(f"{sheet} is no image: {error}") from None
    right, bottom = CELL * FRAMES.stop, CELL * (FIRST + len(WAYS))
    if layers.width < right or layers.height < bottom:
        raise ValueError(
            f"{sheet} is {layers.width} x {layers.height} pixels; its walks end at {right} x {bottom}"
        )
    return layers.crop((0, CELL * FIRST, right, bottom))
