"""Rows of data sets told by templates as documents of words, pictures and clips; which row packs which."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from string import Formatter
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from PIL import Image as Picture
from torch import Tensor

from rope_mm.data.clips import choose_reader
from rope_mm.data.images import MODES, UNREADABLE, fit_picture, open_picture
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


class Unreadable(ValueError):
    """A row that cannot be read: its number, its column and why."""


Document = list[str | Shown]
Read = Callable[[Any], list[Picture.Image]]
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
    """The first task of each name: to "draw" or "caption" a picture, to "film" or "narrate" a clip."""
    found: dict[str, Task] = {}
    making, telling = {"picture": "draw", "clip": "film"}, {"picture": "caption", "clip": "narrate"}
    for template in templates:
        seen = ""
        for place, part in enumerate(template):
            if isinstance(part, str):
                continue
            kind = kinds[part.column]
            task = Task(template[:place], part.column)
            if part.drawn:
                found.setdefault(making[kind], task)
            if kind == "words" and seen:
                found.setdefault(telling[seen], task)
            seen = seen if kind == "words" else kind
    return found


def misfit(length: int, room: int) -> str:
    """What is said of a document that is longer than a row."""
    return f"a document of {length} tokens does not fit a row of {room}; raise the length"


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the documents in each row: every one, in order, goes into the first row that has room.

    Raises:
        ValueError: a document that is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        if length > room:
            raise ValueError(misfit(length, room))
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
        Unreadable: later, on asking for a row that holds no picture or words where it should.
        ValueError: a source that no template fits, a template that fits no source, a column of no use.
    """

    def __init__(
        self, sources: Sequence[Dataset], templates: Sequence[str], size: int, channels: int, join: int = 1
    ):
        if channels not in MODES:
            raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
        if any(isinstance(rows, datasets.IterableDataset) for rows in sources):
            raise ValueError(
                "a source is streamed, but the rows of a step are a function of (seed, step), for which they "
                "have numbers; load it without streaming, or write a part of it to a parquet file"
            )
        self.size, self.channels, self.join = size, channels, join
        self.templates = told = [read_template(template) for template in templates]
        columns = [{part.column for part in template if isinstance(part, Field)} for template in told]
        here = [set(rows.column_names) for rows in sources]
        pairs = list(zip(told, columns, strict=True))
        self.fits = [[template for template, wanted in pairs if wanted <= names] for names in here]
        for template, wanted in zip(templates, columns, strict=True):
            if not any(wanted <= names for names in here):
                raise ValueError(f"template {template!r} fits no source; their columns are {here}")
        if not all(self.fits):
            raise ValueError(f"no template fits columns {here[self.fits.index([])]}")
        used = sorted(set().union(*columns))
        chosen = {name: rows.features[name] for rows in sources for name in used if name in rows.features}
        kinds = {name: choose_kind(feature, name) for name, feature in chosen.items()}
        self.kinds = {name: kind for name, (kind, _) in kinds.items()}
        self.readers = {name: read for name, (_, read) in kinds.items()}
        drawn = {
            part.column for template in told for part in template if isinstance(part, Field) and part.drawn
        }
        if words := [name for name in sorted(drawn) if self.kinds[name] == "words"]:
            raise ValueError(f"column {words[0]!r} holds words, which are written; only pictures are drawn")
        # as stored, so that a picture which cannot be read is named by its row
        self.sources = [
            rows.select_columns([name for name in used if name in rows.column_names]).with_format("arrow")
            for rows in sources
        ]
        self.ends = torch.tensor([len(rows) for rows in sources]).cumsum(0).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def texts(self) -> Iterator[str]:
        """All words: those of the templates, then those of every row, column by column."""
        for template in self.templates:
            yield from (part for part in template if isinstance(part, str))
        for rows in self.sources:
            for name in rows.column_names:
                if self.kinds[name] == "words":
                    yield from filter(None, cast(Any, rows[name]).to_pylist())

    def batch(self, seed: int, step: int, batch: int) -> list[list[int]]:
        """Numbers of the rows in each document of a step's batch, each row once in an epoch."""
        return batch_indices(len(self), batch * self.join, seed, step).view(batch, self.join).tolist()

    def ask(self, task: Task, count: int) -> list[tuple[Document, str | Shown]]:
        """What is before a task and what fulfils it, at rows spread over the first source that fits.

        Rows that cannot be read are passed over.

        Raises:
            ValueError: rows of which none can be read.
        """
        wanted = {part.column for part in task.before if isinstance(part, Field)} | {task.column}
        source = next(place for place, rows in enumerate(self.sources) if wanted <= set(rows.column_names))
        size = len(self.sources[source])
        rows = [i * size // min(count, size) for i in range(min(count, size))]
        told = []
        for row in rows:
            with suppress(Unreadable):
                told.append(self.fill((*task.before, Field(task.column)), source, row))
        if not told:
            raise ValueError(f"none of {len(rows)} rows with column {task.column!r} can be read")
        return [(document[:-1], document[-1]) for document in told]

    def tell(self, rows: Sequence[int], generator: torch.Generator) -> Document:
        """The document of these rows."""
        document: Document = []
        for source, row in map(self.find, rows):
            fitting = self.fits[source]
            chosen = fitting[int(torch.randint(len(fitting), (), generator=generator))]
            document += self.fill(chosen, source, row)
        return document

    def find(self, number: int) -> tuple[int, int]:
        """The source of a row and its number there, by its number among all."""
        source = next(place for place, end in enumerate(self.ends) if number < end)
        return source, number - self.ends[source] + len(self.sources[source])

    def name(self, source: int, row: int) -> str:
        """What a row is called."""
        return f"row {row} of source {source}" if len(self.sources) > 1 else f"row {row}"

    def fill(self, template: Template, source: int, row: int) -> Document:
        """A template with what a row of a source holds."""
        (values,) = cast(Any, self.sources[source][row]).to_pylist()
        parts: Document = []
        for part in template:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                parts.append(self.read(part, values[part.column]))
            except (*UNREADABLE, RuntimeError) as error:  # torchcodec raises the latter
                place, reason = self.name(source, row), str(error).splitlines()[0]
                raise Unreadable(f"{place}, column {part.column!r} cannot be read: {reason}") from error
        return parts

    def read(self, part: Field, stored: Any) -> str | Shown:
        """What a row has in a column."""
        if self.kinds[part.column] == "words":
            if not isinstance(stored, str):
                raise ValueError(f"words are text, not {stored!r}")
            return stored
        frames = [fit_picture(f, self.size, self.channels) for f in self.readers[part.column](stored)]
        pixels = torch.stack(frames) / 127.5 - 1
        return Shown(pixels[0] if self.kinds[part.column] == "picture" else pixels, part.drawn)


def choose_kind(feature: object, column: str) -> tuple[str, Read]:
    """What a column holds, words, a picture or a clip, and how the frames of the latter are read.

    Raises:
        ValueError: a column of anything else.
    """
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return "words", lambda stored: []
    if isinstance(feature, datasets.Image):
        return "picture", lambda stored: [open_picture(stored)]
    read, _ = choose_reader(feature, column)
    return "clip", lambda stored: read(stored, lambda total: list(range(total)))
