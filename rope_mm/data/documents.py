"""Rows of data sets told by templates as documents of words, pictures and clips; which row packs which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import datasets
import torch
from datasets import Dataset
from torch import Tensor

from rope_mm.choice import Choice
from rope_mm.data.images import MODES, decode_picture
from rope_mm.data.order import batch_indices


@dataclass(frozen=True)
class Shown:
    """A picture (ch, y, x) or clip (t, ch, y, x) in [-1, 1], which the model reads and may have to draw."""

    pixels: Tensor
    drawn: bool = False


@dataclass(frozen=True)
class Field:
    """A column of a row, in a template; `drawn` where its picture is to be drawn, not only read."""

    column: str
    drawn: bool = False


@dataclass(frozen=True)
class Task:
    """What a template asks of the model: after `before`, to draw or to write what is in a column."""

    before: tuple[str | Field, ...]
    column: str


Document = list[str | Shown]
Template = tuple[str | Field, ...]


def read_template(text: str) -> Template:
    """Parts of "{caption} {image:draw}": words as they are, columns in braces.

    Raises:
        ValueError: braces that do not close, anything after a column's name but ":draw".
    """
    parts: list[str | Field] = []
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}") from None
    for words, column, told, conversion in parsed:
        parts += [words] if words else []
        if column is None:
            continue
        if not column or conversion or told not in ("", "draw"):
            raise ValueError(f"template {text!r}: a column is {{name}}, or {{name:draw}} where it is drawn")
        parts.append(Field(column, told == "draw"))
    return tuple(parts)


def find_tasks(templates: Sequence[Template], kinds: Mapping[str, str]) -> dict[str, Task]:
    """The first task of each kind: to "draw" a picture, to "film" a clip, to "write" words after either."""
    found: dict[str, Task] = {}
    for template in templates:
        seen = False
        for place, part in enumerate(template):
            if isinstance(part, str):
                continue
            kind = kinds[part.column]
            task = Task(template[:place], part.column)
            if part.drawn:
                found.setdefault("draw" if kind == "picture" else "film", task)
            if kind == "words" and seen:
                found.setdefault("write", task)
            seen = seen or kind != "words"
    return found


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the documents in each row: every one, in order, goes into the first row that has room.

    Raises:
        ValueError: a document that is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        if length > room:
            raise ValueError(f"a document of {length} tokens does not fit a row of {room}; raise the length")
        row = next((row for row, free in enumerate(left) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(number)
        left[row] -= length
    return rows


class Documents:
    """Rows of sources, one after another, as documents.

    A row is told by one of the templates whose columns it has, chosen at random; `join` rows make a document.
    Pictures are cropped to a centred square and resized.

    Raises:
        ValueError: a source that no template fits, a template that fits no source, a column of no use.
    """

    def __init__(
        self, sources: Sequence[Dataset], templates: Sequence[str], size: int, channels: int, join: int = 1
    ):
        if channels not in MODES:
            raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
        self.size, self.channels, self.join = size, channels, join
        self.templates = told = [read_template(template) for template in templates]
        columns = [{part.column for part in template if isinstance(part, Field)} for template in told]
        self.fits = [
            [
                template
                for template, wanted in zip(told, columns, strict=True)
                if wanted <= set(rows.column_names)
            ]
            for rows in sources
        ]
        here = [rows.column_names for rows in sources]
        for template, wanted in zip(templates, columns, strict=True):
            if not any(wanted <= set(names) for names in here):
                raise ValueError(f"template {template!r} fits no source; their columns are {here}")
        if not all(self.fits):
            raise ValueError(f"no template fits columns {here[self.fits.index([])]}")
        used = sorted(set().union(*columns))
        self.kinds = {
            name: kind_of(rows.features[name], name)
            for rows in sources
            for name in used
            if name in rows.features
        }
        self.sources = [undecoded(rows, used) for rows in sources]
        self.ends = torch.tensor([len(rows) for rows in sources]).cumsum(0).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def batch(self, seed: int, step: int, batch: int) -> list[list[int]]:
        """Numbers of the rows in each document of a step's batch, each row once in an epoch."""
        return batch_indices(len(self), batch * self.join, seed, step).view(batch, self.join).tolist()

    def ask(self, task: Task, count: int) -> list[tuple[Document, str | Shown]]:
        """What is before a task and what fulfils it, at rows spread over the first source that fits."""
        wanted = {part.column for part in task.before if isinstance(part, Field)} | {task.column}
        source = next(place for place, rows in enumerate(self.sources) if wanted <= set(rows.column_names))
        size = len(self.sources[source])
        rows = [i * size // min(count, size) for i in range(min(count, size))]
        told = [self.fill((*task.before, Field(task.column)), source, row) for row in rows]
        return [(document[:-1], document[-1]) for document in told]

    def tell(self, rows: Sequence[int], generator: torch.Generator) -> Document:
        """The document of these rows."""
        document: Document = []
        for number in rows:
            source = next(place for place, end in enumerate(self.ends) if number < end)
            fitting = self.fits[source]
            chosen = fitting[int(torch.randint(len(fitting), (), generator=generator))]
            document += self.fill(chosen, source, number - self.ends[source] + len(self.sources[source]))
        return document

    def fill(self, template: Template, source: int, row: int) -> Document:
        """A template with what a row of a source holds."""
        values = self.sources[source][row]
        parts: Document = []
        for part in template:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                read = READERS[self.kinds[part.column]](values[part.column], self.size, self.channels)
            except ValueError as error:
                raise ValueError(f"row {row}, column {part.column!r}: {error}") from error
            parts.append(read if isinstance(read, str) else Shown(read, part.drawn))
        return parts


def kind_of(feature: object, column: str) -> str:
    """What a column holds: words, a picture or a clip.

    Raises:
        ValueError: a column of anything else.
    """
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.Image):
        return "picture"
    if isinstance(inner, datasets.Image):
        return "clip"
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return "words"
    raise ValueError(
        f"column {column!r} holds {feature}; a document takes strings, images and lists of images"
    )


def undecoded(rows: Dataset, columns: Sequence[str]) -> Dataset:
    """These columns alone, pictures as stored, so that one which cannot be read is named by its row."""
    rows = rows.select_columns([name for name in columns if name in rows.column_names])
    stored = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if kind_of(feature, name) == "picture":
            rows = rows.cast_column(name, stored)
        elif kind_of(feature, name) == "clip":
            rows = rows.cast_column(name, datasets.List(stored))
    return rows


def read_words(value: str | None, size: int, channels: int) -> str:
    """Words as they are."""
    if not isinstance(value, str):
        raise ValueError(f"words are text, not {value!r}")
    return value


def read_clip(value: list[dict] | None, size: int, channels: int) -> Tensor:
    """Frames (t, ch, size, size)."""
    if not value:
        raise ValueError("a clip has at least one frame")
    return torch.stack([decode_picture(frame, size, channels) for frame in value])


READERS = Choice("kind", {"words": read_words, "picture": decode_picture, "clip": read_clip})
