"""Rows of data sets, put in templates: documents of text, images and videos; and which fit one row."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import datasets
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage
from torch import Tensor

from rope_mm.data.columns import stored_row
from rope_mm.data.holdout import is_text
from rope_mm.data.images import Unreadable
from rope_mm.data.pixels import (
    BACKGROUND,
    MODES,
    UNREADABLE,
    check_background,
    file_kind,
    keep_aspect_ratio,
    open_image,
    resize_center_crop,
)
from rope_mm.data.seeding import GroupedOrder, ShuffledOrder
from rope_mm.data.templates import Column, Task, Template, read_template
from rope_mm.data.videos import Reader, choose_reader, take_all


@dataclass(frozen=True)
class Visual:
    """An image or a video in a document.

    Attributes:
        pixels: (ch, y, x) of an image or (t, ch, y, x) of a video, in [-1, 1].
        generate: whether the model learns to generate it, and does not only read it.
    """

    pixels: Tensor
    generate: bool = False


class Record(NamedTuple):
    """A row as stored.

    Attributes:
        source: the number of its source.
        name: what messages call it.
        values: column -> what it holds.
    """

    source: int
    name: str
    values: Mapping[str, Any]


Document = list[str | Visual]
Read = Callable[[Any], Any]  # which workers that are spawned must be able to pickle


def check_fits(templates: Sequence[str], columns: Sequence[set[str]], here: Sequence[set[str]]) -> None:
    """Refuse a template that fits no source, and a source that no template fits.

    Args:
        templates: as written.
        columns: of each template.
        here: columns of each source.
    """
    for template, wanted in zip(templates, columns, strict=True):
        if not any(wanted <= names for names in here):
            raise ValueError(f"template {template!r} fits no source; their columns are {here}")
    for names in here:
        if not any(wanted <= names for wanted in columns):
            raise ValueError(f"no template fits columns {names}")


def check_generated(templates: Sequence[Template], kinds: Mapping[str, str]) -> None:
    """Refuse a template that marks a column of text as one to generate.

    Args:
        templates: as read.
        kinds: column -> text, image or video.
    """
    parts = [part for template in templates for part in template if isinstance(part, Column)]
    generated = {part.column for part in parts if part.generate}
    if texts := [name for name in sorted(generated) if kinds[name] == "text"]:
        raise ValueError(f"column {texts[0]!r} holds text, which is always generated; write {{{texts[0]}}}")


def check_grouping(group_by: str, features: Sequence[Mapping[str, Any]], rows_per_document: int) -> None:
    """Refuse groups by a column that a source lacks or that holds no text, and documents of several rows.

    Args:
        group_by: the column; "" groups nothing.
        features: column -> feature of `datasets`, of each source.
        rows_per_document: rows that are joined in a document.
    """
    for there in features if group_by else ():
        if group_by not in there:
            raise ValueError(f"rows are grouped by column {group_by!r}, and a source has {sorted(there)}")
        feature = there[group_by]
        if not (isinstance(feature, datasets.ClassLabel) or is_text(getattr(feature, "feature", feature))):
            raise ValueError(
                f"rows are grouped by a column of texts or class labels, and {group_by!r} holds {feature}"
            )
    if group_by and rows_per_document > 1:
        raise ValueError(
            f"rows_per_document is {rows_per_document}, and groups are of rows, one in a document; take 1"
        )


class DocumentDataset(ABC):
    """Rows of sources as documents, wherever the rows are.

    A row is put in one of the templates whose columns it has, chosen at random. A column of lists of texts
    gives one of them at random. Images are cropped around the centre and resized.

    Args:
        sources: rows of `datasets`, at hand or streamed.
        templates: see `read_template`.
        size: y and x of images in pixels, or the side of a square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        rows_per_document: rows that are joined in a document.
        background: the colour under what is transparent, where channels is 1 or 3.
        keep_aspect: pixels of a patch's side; then images and videos keep their shape, in as many patches as
            a square of `size` has at most, see `keep_aspect_ratio`. None: all are cropped to `size`.
        flip: mirror each image and video, left to right, half of the times that it is read.
        group_by: a column of text that is kept beside those of the templates; "" keeps none.

    Raises:
        ValueError: a source that no template fits, a template that fits no source, a column of no use.
    """

    stream_state: Any = None  # where a stream is read on, in place of beginning anew
    files: Sequence[str] = ()  # of a stream, see `rope_mm.data.streaming.list_files`

    def __init__(
        self,
        sources: Sequence[Dataset | IterableDataset],
        templates: Sequence[str],
        size: int | tuple[int, int],
        channels: int,
        rows_per_document: int = 1,
        background: str = BACKGROUND,
        keep_aspect: int | None = None,
        flip: bool = False,
        group_by: str = "",
    ):
        check_background(background)
        if keep_aspect and not isinstance(size, int):
            raise ValueError(f"size must be the side of a square where images keep their shape, not {size}")
        if channels not in MODES:
            raise ValueError(f"images have {', '.join(map(str, MODES))} channels, not {channels}")
        self.size, self.channels, self.background = size, channels, background
        self.keep_aspect, self.flip, self.rows_per_document = keep_aspect, flip, rows_per_document
        self.templates = parsed = [read_template(template) for template in templates]
        columns = [{part.column for part in template if isinstance(part, Column)} for template in parsed]
        here = [set(rows.column_names or ()) for rows in sources]
        pairs = list(zip(parsed, columns, strict=True))
        self.fits = [[template for template, wanted in pairs if wanted <= names] for names in here]
        check_fits(templates, columns, here)
        check_grouping(group_by, [dict(rows.features or {}) for rows in sources], rows_per_document)
        used = sorted(set().union(*columns, [group_by] if group_by else []))
        features = cast(Any, [rows.features for rows in sources])
        chosen = [{n: choose_kind(there[n], n) for n in used if n in there} for there in features]
        self.kinds = agree_on_kinds([{n: kind for n, (kind, _) in own.items()} for own in chosen])
        # of each source, as one may hold labels where another has texts
        self.readers = [{name: read for name, (_, read) in own.items()} for own in chosen]
        check_generated(parsed, self.kinds)
        # as stored, so that an image which cannot be read is named by its row
        self.sources = [
            rows.select_columns([name for name in used if name in names]).with_format("arrow")
            for rows, names in zip(sources, here, strict=True)
        ]

    @abstractmethod
    def batch(self, seed: int, step: int, batch: int) -> list[list[Any]]:
        """The rows of each document of a step's batch.

        Args:
            seed: of the order of rows.
            step: 0, 1, ...
            batch: how many documents.
        """

    @abstractmethod
    def find(self, row: Any) -> Record:
        """A row of the last batch asked for."""

    def texts(self) -> Iterator[str]:
        """All texts, those of the templates first."""
        for template in self.templates:
            yield from (part for part in template if isinstance(part, str))

    def document(self, rows: Sequence[Any], generator: torch.Generator) -> Document:
        """The document of these rows.

        Args:
            rows: as `batch` gives them.
            generator: of the templates, and of captions where a row has several.

        Raises:
            Unreadable: a row that holds no image or text where it should.
        """
        document: Document = []
        for row in map(self.find, rows):
            fitting = self.fits[row.source]
            template = fitting[int(torch.randint(len(fitting), (), generator=generator))]
            document += self.fill(template, row, generator)
        return document

    def fill(self, template: Template, row: Record, generator: torch.Generator | None = None) -> Document:
        """A template with what a row holds.

        Args:
            template: whose columns the row has.
            row: as stored.
            generator: of captions where a row has several; without it the first one.
        """
        parts: Document = []
        for part in template:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                parts.append(self.read(part, row, generator))
            except UNREADABLE as error:
                reason = str(error).splitlines()[0]
                raise Unreadable(f"{row.name}, column {part.column!r} cannot be read: {reason}") from error
        return parts

    def read(self, part: Column, row: Record, generator: torch.Generator | None) -> str | Visual:
        """What a row has in a column."""
        held = self.readers[row.source][part.column](row.values[part.column])
        kind = self.kinds[part.column]
        if kind == "text":
            several = len(held) > 1 and generator is not None
            return held[int(torch.randint(len(held), (), generator=generator)) if several else 0]
        size = self.size_of(held[0])
        frames = [resize_center_crop(frame, size, self.channels, self.background) for frame in held]
        pixels = torch.stack(frames) / 127.5 - 1
        if self.flip and generator is not None and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return Visual(pixels[0] if kind == "image" else pixels, part.generate)

    def size_of(self, image: PILImage.Image) -> int | tuple[int, int]:
        """Pixels (y, x), or the side of a square, that an image is cropped and resized to."""
        if not self.keep_aspect or not isinstance(self.size, int):
            return self.size
        return keep_aspect_ratio(image.height, image.width, self.size, self.keep_aspect)


class MapDocuments(DocumentDataset):
    """Rows of sources at hand, one after another, as documents; a row is known by its number.

    Args:
        sources: rows of `datasets`, at hand.
        templates: see `DocumentDataset` for this and the others.
        group_by: the documents of a batch are in groups with one value in this column, rows without any are
            skipped; "": in no groups.
        group_size: documents of a group.
    """

    sources: list[Any]

    def __init__(
        self,
        sources: Sequence[Dataset],
        templates: Sequence[str],
        *args: Any,
        group_by: str = "",
        group_size: int = 2,
        **how: Any,
    ):
        super().__init__(sources, templates, *args, group_by=group_by, **how)
        self.group_by, self.group_size = group_by, group_size

    @cached_property
    def ends(self) -> list[int]:
        """Numbers after the last row of each source."""
        return torch.tensor([len(rows) for rows in self.sources]).cumsum(0).tolist()

    @cached_property
    def order(self) -> ShuffledOrder | GroupedOrder:
        """In which rows are trained on."""
        if not self.group_by:
            return ShuffledOrder(len(self))
        readers = [own[self.group_by] for own in self.readers]
        pairs = zip(readers, self.sources, strict=True)
        stored = ((read, value) for read, rows in pairs for value in rows[self.group_by].to_pylist())
        return GroupedOrder([read_value(*each) or None for each in stored], self.group_size)

    def __len__(self) -> int:
        return self.ends[-1]

    def texts(self) -> Iterator[str]:
        """All texts: those of the templates, then those of every row, column by column."""
        yield from super().texts()
        for rows, readers in zip(self.sources, self.readers, strict=True):
            for name in rows.column_names:
                if self.kinds[name] == "text":
                    for stored in rows[name].to_pylist():
                        yield from read_value(readers[name], stored)

    def batch(self, seed: int, step: int, batch: int) -> list[list[int]]:
        """Numbers of the rows in each document of a step's batch, without groups each row once in an epoch.

        Args:
            seed: of the order of rows.
            step: 0, 1, ...
            batch: how many documents.
        """
        rows = self.order.batch(seed, step, batch * self.rows_per_document)
        return rows.view(batch, self.rows_per_document).tolist()

    def find(self, row: int) -> Record:
        """The row of a number."""
        source = next(place for place, end in enumerate(self.ends) if row < end)
        return self.at(source, row - self.ends[source] + len(self.sources[source]))

    def at(self, source: int, row: int) -> Record:
        """A row of a source."""
        (values,) = self.sources[source][row].to_pylist()
        number = stored_row(self.sources[source], row)
        name = f"row {number} of source {source}" if len(self.sources) > 1 else f"row {number}"
        return Record(source, name, values)

    def file_kind(self, row: int) -> tuple[Any, ...] | None:
        """The kind of a row's first image, see `rope_mm.data.pixels.file_kind`; None without one."""
        values = self.find(row).values
        stored = next((values[name] for name in values if self.kinds[name] == "image"), None)
        return file_kind(stored) if stored else None

    def eval_prompts(self, task: Task, count: int) -> list[tuple[Document, str | Visual]]:
        """Prompts of a task and what should follow them, of rows spread over the first source that fits.

        Rows that cannot be read are skipped.

        Args:
            task: see `find_tasks`.
            count: how many rows at most.

        Raises:
            ValueError: rows of which none can be read.
        """
        wanted = {part.column for part in task.before if isinstance(part, Column)} | {task.column}
        source = next(place for place, rows in enumerate(self.sources) if wanted <= set(rows.column_names))
        size = len(self.sources[source])
        rows = [i * size // min(count, size) for i in range(min(count, size))]
        filled = []
        for row in rows:
            with suppress(Unreadable):
                filled.append(self.fill((*task.before, Column(task.column)), self.at(source, row)))
        if not filled:
            raise ValueError(f"none of {len(rows)} rows with column {task.column!r} can be read")
        return [(document[:-1], document[-1]) for document in filled]


def choose_kind(feature: Any, column: str) -> tuple[str, Read]:
    """What a column holds, "text", "image" or "video", and how its texts or frames are read.

    A label is read as its name.

    Args:
        feature: of `datasets`.
        column: its name, for messages.

    Raises:
        ValueError: a column of anything else.
    """
    if is_text(feature) or is_text(getattr(feature, "feature", None)):
        return "text", read_texts
    if isinstance(feature, datasets.ClassLabel):
        return "text", partial(read_label, feature)
    if isinstance(feature, datasets.Image):
        return "image", read_image
    read, _ = choose_reader(feature, column)
    return "video", partial(read_video, read)


def agree_on_kinds(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What each column holds, which must be the same in all sources.

    Args:
        sources: column -> text, image or video, of each.

    Raises:
        ValueError: a column that holds images in one source and something else in another.
    """
    kinds: dict[str, str] = {}
    for own in sources:
        for name, kind in own.items():
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(
                    f"column {name!r} holds {kinds[name]}s in one source and {kind}s in another; rename one"
                )
    return kinds


def read_value(read: Read, stored: Any) -> tuple[str, ...]:
    """The texts of a row, none where it holds none."""
    try:
        return tuple(read(stored))
    except UNREADABLE:
        return ()


def read_texts(stored: Any) -> list[str]:
    """The texts of a row, one or several.

    Raises:
        ValueError: none, or something else.
    """
    texts = stored if isinstance(stored, list) else [stored]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text is expected, not {stored!r}")
    return texts


def read_label(feature: datasets.ClassLabel, stored: Any) -> list[str]:
    """The name of a label."""
    return [cast(str, feature.int2str(stored))]


def read_image(stored: dict) -> list[PILImage.Image]:
    """The one frame of an image."""
    return [open_image(stored)]


def read_video(read: Reader, stored: Any) -> list[PILImage.Image]:
    """All frames of a video."""
    return read(stored, take_all)
