"""Anything that `datasets` loads -> captioned images as tensors."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetDict
from PIL import Image as Picture
from PIL import ImageOps
from torch import Tensor

from rope_mm.data.captioned_sprites import captioned_clips, captioned_sprites
from rope_mm.data.digits import captioned_digits

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class CaptionedImages:
    """Rows of a split as images in [-1, 1] (b, ch, size, size), captions, and labels where there is a column.

    An image of another shape is cropped to a centred square and resized.

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
    ):
        check_rows(rows, channels, image, caption, label)
        self.captions = read_captions(rows[caption], caption)
        self.labels = read_labels(rows[label], label) if label else None
        if not isinstance(rows.features[image], datasets.Image):
            raise ValueError(f"column {image!r} holds {rows.features[image]}, not images")
        # undecoded, so that an image which cannot be read is named by its row
        self.rows = rows.cast_column(image, datasets.Image(decode=False))
        self.size, self.channels = size, channels
        self.image = image

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Images (b, ch, size, size) in [-1, 1]; all of them if no indices are given.

        Raises:
            ValueError: an image that cannot be decoded, with its row.
        """
        wanted = range(len(self)) if indices is None else [int(i) for i in indices]
        return torch.stack([self.decode(row, self.rows[row][self.image]) for row in wanted])

    def examples(self, count: int) -> list[str]:
        """Captions to show: the first of each label in order, or the first different ones."""
        if self.labels is None:
            return list(dict.fromkeys(self.captions))[:count]
        first = dict(reversed(list(zip(self.labels.tolist(), self.captions, strict=True))))
        return [first[label] for label in sorted(first)][:count]

    def decode(self, row: int, stored: dict) -> Tensor:
        """One image (ch, size, size) from what `datasets` stores: bytes or a path."""
        try:
            return decode_picture(stored, self.size, self.channels)
        except ValueError as error:
            raise ValueError(f"row {row}, column {self.image!r}: {error}") from error


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


def open_picture(stored: dict) -> Picture.Image:
    """A picture from what `datasets` stores: bytes or a path."""
    return Picture.open(BytesIO(stored["bytes"] or Path(stored["path"]).read_bytes()))


def fit_picture(picture: Picture.Image, size: int, channels: int) -> Tensor:
    """Pixels (ch, size, size), uint8, of a picture cropped to a centred square and resized."""
    fitted = ImageOps.fit(picture.convert(MODES[channels]), (size, size), Picture.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1)


def decode_picture(stored: dict | None, size: int, channels: int) -> Tensor:
    """One image (ch, size, size) in [-1, 1] from what `datasets` stores, cropped to a square and resized.

    Raises:
        ValueError: one that cannot be decoded.
    """
    try:
        return fit_picture(open_picture(stored), size, channels) / 127.5 - 1  # pyright: ignore[reportArgumentType]
    except UNREADABLE as error:
        raise ValueError(f"{(stored or {}).get('path') or 'the image'} does not decode ({error})") from error


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
    "clips": captioned_clips,
}


def load_splits(path: str) -> DatasetDict:
    """Splits train and test of a source in `EMBEDDED`, a folder, a parquet file or a hub name.

    Where there is no test or validation split, a fifth of the rows is held out.

    Raises:
        ValueError: what `datasets` cannot load.
    """
    if path in EMBEDDED:
        return EMBEDDED[path]()
    try:
        if Path(path).suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=path)
        else:
            loaded = datasets.load_dataset(path)
    # what a source of any format may raise is for `datasets` to know
    except Exception as error:
        raise ValueError(f"`datasets` cannot load {path!r}: {error}".splitlines()[0]) from error
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for name in ("test", "validation"):
        if name in loaded and loaded[name] is not train:
            return DatasetDict({"train": train, "test": loaded[name]})
    return train.train_test_split(test_size=0.2, seed=0)


def load_images(
    path: str = "digits",
    size: int = 8,
    channels: int = 1,
    image: str = "image",
    caption: str = "caption",
    label: str = "",
) -> tuple[CaptionedImages, CaptionedImages]:
    """Train and test images of a source; see `load_splits` and `CaptionedImages`."""
    splits, columns = load_splits(path), (image, caption, label)
    return (
        CaptionedImages(splits["train"], size, channels, *columns),
        CaptionedImages(splits["test"], size, channels, *columns),
    )
