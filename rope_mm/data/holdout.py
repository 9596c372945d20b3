"""Which rows are held out: a function of the row alone, so that no change of the data moves a row."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from rope_mm.data.columns import select_numbered

SHARE = 0.2  # of rows that are held out
HEAD = 1 << 16  # bytes of an image or video, beside their number, that are read


def split_rows(rows: Dataset) -> DatasetDict:
    """Rows to train on and held-out ones, about a fifth and at least one of several.

    The side of a row follows from its image or video, or without one from its texts and numbers. So rows that
    are added or removed later, and captions that are corrected, leave all others where they were, and equal
    rows are on one side. Of a few rows none may be below the share, or all; then the one with the
    lowest number is held out, or the one with the highest is trained on, until there are more rows.

    Args:
        rows: of `datasets`.

    Raises:
        ValueError: rows that are all equal.
    """
    numbers = row_numbers(rows)
    lowest, highest = min(numbers, default=0.0), max(numbers, default=0.0)
    if lowest == highest:
        raise ValueError(f"no row can be held out of {len(rows)} equal ones; give a test split, or more rows")
    sides: dict[str, list[int]] = {"train": [], "test": []}
    for row, number in enumerate(numbers):
        held = (number < SHARE or number == lowest) and number < highest
        sides["test" if held else "train"].append(row)
    return DatasetDict({name: select_numbered(rows, chosen) for name, chosen in sides.items()})


def row_numbers(rows: Dataset) -> list[float]:
    """A number in [0, 1) of each row, by its images and videos, or without any by its texts and numbers."""
    features = rows.features.items()
    names = [name for name, feature in features if is_visual(feature)]
    names = names or [name for name, feature in features if is_plain(feature)] or rows.column_names
    stored: Any = rows.select_columns(names).with_format("arrow")
    numbers = []
    for table in stored.iter(batch_size=64):
        for row in table.to_pylist():
            digest = hashlib.blake2b(digest_size=8)
            for part in read_content(row, head_of_file):
                digest.update(part)
            numbers.append(int.from_bytes(digest.digest(), "big") / 2**64)
    return numbers


def is_visual(feature: Any) -> bool:
    """Whether a column holds images or videos as files."""
    if isinstance(feature, datasets.Value):
        return "binary" in feature.dtype
    frames = getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image | datasets.Video) or isinstance(frames, datasets.Image)


def is_plain(feature: Any) -> bool:
    """Whether a column holds texts or numbers."""
    return isinstance(feature, datasets.ClassLabel | datasets.Value) and "binary" not in feature.dtype


def is_text(feature: Any) -> bool:
    """Whether a column holds text."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def head_of_file(stored: dict[str, Any]) -> Iterable[bytes]:
    """The first bytes of a file that is stored and their whole number, the name of one elsewhere."""
    if stored["bytes"]:
        yield f"{len(stored['bytes'])}".encode() + stored["bytes"][:HEAD]
    elif stored["path"]:
        yield Path(stored["path"]).name.encode()


def read_content(stored: Any, of_file: Callable[[dict[str, Any]], Iterable[bytes]]) -> Iterable[bytes]:
    """What tells values of a row apart: their text, and of files what `of_file` reads.

    Args:
        stored: a row, or what it holds.
        of_file: {bytes, path} of an image or video -> some of its content.
    """
    if isinstance(stored, dict) and stored.keys() == {"bytes", "path"}:
        yield from of_file(stored)
    elif isinstance(stored, dict):
        for name, part in sorted(stored.items()):
            yield name.encode()
            yield from read_content(part, of_file)
    elif isinstance(stored, list):
        for part in stored:
            yield from read_content(part, of_file)
    else:
        yield repr(stored).encode()
