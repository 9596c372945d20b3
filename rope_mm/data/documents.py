"""Rows of data sets told by templates as documents of words, pictures and clips; which row packs which."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import datasets
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as Picture
from torch import Tensor

from rope_mm.data.images import MODES, UNREADABLE, open_image, resize_center_crop
from rope_mm.data.seeding import batch_indices
from rope_mm.data.templates import Column, Task, Template, read_template
from rope_mm.data.videos import Reader, choose_reader, take_all


@dataclass(frozen=True)
class Visual:
    """A picture (ch, y, x) or clip (t, ch, y, x) in [-1, 1], which the model reads and may have to draw."""

    pixels: Tensor
    generate: bool = False


class Record(NamedTuple):
    """A row as stored: the source that it is of, what it is called, and what its columns hold."""

    source: int
    name: str
    values: Mapping[str, Any]


class Unreadable(ValueError):
    """A row that cannot be read: its number, its column and why."""


Document = list[str | Visual]
Read = Callable[[Any], Any]  # which workers that are spawned must be able to pickle


def too_long_message(length: int, room: int) -> str:
    """What is said of a document that is longer than a row."""
    return f"a document of {length} tokens does not fit a row of {room}; raise the length and begin anew"


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the documents in each row: every one, in order, goes into the first row that has room.

    Raises:
        ValueError: a document that is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        if length > room:
            raise ValueError(too_long_message(length, room))
        row = next((row for row, free in enumerate(left) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(number)
        left[row] -= length
    return rows


class DocumentDataset(ABC):
    """Rows of sources as documents, wherever the rows are.

    A row is told by one of the templates whose columns it has, chosen at random; `join` rows make a document.
    Pictures are cropped to a centred square and resized.

    Raises:
        ValueError: a source that no template fits, a template that fits no source, a column of no use.
    """

    mark: Any = None  # where a stream is read on, in place of beginning anew

    def __init__(
        self,
        sources: Sequence[Dataset | IterableDataset],
        templates: Sequence[str],
        size: int,
        channels: int,
        join: int = 1,
    ):
        if channels not in MODES:
            raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
        self.size, self.channels, self.join = size, channels, join
        self.templates = told = [read_template(template) for template in templates]
        columns = [{part.column for part in template if isinstance(part, Column)} for template in told]
        here = [set(rows.column_names or ()) for rows in sources]
        pairs = list(zip(told, columns, strict=True))
        self.fits = [[template for template, wanted in pairs if wanted <= names] for names in here]
        for template, wanted in zip(templates, columns, strict=True):
            if not any(wanted <= names for names in here):
                raise ValueError(f"template {template!r} fits no source; their columns are {here}")
        if not all(self.fits):
            raise ValueError(f"no template fits columns {here[self.fits.index([])]}")
        used = sorted(set().union(*columns))
        features = cast(Any, [rows.features for rows in sources])
        chosen = {name: there[name] for there in features for name in used if name in there}
        kinds = {name: choose_kind(feature, name) for name, feature in chosen.items()}
        self.kinds = {name: kind for name, (kind, _) in kinds.items()}
        self.readers = {name: read for name, (_, read) in kinds.items()}
        drawn = {
            part.column
            for template in told
            for part in template
            if isinstance(part, Column) and part.generate
        }
        if words := [name for name in sorted(drawn) if self.kinds[name] == "text"]:
            raise ValueError(f"column {words[0]!r} holds words, which are written; only pictures are drawn")
        # as stored, so that a picture which cannot be read is named by its row
        self.sources = [
            rows.select_columns([name for name in used if name in names]).with_format("arrow")
            for rows, names in zip(sources, here, strict=True)
        ]

    @abstractmethod
    def batch(self, seed: int, step: int, batch: int) -> list[list[Any]]:
        """The rows of each document of a step's batch."""

    @abstractmethod
    def find(self, row: Any) -> Record:
        """A row of the last batch asked for."""

    def texts(self) -> Iterator[str]:
        """All words, those of the templates first."""
        for template in self.templates:
            yield from (part for part in template if isinstance(part, str))

    def document(self, rows: Sequence[Any], generator: torch.Generator) -> Document:
        """The document of these rows.

        Raises:
            Unreadable: a row that holds no picture or words where it should.
        """
        document: Document = []
        for row in map(self.find, rows):
            fitting = self.fits[row.source]
            document += self.fill(fitting[int(torch.randint(len(fitting), (), generator=generator))], row)
        return document

    def fill(self, template: Template, row: Record) -> Document:
        """A template with what a row holds."""
        parts: Document = []
        for part in template:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                parts.append(self.read(part, row.values[part.column]))
            except (*UNREADABLE, RuntimeError) as error:  # torchcodec raises the latter
                reason = str(error).splitlines()[0]
                raise Unreadable(f"{row.name}, column {part.column!r} cannot be read: {reason}") from error
        return parts

    def read(self, part: Column, stored: Any) -> str | Visual:
        """What a row has in a column."""
        held = self.readers[part.column](stored)
        if self.kinds[part.column] == "text":
            return held
        frames = [resize_center_crop(frame, self.size, self.channels) for frame in held]
        pixels = torch.stack(frames) / 127.5 - 1
        return Visual(pixels[0] if self.kinds[part.column] == "image" else pixels, part.generate)


class MapDocuments(DocumentDataset):
    """Rows of sources at hand, one after another, as documents; a row is known by its number."""

    sources: list[Any]

    @cached_property
    def ends(self) -> list[int]:
        """Numbers after the last row of each source."""
        return torch.tensor([len(rows) for rows in self.sources]).cumsum(0).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def texts(self) -> Iterator[str]:
        """All words: those of the templates, then those of every row, column by column."""
        yield from super().texts()
        for rows in self.sources:
            for name in rows.column_names:
                if self.kinds[name] == "text":
                    for stored in rows[name].to_pylist():
                        with suppress(*UNREADABLE):
                            yield self.readers[name](stored)

    def batch(self, seed: int, step: int, batch: int) -> list[list[int]]:
        """Numbers of the rows in each document of a step's batch, each row once in an epoch."""
        return batch_indices(len(self), batch * self.join, seed, step).view(batch, self.join).tolist()

    def find(self, row: int) -> Record:
        """The row of a number."""
        source = next(place for place, end in enumerate(self.ends) if row < end)
        return self.at(source, row - self.ends[source] + len(self.sources[source]))

    def at(self, source: int, row: int) -> Record:
        """A row of a source."""
        (values,) = self.sources[source][row].to_pylist()
        name = f"row {row} of source {source}" if len(self.sources) > 1 else f"row {row}"
        return Record(source, name, values)

    def eval_prompts(self, task: Task, count: int) -> list[tuple[Document, str | Visual]]:
        """What is before a task and what fulfils it, at rows spread over the first source that fits.

        Rows that cannot be read are passed over.

        Raises:
            ValueError: rows of which none can be read.
        """
        wanted = {part.column for part in task.before if isinstance(part, Column)} | {task.column}
        source = next(place for place, rows in enumerate(self.sources) if wanted <= set(rows.column_names))
        size = len(self.sources[source])
        rows = [i * size // min(count, size) for i in range(min(count, size))]
        told = []
        for row in rows:
            with suppress(Unreadable):
                told.append(self.fill((*task.before, Column(task.column)), self.at(source, row)))
        if not told:
            raise ValueError(f"none of {len(rows)} rows with column {task.column!r} can be read")
        return [(document[:-1], document[-1]) for document in told]


def choose_kind(feature: object, column: str) -> tuple[str, Read]:
    """What a column holds, words, a picture or a clip, and how these words or frames are read.

    A label is read as its name.

    Raises:
        ValueError: a column of anything else.
    """
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return "text", read_words
    if isinstance(feature, datasets.ClassLabel):
        return "text", feature.int2str
    if isinstance(feature, datasets.Image):
        return "image", read_image
    read, _ = choose_reader(feature, column)
    return "video", partial(read_video, read)


def read_words(stored: Any) -> str:
    """Words as stored.

    Raises:
        ValueError: no text.
    """
    if not isinstance(stored, str):
        raise ValueError(f"words are text, not {stored!r}")
    return stored


def read_image(stored: dict) -> list[Picture.Image]:
    """The one frame of a picture."""
    return [open_image(stored)]


def read_video(read: Reader, stored: Any) -> list[Picture.Image]:
    """All frames of a clip."""
    return read(stored, take_all)
