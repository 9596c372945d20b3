"""Anything that `datasets` loads -> captioned images as tensors."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image as PILImage
from torch import Tensor

from rope_mm.data.buckets import Buckets, Size
from rope_mm.data.columns import check_rows, read_captions, read_labels, select_numbered, stored_row
from rope_mm.data.holdout import is_text, split_rows
from rope_mm.data.pixels import (
    BACKGROUND,
    MODES,
    UNREADABLE,
    check_background,
    file_kind,
    keep_aspect_ratio,
    open_image,
    resize_center_crop,
    upright_size,
)
from rope_mm.data.synthetic.captioned_sprites import (
    captioned_sprites,
    captioned_sprites_of_three_shapes,
    captioned_videos,
)
from rope_mm.data.synthetic.digits import captioned_digits
from rope_mm.data.synthetic.letters import captioned_letters
from rope_mm.data.synthetic.stacked import read_npz, stack_digits, stacked_digits
from rope_mm.data.synthetic.walks import walk_cycles


class Unreadable(ValueError):
    """A row that cannot be read: its number, its column and why.

    Attributes:
        row: its number in the split, where there is one.
    """

    row: int = -1


class CaptionedImages:
    """Rows of a split as images in [-1, 1], captions, and labels where there is a column.

    An image of another shape is cropped around its centre and resized. A caption column holds text, labels,
    which are read as their names, or lists of texts, of which `draw_captions` takes one at random.

    Args:
        rows: of `datasets`.
        size: y and x in pixels, or the side of a square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        image: name of the column of images.
        caption: name of the column of captions; "" leaves all captions empty.
        label: name of the column of labels, if any.
        cache_in_memory: decode all images at once and keep their bytes, for small data that is read often.
        background: the colour under what is transparent, where channels is 1 or 3.
        keep_aspect: pixels of a patch's side; then an image keeps its shape, in as many patches as a square
            of `size` has at most, see `keep_aspect_ratio`. None: all images are cropped to `size`.

    Attributes:
        captions: of each row, the first one where there are several.
        choices: all captions of the rows that have several.
        labels: (n,), or None.
        sizes: pixels (y, x) of each row's image.
        buckets: rows by size, in the order in which they are trained on.
        unreadable: row -> why it cannot be read, of the rows without a caption, whose caption is empty here,
            and of those whose image was tried.

    Raises:
        ValueError: a column that is missing, with those there are; columns that hold something else.
    """

    def __init__(
        self,
        rows: Dataset,
        size: int | tuple[int, int],
        channels: int,
        image: str = "image",
        caption: str = "caption",
        label: str = "",
        cache_in_memory: bool = False,
        background: str = BACKGROUND,
        keep_aspect: int | None = None,
    ):
        check_rows(rows, channels, image, caption, label)
        check_background(background)
        self.unreadable: dict[int, str] = {}
        choices = read_captions(rows, caption, self.unreadable) if caption else [[""]] * len(rows)
        self.captions = [texts[0] for texts in choices]
        self.choices = {row: texts for row, texts in enumerate(choices) if len(texts) > 1}
        self.labels = read_labels(rows, label) if label else None
        if not isinstance(rows.features[image], datasets.Image):
            raise ValueError(f"column {image!r} holds {rows.features[image]}, not images")
        # undecoded, so that an image which cannot be read is named by its row
        self.rows = rows.cast_column(image, datasets.Image(decode=False))
        self.channels, self.background, self.image = channels, background, image
        square = (size, size) if isinstance(size, int) else size
        self.sizes = self.read_sizes(size, keep_aspect) if keep_aspect else [square] * len(rows)
        self.buckets = Buckets(self.sizes)
        if cache_in_memory and len(self.buckets.sizes) > 1:
            raise ValueError(
                "cache_in_memory needs images of one size; crop them all to it, or do not cache them"
            )
        self.cache = torch.stack(self.decode_all(square)) if cache_in_memory else None

    def __len__(self) -> int:
        return len(self.rows)

    def file_kind(self, row: int) -> tuple[Any, ...] | None:
        """The kind of a row's file, see `rope_mm.data.pixels.file_kind`."""
        return file_kind(self.rows[row][self.image])

    def read_sizes(self, size: int | Size, patch_size: int) -> list[Size]:
        """Pixels (y, x) of each row's image that keeps its shape; an image is opened, but not decoded.

        Args:
            size: pixels of the side of a square with the most patches.
            patch_size: pixels of a patch's side.
        """
        if not isinstance(size, int):
            raise ValueError(f"size must be the side of a square where images keep their shape, not {size}")
        sizes = []
        for row in range(len(self.rows)):
            try:
                height, width = upright_size(self.rows[row][self.image])
            except UNREADABLE:  # named when it is read
                height, width = 1, 1
            sizes.append(keep_aspect_ratio(height, width, size, patch_size))
        return sizes

    def draw_captions(self, rows: Sequence[int] | Tensor, generator: torch.Generator) -> list[str]:
        """A caption of each of the rows, at random where there are several.

        Args:
            rows: their numbers.
            generator: of the choices; one number is drawn for each row.
        """
        drawn = torch.rand(len(rows), generator=generator).tolist()
        choices = [self.choices.get(int(row)) or [self.captions[int(row)]] for row in rows]
        return [texts[int(u * len(texts))] for texts, u in zip(choices, drawn, strict=True)]

    def images(self, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Images (b, ch, y, x) of one size in [-1, 1]; all of them if no indices are given.

        Raises:
            Unreadable: an image that cannot be decoded, with its row.
            ValueError: images of several sizes.
        """
        wanted = range(len(self)) if indices is None else [int(i) for i in indices]
        for row in wanted if self.unreadable else ():
            self.check_readable(row)
        if len(found := sorted({self.sizes[row] for row in wanted})) > 1:
            raise ValueError(f"images of one size are read together; these have {found}")
        pixels = self.decode(wanted) if self.cache is None else self.cache[list(wanted)]
        return pixels / 127.5 - 1

    def read(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, ch, y, x), and the rows (b,) that they are of.

        An image that cannot be read is replaced by the next one of its size, and `unreadable` has the reason.

        Args:
            rows: their numbers.

        Raises:
            ValueError: no image of a size can be read.
        """
        while True:
            found = [self.next_readable(int(row)) for row in rows]
            try:
                return self.images(found), torch.tensor(found)
            except Unreadable as error:
                self.unreadable[error.row] = str(error)

    def next_readable(self, row: int) -> int:
        """This row or the next one of its size that is not known as unreadable."""
        if row not in self.unreadable:
            return row
        following = (*range(row + 1, len(self)), *range(row))
        for other in following:
            if self.sizes[other] == self.sizes[row] and other not in self.unreadable:
                return other
        raise ValueError(f"no image of {self.sizes[row]} pixels can be read: {self.unreadable[row]}")

    def check_readable(self, row: int) -> None:
        """Refuse a row that is known as unreadable."""
        if row in self.unreadable:
            error = Unreadable(self.unreadable[row])
            error.row = row
            raise error

    def decode_all(self, size: Size) -> list[Tensor]:
        """Pixels (ch, y, x) of every row, black where an image cannot be read."""
        pixels = []
        for row, file in enumerate(self.rows[self.image]):
            try:
                pixels.append(self.decode_one(row, file))
            except Unreadable as error:
                self.unreadable[row] = str(error)
                pixels.append(torch.zeros(self.channels, *size, dtype=torch.uint8))
        return pixels

    def examples(self, count: int) -> list[str]:
        """Captions to show: of each label the first one, labels evenly apart, or the first different ones."""
        rows = [row for row in range(len(self)) if row not in self.unreadable]
        if self.labels is None:
            return list(dict.fromkeys(self.captions[row] for row in rows))[:count]
        labels = self.labels.tolist()
        first = {labels[row]: self.captions[row] for row in reversed(rows)}
        shown = min(count, len(first))
        return [first[sorted(first)[i * len(first) // shown]] for i in range(shown)]

    def decode(self, rows: Sequence[int]) -> Tensor:
        """Pixels (b, ch, y, x) of rows, uint8."""
        stored = self.rows[list(rows)][self.image]
        return torch.stack([self.decode_one(row, file) for row, file in zip(rows, stored, strict=True)])

    def decode_one(self, row: int, stored: dict) -> Tensor:
        """Pixels (ch, y, x) from what `datasets` stores: bytes or a path."""
        try:
            return resize_center_crop(open_image(stored), self.sizes[row], self.channels, self.background)
        except UNREADABLE as error:
            name = f"row {stored_row(self.rows, row)}, column {self.image!r}"
            self.unreadable[row] = f"{name}: the image does not decode ({error})"
            self.check_readable(row)
            raise


EMBEDDED: dict[str, Callable[[], DatasetDict]] = {
    "digits": captioned_digits,
    "letters": captioned_letters,
    "sprites": captioned_sprites,
    "sprites-aspect": captioned_sprites_of_three_shapes,
    "videos": captioned_videos,
    "stacked-digits": stacked_digits,
}
MADE_OF: dict[str, Callable[[str], DatasetDict]] = {  # NAME:PATH is made of what lies at the path
    "stacked": lambda path: stack_digits(load_splits(path)),
    "walks": walk_cycles,
}


def is_made_here(path: str) -> bool:
    """Whether `load_splits` makes the data of a path itself, and `datasets` does not read it."""
    name, colon, rest = path.partition(":")
    return path in EMBEDDED or (bool(colon and rest) and name in MADE_OF) or Path(path).suffix == ".npz"


# of files, by how their names end
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".csv": "csv"}
IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_splits(path: str) -> DatasetDict:
    """Splits train and test of a source.

    Without a test or validation split `split_rows` holds rows out. Columns of bytes or paths become images,
    see `find_images`; texts that a metadata.csv has as NA or null stay texts.

    Args:
        path: an embedded source, a folder, a hub name, or files: parquet, tar, jsonl, csv or npz. Several
            files of one kind, but npz, are named by a pattern such as "shards/*.tar". "stacked:PATH" stacks
            the digits of any of them, as `stack_digits` does; "walks:FOLDER" renders `walk_cycles`.

    Raises:
        ValueError: what `datasets` cannot load, stacks of what are no digits, walks without sheets.
    """
    if path in EMBEDDED:
        return EMBEDDED[path]()
    name, _, rest = path.partition(":")
    if rest and name in MADE_OF:
        return MADE_OF[name](rest)
    if Path(path).suffix == ".npz":
        return read_npz(path)
    loaded = {
        name: restore_texts(find_images(rows, Path(path).parent), path) for name, rows in load(path).items()
    }
    train, test = choose_splits(loaded)
    if test is None:
        return split_rows(train)
    return DatasetDict({"train": train, "test": test})


def load(path: str) -> Any:
    """All splits of a path, as `datasets` loads it.

    Args:
        path: a folder, a hub name, or files.

    Raises:
        ValueError: what it cannot load.
    """
    with explained(path):
        return datasets.load_dataset(**arguments(path))


def load_streams(path: str) -> tuple[datasets.DatasetBuilder, Any]:
    """What reads a path, which knows its files, and all splits as streams.

    Args:
        path: a folder, a hub name, or files.

    Raises:
        ValueError: what `datasets` cannot load.
    """
    with explained(path):
        builder = datasets.load_dataset_builder(**arguments(path))
        return builder, builder.as_streaming_dataset()


def arguments(path: str) -> dict[str, Any]:
    """The arguments with which `datasets` loads a path: its name, or a format and its files."""
    builder = BUILDERS.get(Path(path).suffix)
    how: dict[str, Any] = {"path": builder, "data_files": path} if builder else {"path": path}
    if builder == "csv":
        how["keep_default_na"] = False  # "NA" and "null" are captions like any other
    return how


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Where `datasets` cannot load a path, a ValueError of one line says so."""
    try:
        yield
    except Exception as error:  # of any kind: that of the source's format
        found = Path(path).exists() or "*" in path
        said = (
            f"`datasets` cannot load {path!r}"
            if found
            else f"{path!r} is no file or folder here, and `datasets` cannot load it"
        )
        raise ValueError(f"{said}: {error}".splitlines()[0]) from error


def find_images(rows: Any, folder: Path) -> Any:
    """The rows with columns of image bytes, {bytes, path} or image paths as columns of images.

    The type and the first row of a column show what it holds; paths are as seen from `folder`, or from here.

    Args:
        rows: a Dataset or IterableDataset.
        folder: where the file lies that names the paths.
    """
    if rows.features is None:
        return rows
    plain = {name: feature for name, feature in rows.features.items() if may_be_image(feature)}
    first = next(iter(rows.select_columns(list(plain)).take(1)), {}) if plain else {}
    for name in plain:
        held = first.get(name)
        if isinstance(held, str) and held.lower().endswith(IMAGE_ENDS):
            if (folder / held).is_file() and not Path(held).is_file():
                rows = rows.map(lambda row, name=name: {name: row[name] and str(folder / row[name])})
            elif not Path(held).is_file():
                continue
        elif not is_image(held["bytes"] if isinstance(held, dict) else held):
            continue
        rows = rows.cast_column(name, datasets.Image())
    return rows


def may_be_image(feature: Any) -> bool:
    """Whether a column that is not marked as images may hold some: bytes, paths, or both in a struct."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    kinds = ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Value) and feature.dtype in kinds


def is_image(content: Any) -> bool:
    """Whether these are the bytes of an image."""
    try:
        PILImage.open(BytesIO(content))
    except UNREADABLE:
        return False
    return True


def restore_texts(rows: Dataset, path: str) -> Dataset:
    """The rows with texts of a folder's metadata.csv that were read as missing, such as NA, null or nothing.

    Args:
        rows: of `datasets`.
        path: what they were loaded from.
    """
    files = list(Path(path).rglob("metadata.csv")) if Path(path).is_dir() else []
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not files or not images:
        return rows
    texts = [name for name, feature in rows.features.items() if is_text(feature)]
    lacking = [name for name in texts if None in rows.select_columns([name])[name]]
    written: dict[str, dict[str, str]] = {}
    for file in files if lacking else ():
        with file.open(newline="", encoding="utf-8") as lines:
            written |= {str(file.parent / row["file_name"]): row for row in csv.DictReader(lines)}
    if not written:
        return rows
    paths = [
        str((held or {}).get("path"))
        for held in rows.cast_column(images[0], datasets.Image(decode=False))[images[0]]
    ]
    for name in lacking:
        restored = [
            written.get(path, {}).get(name) if text is None else text
            for path, text in zip(paths, rows[name], strict=True)
        ]
        columns, feature = rows.column_names, rows.features[name]
        rows = rows.remove_columns([name]).add_column(name, restored, feature=feature).select_columns(columns)
    return rows


def choose_splits(loaded: Mapping[str, Any]) -> tuple[Any, Any]:
    """The split to train on, and the one to test on or None."""
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    others = (loaded[name] for name in ("test", "validation") if name in loaded)
    return train, next((rows for rows in others if rows is not train), None)


def select_rows(splits: DatasetDict, wanted: Mapping[str, Sequence[Any]]) -> DatasetDict:
    """The rows of each split that hold one of the values named, column by column.

        select_rows(load_splits("sprites"), {"shape": ["circle", "ring"], "row": [0]})

    Args:
        splits: name -> rows.
        wanted: column -> values; labels by name or number.

    Raises:
        ValueError: a column or a label that the data lacks, values that leave a split without rows.
    """
    for column, values in wanted.items():
        found = {
            name: select_numbered(rows, find_rows(rows, column, values)) for name, rows in splits.items()
        }
        if empty := [name for name, rows in found.items() if not len(rows)]:
            raise ValueError(f"no row of {empty[0]} holds one of {list(values)} in column {column!r}")
        splits = DatasetDict(found)
    return splits


def find_rows(rows: Dataset, column: str, values: Sequence[Any]) -> list[int]:
    """Numbers of the rows that hold one of the values in a column.

    Args:
        rows: of `datasets`.
        column: its name.
        values: labels by name or number.
    """
    check_rows(rows, next(iter(MODES)), column)
    label = rows.features[column]
    names = label.names if isinstance(label, ClassLabel) else []
    if unknown := [value for value in values if names and isinstance(value, str) and value not in names]:
        raise ValueError(f"column {column!r} has no {unknown[0]!r}; it has {', '.join(names)}")
    wanted = [names.index(value) if value in names else value for value in values]
    return [row for row, stored in enumerate(rows.select_columns([column])[column]) if stored in wanted]


def load_images(
    path: str = "digits",
    size: int | tuple[int, int] = 8,
    channels: int = 1,
    image: str = "image",
    caption: str = "caption",
    label: str = "",
    cache_in_memory: bool = False,
    background: str = BACKGROUND,
    keep_aspect: int | None = None,
) -> tuple[CaptionedImages, CaptionedImages]:
    """Train and test images of a source.

    Args:
        path: see `load_splits`; all else as of `CaptionedImages`.
        size: y and x in pixels, or the side of a square.
        channels: 1, 3 or 4.
        image: name of the column of images.
        caption: name of the column of captions, "" for none.
        label: name of the column of labels, if any.
        cache_in_memory: decode all images at once.
        background: the colour under what is transparent.
        keep_aspect: pixels of a patch's side, where images keep their shape.

    Raises:
        ValueError: as from `load_splits` and `CaptionedImages`.
    """
    splits = load_splits(path)
    columns = image, caption, label, cache_in_memory, background, keep_aspect
    return (
        CaptionedImages(splits["train"], size, channels, *columns),
        CaptionedImages(splits["test"], size, channels, *columns),
    )
