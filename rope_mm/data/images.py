"""Anything that `datasets` loads -> captioned images as tensors."""

import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import datasets
import fsspec
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image as Picture
from PIL import ImageOps
from torch import Tensor

from rope_mm.data.synthetic.captioned_sprites import captioned_sprites, captioned_videos
from rope_mm.data.synthetic.digits import captioned_digits
from rope_mm.data.synthetic.stacked import read_npz, stack_digits, stacked_digits

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class CaptionedImages:
    """Rows of a split as images in [-1, 1] (b, ch, size, size), captions, and labels where there is a column.

    An image of another shape is cropped to a centred square and resized. Without a caption column all
    captions are empty. `keep` decodes all images at once and holds their bytes, for small data read often.

    Raises:
        ValueError: a column that is missing, with those there are.
    """

    def __init__(
        self,
        rows: Dataset,
        size: int,
        channels: int,
        image: str = "image",
        caption: str = "caption",
        label: str = "",
        keep: bool = False,
    ):
        check_rows(rows, channels, image, caption, label)
        self.captions = read_captions(rows[caption], caption) if caption else [""] * len(rows)
        self.labels = read_labels(rows[label], label) if label else None
        if not isinstance(rows.features[image], datasets.Image):
            raise ValueError(f"column {image!r} holds {rows.features[image]}, not images")
        # undecoded, so that an image which cannot be read is named by its row
        self.rows = rows.cast_column(image, datasets.Image(decode=False))
        self.size, self.channels = size, channels
        self.image = image
        self.kept = self.decode(range(len(rows))) if keep else None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Images (b, ch, size, size) in [-1, 1]; all of them if no indices are given.

        Raises:
            ValueError: an image that cannot be decoded, with its row.
        """
        wanted = range(len(self)) if indices is None else [int(i) for i in indices]
        pixels = self.decode(wanted) if self.kept is None else self.kept[list(wanted)]
        return pixels / 127.5 - 1

    def examples(self, count: int) -> list[str]:
        """Captions to show: of each label the first one, labels evenly apart, or the first different ones."""
        if self.labels is None:
            return list(dict.fromkeys(self.captions))[:count]
        first = dict(reversed(list(zip(self.labels.tolist(), self.captions, strict=True))))
        shown = min(count, len(first))
        return [first[sorted(first)[i * len(first) // shown]] for i in range(shown)]

    def decode(self, rows: Sequence[int]) -> Tensor:
        """Pixels (b, ch, size, size) of rows, uint8."""
        stored = self.rows[list(rows)][self.image]
        return torch.stack([self.decode_one(row, file) for row, file in zip(rows, stored, strict=True)])

    def decode_one(self, row: int, stored: dict) -> Tensor:
        """Pixels (ch, size, size) from what `datasets` stores: bytes or a path."""
        try:
            return resize_center_crop(open_image(stored), self.size, self.channels)
        except UNREADABLE as error:
            message = f"row {row}, column {self.image!r}: the image does not decode ({error})"
            raise ValueError(message) from error


def check_rows(rows: Dataset, channels: int, *columns: str) -> None:
    """Refuse rows without these columns, where they have a name, and channels that no image has.

    Raises:
        ValueError: with the columns that there are.
    """
    for column in filter(None, columns):
        if column not in rows.column_names:
            raise ValueError(f"the data has no column {column!r}; it has {', '.join(rows.column_names)}")
    if channels not in MODES:
        raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
    if not len(rows):
        raise ValueError("the data has no rows")


# what opening and fitting a picture raise if its bytes are none
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, Picture.DecompressionBombError)


def open_image(stored: dict) -> Picture.Image:
    """A picture from what `datasets` stores: bytes or a path, in a stream perhaps to a file elsewhere.

    Raises:
        ValueError: what does not decode, with its path where there is one.
    """
    content, path = stored["bytes"], stored["path"]
    if not content:
        with cast(Any, fsspec.open(os.fspath(path))) as file:
            content = file.read()
    try:
        picture = Picture.open(BytesIO(content))
        picture.load()  # here, where its path is known
    except UNREADABLE as error:
        reason = str(error).partition(" <_io.BytesIO")[0]
        raise ValueError(f"{reason}: {path}" if path else reason) from error
    return picture


def resize_center_crop(picture: Picture.Image, size: int, channels: int) -> Tensor:
    """Pixels (ch, size, size), uint8, of a picture cropped to a centred square and resized."""
    fitted = ImageOps.fit(picture.convert(MODES[channels]), (size, size), Picture.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1)


def read_captions(column: Sequence, name: str) -> list[str]:
    """The captions of a column, all of them text.

    Raises:
        ValueError: the first row that is not.
    """
    captions = list(column)
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"row {row}, column {name!r}: a caption is text, not {caption!r}")
    return captions


def read_labels(column: Sequence, name: str) -> Tensor:
    """The labels (n,) of a column, counted from 0.

    Raises:
        ValueError: the first row that holds no such number.
    """
    labels = list(column)
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"row {row}, column {name!r}: a label is a whole number from 0, not {label!r}")
    return torch.tensor(labels)


EMBEDDED: dict[str, Callable[[], DatasetDict]] = {
    "digits": captioned_digits,
    "sprites": captioned_sprites,
    "videos": captioned_videos,
    "stacked-digits": stacked_digits,
}


BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json"}  # of files, by how their names end


def load_splits(path: str) -> DatasetDict:
    """Splits train and test of an embedded source, a folder, a hub name, or parquet, tar, jsonl or npz files.

    Several files of one kind, but npz, are named by a pattern such as "shards/*.tar".

    Where there is no test or validation split, a fifth of the rows is held out. "stacked:PATH" stacks the
    digits of any of them, as `stack_digits` does.

    Raises:
        ValueError: what `datasets` cannot load, stacks of what are no digits.
    """
    if path in EMBEDDED:
        return EMBEDDED[path]()
    if path.startswith("stacked:"):
        return stack_digits(load_splits(path.removeprefix("stacked:")))
    if Path(path).suffix == ".npz":
        return read_npz(path)
    train, test = choose_splits(load(path))
    if test is None:
        return train.train_test_split(test_size=0.2, seed=0)
    return DatasetDict({"train": train, "test": test})


def load(path: str, **how: Any) -> Any:
    """All splits of a path, as `datasets` loads it.

    Raises:
        ValueError: what it cannot load.
    """
    builder = BUILDERS.get(Path(path).suffix)
    try:
        if builder:
            return datasets.load_dataset(builder, data_files=path, **how)
        return datasets.load_dataset(path, **how)
    # what a source of any format may raise is for `datasets` to know
    except Exception as error:
        raise ValueError(f"`datasets` cannot load {path!r}: {error}".splitlines()[0]) from error


def choose_splits(loaded: Mapping[str, Any]) -> tuple[Any, Any]:
    """The split to train on, and the one to test on or None."""
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    others = (loaded[name] for name in ("test", "validation") if name in loaded)
    return train, next((rows for rows in others if rows is not train), None)


def select_rows(splits: DatasetDict, where: Mapping[str, Sequence[Any]]) -> DatasetDict:
    """The rows of each split that hold one of the values named, column by column; labels by name or number.

        select_rows(load_splits("sprites"), {"shape": ["circle", "ring"], "row": [0]})

    Raises:
        ValueError: a column or a label that the data lacks, values that leave a split without rows.
    """
    for column, values in where.items():
        found = {name: rows.select(find_rows(rows, column, values)) for name, rows in splits.items()}
        if empty := [name for name, rows in found.items() if not len(rows)]:
            raise ValueError(f"no row of {empty[0]} holds one of {list(values)} in column {column!r}")
        splits = DatasetDict(found)
    return splits


def find_rows(rows: Dataset, column: str, values: Sequence[Any]) -> list[int]:
    """Numbers of the rows that hold one of the values in a column."""
    check_rows(rows, next(iter(MODES)), column)
    label = rows.features[column]
    names = label.names if isinstance(label, ClassLabel) else []
    if unknown := [value for value in values if names and isinstance(value, str) and value not in names]:
        raise ValueError(f"column {column!r} has no {unknown[0]!r}; it has {', '.join(names)}")
    wanted = [names.index(value) if value in names else value for value in values]
    return [row for row, stored in enumerate(rows.select_columns([column])[column]) if stored in wanted]


def load_images(
    path: str = "digits",
    size: int = 8,
    channels: int = 1,
    image: str = "image",
    caption: str = "caption",
    label: str = "",
    keep: bool = False,
) -> tuple[CaptionedImages, CaptionedImages]:
    """Train and test images of a source; see `load_splits` and `CaptionedImages`."""
    splits, columns = load_splits(path), (image, caption, label, keep)
    return (
        CaptionedImages(splits["train"], size, channels, *columns),
        CaptionedImages(splits["test"], size, channels, *columns),
    )
