"""Columns of rows: whether they are there, their captions and labels, and the numbers of their rows."""

from collections.abc import Sequence

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from rope_mm.data.pixels import MODES


def stored_row(rows: Dataset, row: int) -> int:
    """The number that a row of a shuffled or selected split has in the source, by which people find it."""
    indices = getattr(rows, "_indices", None)  # `datasets` has no public name for it
    return row if indices is None else int(indices.column(0)[row].as_py())


def select_numbered(rows: Dataset, numbers: Sequence[int]) -> Dataset:
    """Rows that keep the numbers of the source; `Dataset.select` loses them of rows that follow one another.

    Args:
        rows: of `datasets`.
        numbers: of the rows to select.
    """
    return rows._select_with_indices_mapping(numbers)


def choose_rows(rows: int, most: int) -> list[int]:
    """Numbers of rows chosen at random, always the same ones, in order; all where there are no more.

    Of sorted data the first rows are of one class, and of data in turns every second one is.

    Args:
        rows: how many there are.
        most: how many to take at most.
    """
    if most >= rows:
        return list(range(rows))
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:most].sort().values.tolist()


def check_rows(rows: Dataset, channels: int, *columns: str) -> None:
    """Refuse rows without these columns, where they have a name, and channels that no image has.

    Raises:
        ValueError: with the columns that there are.
    """
    for column in filter(None, columns):
        if column not in rows.column_names:
            hint = "; captions are in its metadata.csv, beside file_name" * (rows.column_names == ["image"])
            found = ", ".join(rows.column_names) + hint
            raise ValueError(f"the data has no column {column!r}; it has {found}")
    if channels not in MODES:
        raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
    if not len(rows):
        raise ValueError("the data has no rows")


def read_captions(rows: Dataset, column: str, unreadable: dict[int, str] | None = None) -> list[list[str]]:
    """The captions of each row: a text, the name of a label, or several texts.

    Args:
        rows: of `datasets`.
        column: of captions.
        unreadable: where given, a row that holds none is added, with the reason, and has an empty caption.

    Raises:
        ValueError: a column that holds no texts; without `unreadable` the first row that holds none.
    """
    feature, stored = rows.features[column], list(rows[column])
    if isinstance(feature, ClassLabel):
        stored = [label if label is None else feature.int2str(label) for label in stored]
    captions, lacking = [], {}
    for row, held in enumerate(stored):
        texts = held if isinstance(held, list) else [held]
        if not texts or not all(isinstance(text, str) for text in texts):
            name = f"row {stored_row(rows, row)}, column {column!r}"
            lacking[row], texts = f"{name}: a caption is text, not {held!r}", [""]
        captions.append(texts)
    if lacking and (unreadable is None or len(lacking) == len(captions)):
        raise ValueError(next(iter(lacking.values())))
    if unreadable is not None:
        unreadable |= lacking
    return captions


def read_labels(rows: Dataset, column: str) -> Tensor:
    """The labels (n,) of a column, counted from 0.

    Raises:
        ValueError: the first row that holds no such number.
    """
    labels = list(rows[column])
    for row, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            name = f"row {stored_row(rows, row)}, column {column!r}"
            raise ValueError(f"{name}: a label is a whole number from 0, not {label!r}")
    return torch.tensor(labels)
