"""Documents of rows that are read one after another, shuffled in blocks, and resumed where they were."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import torch
from datasets import Dataset, DatasetBuilder, IterableDataset

from rope_mm.data.documents import DocumentDataset, MapDocuments, Record
from rope_mm.data.images import (
    choose_splits,
    find_images,
    is_made_here,
    load_splits,
    load_streams,
    select_rows,
)
from rope_mm.data.pixels import BACKGROUND
from rope_mm.data.seeding import make_generator

RowId = tuple[int, int, int]  # where a row is stored: a source, a shard (file) of it, a row of that


class ShardOffset(NamedTuple):
    """How far a source is read in an epoch.

    Attributes:
        rows: read in all.
        shards: read to their ends.
        row: rows read of the next shard.
    """

    rows: int = 0
    shards: int = 0
    row: int = 0


class StreamState(NamedTuple):
    """Where a block begins.

    Attributes:
        seed: of the order.
        rows: read before it, over all epochs.
        epoch: which one it is of.
        block: its number in the epoch.
        reached: how much of each source was read before it in the epoch.
    """

    seed: int
    rows: int = 0
    epoch: int = 0
    block: int = 0
    reached: Sequence[ShardOffset] = ()


@dataclass(frozen=True)
class ShuffleBuffer:
    """Rows of sources, epoch after epoch, each row once in each.

    The sources take turns until each is read, shard after shard in a new random order. Blocks of rows are
    shuffled, the first of an epoch being of any size up to that of the others.

    Attributes:
        sources: streams.
        shuffle: rows of a block; 1 leaves all rows as they come.
        apart: how many rows, the first ones of each source, are skipped.
    """

    sources: Sequence[IterableDataset]
    shuffle: int
    apart: Sequence[int]

    def rows(self, state: StreamState) -> Iterator[tuple[StreamState, RowId, Any]]:
        """Every row from a state on, without end: the state at its block's start, its id, what it holds.

        Raises:
            ValueError: sources without rows, or that cannot be read.
        """
        while True:
            reached = list(state.reached) or [ShardOffset()] * len(self.sources)
            rows = self.epoch(state.seed, state.epoch, reached)
            while True:
                generator = make_generator(state.seed, "block", state.epoch, state.block)
                size = self.shuffle
                if not state.block:  # else rows would have the same neighbours in every epoch
                    size = int(torch.randint(1, size + 1, (), generator=generator))
                if not (block := list(islice(rows, size))):
                    break
                for number in torch.randperm(len(block), generator=generator).tolist():
                    yield state, *block[number]
                state = StreamState(
                    state.seed, state.rows + len(block), state.epoch, state.block + 1, tuple(reached)
                )
            if not state.block:
                raise ValueError("the streams have no rows to train on")
            state = StreamState(state.seed, state.rows, state.epoch + 1)

    def epoch(self, seed: int, epoch: int, reached: list[ShardOffset]) -> Iterator[tuple[RowId, Any]]:
        """The rest of an epoch's rows; `reached` is updated with each of them."""
        rest = {}
        for source, rows in enumerate(self.sources):
            order = torch.arange(rows.num_shards)
            if self.shuffle > 1:
                order = torch.randperm(len(order), generator=make_generator(seed, "shards", epoch, source))
            rest[source] = self.source(source, order.tolist(), reached[source])
        while rest:
            source = min(rest, key=lambda source: reached[source].rows)
            if (row := next(rest[source], None)) is None:
                del rest[source]
                continue
            reached[source], place, table = row
            yield place, table

    def source(
        self, source: int, order: Sequence[int], begun: ShardOffset
    ) -> Iterator[tuple[ShardOffset, RowId, Any]]:
        """The rest of a source, shard by shard, and how far it is read after each row.

        Raises:
            ValueError: where it cannot be read.
        """
        rows, (total, done, first) = self.sources[source], begun
        for number, shard in enumerate(order[done:], done):
            first = max(first, self.apart[source] if shard == 0 else 0)
            name = self.name(source, shard)
            for row, table in read_rows(rows.shard(rows.num_shards, shard), name, first):
                total += 1
                yield ShardOffset(total, number, row + 1), (source, shard, row), table
            first = 0

    def name(self, source: int, shard: int) -> str:
        """What a shard is called, as far as there are several."""
        several = self.sources[source].num_shards > 1, len(self.sources) > 1
        names = f"shard {shard}", f"source {source}"
        return "".join(f" of {name}" for name, more in zip(names, several, strict=True) if more)


def read_rows(rows: IterableDataset, name: str, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbers of a stream's rows, and each as a table.

    Args:
        rows: a stream.
        name: what messages call it, after " of ".
        first: where to begin.

    Raises:
        ValueError: where it cannot be read.
    """
    number = first
    try:
        # by `iter`, as a worker of a DataLoader would else be given some shards only
        for table in cast(Any, rows).skip(first).with_format("arrow").iter(1):
            yield number, table
            number += 1
    # what a source of any format may raise is for `datasets` to know
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"row {number}{name} cannot be read, nor what follows: {reason}") from error


class StreamingDocuments(DocumentDataset):
    """Rows of streams as documents; a row is known by its source, its shard there and its row in that.

    Which rows a step has is a function of (seed, step), by the order of `ShuffleBuffer`; to know them, all
    rows before are read, from `stream_state` on. Every process and worker reads all rows and decodes its
    own.

    Args:
        sources: streams of `datasets`.
        templates: see `read_template`.
        size: y and x of images in pixels, or the side of a square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        rows_per_document: rows that are joined in a document.
        background: the colour under what is transparent, where channels is 1 or 3.
        keep_aspect: see `DocumentDataset`.
        flip: mirror each image and video half of the times that it is read.
        shuffle: rows that are shuffled together.
        apart: how many rows, the first ones of each source, are skipped.

    Raises:
        ValueError: as from `DocumentDataset`; later, as from `ShuffleBuffer.rows`.
    """

    stream_state: StreamState | None = None

    def __init__(
        self,
        sources: Sequence[IterableDataset],
        templates: Sequence[str],
        size: int | tuple[int, int],
        channels: int,
        rows_per_document: int = 1,
        background: str = BACKGROUND,
        keep_aspect: int | None = None,
        flip: bool = False,
        shuffle: int = 0,
        apart: Sequence[int] = (),
    ):
        super().__init__(sources, templates, size, channels, rows_per_document, background, keep_aspect, flip)
        self.blocks = ShuffleBuffer(cast(Any, self.sources), max(shuffle, 1), apart or [0] * len(sources))
        self.reader: Iterator[tuple[StreamState, RowId, Any]] = iter(())
        self.owner: tuple[int, int] | None = None
        self.asked: tuple[int, int, int] | None = None
        self.position = -1
        self.places: list[RowId] = []
        self.held: dict[RowId, Any] = {}

    def texts(self) -> Iterator[str]:
        """The texts of the templates only.

        Raises:
            ValueError: on asking for more, as those of a stream are not known before it is read.
        """
        yield from super().texts()
        raise ValueError("the words of a stream are not known before it is read; name another tokenizer")

    def batch(self, seed: int, step: int, batch: int) -> list[list[RowId]]:
        """Ids of the rows in each document of a step's batch, each row once in an epoch.

        Args:
            seed: of the order of rows.
            step: 0, 1, ...
            batch: how many documents.
        """
        if self.asked != (seed, step, batch):
            self.hold(seed, step * batch * self.rows_per_document, batch * self.rows_per_document)
            self.asked = seed, step, batch
        return [
            self.places[first : first + self.rows_per_document]
            for first in range(0, len(self.places), self.rows_per_document)
        ]

    def find(self, row: RowId) -> Record:
        """A row of the last batch asked for."""
        source, shard, number = row
        (values,) = self.held[row].to_pylist()
        return Record(source, f"row {number}{self.blocks.name(source, shard)}", values)

    def hold(self, seed: int, first: int, count: int) -> None:
        """Read on to row `first`, counted over epochs, and keep `count` rows of it; anew if it is past."""
        stream_state = self.stream_state
        if not stream_state or stream_state.seed != seed or stream_state.rows > first:
            stream_state = StreamState(seed)
        # files that a process has opened are not for those forked from it
        if self.owner != (os.getpid(), seed) or not stream_state.rows <= self.position <= first:
            self.reader, self.position, self.owner = (
                self.blocks.rows(stream_state),
                stream_state.rows,
                (os.getpid(), seed),
            )
        ahead, self.position = first - self.position, -1  # should reading fail
        taken = list(islice(self.reader, ahead, ahead + count))
        self.position = first + count
        self.stream_state = taken[0][0]
        self.places = [place for _, place, _ in taken]
        self.held = {place: table for _, place, table in taken}

    def state_dict(self) -> dict[str, Any]:
        """Where the block begins that the last step began in; small, as its rows are read again."""
        return {
            "stream_state": self.stream_state
            and [*self.stream_state[:-1], list(map(list, self.stream_state.reached))]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of processes."""
        if state["stream_state"]:
            seed, rows, epoch, block, reached = state["stream_state"]
            self.stream_state = StreamState(
                seed, rows, epoch, block, [ShardOffset(*source) for source in reached]
            )


class Source(NamedTuple):
    """A stream to train on and rows held out of it.

    Attributes:
        train: the stream.
        test: rows at hand.
        apart: how many of them are the stream's own first ones.
        files: what is read, see `list_files`.
    """

    train: IterableDataset
    test: Dataset
    apart: int
    files: Sequence[str]


def load_stream(path: str, held_out: int) -> Source:
    """What `load_splits` loads, as a stream, and the first rows of its test or validation split.

    Where there is none, they are the first rows of the first shard, at most all of it.

    Args:
        path: see `load_splits`.
        held_out: how many rows to hold out.

    Raises:
        ValueError: as from `load_splits`; a stream that cannot be read, or of which nothing is left.
    """
    if is_made_here(path):
        splits = load_splits(path)
        test = splits["test"]
        first = test.select(range(min(held_out, len(test))))
        return Source(splits["train"].to_iterable_dataset(), first, 0, [describe_file(path)])
    builder, streams = load_streams(path)
    train, test = choose_splits(streams)
    files, train = list_files(builder), with_features(train, path)
    if test is not None:
        return Source(train, head(with_features(test, path), held_out, path), 0, files)
    first = head(train.shard(train.num_shards, 0), held_out + 1, path)
    if train.num_shards == 1 and len(first) <= held_out:
        count = f"all {len(first)} rows of {path!r}"
        raise ValueError(f"{count} are held out: hold out fewer, or give it a test split")
    test = first.select(range(min(held_out, len(first))))
    return Source(train, test, len(test), files)


def list_files(builder: DatasetBuilder) -> list[str]:
    """What is known of the files of a source before they are read: see `describe_file`.

    Args:
        builder: of the source, see `load_streams`.
    """
    files = builder.config.data_files or {}
    return sorted(describe_file(file) for split in files.values() for file in split)


def describe_file(address: str) -> str:
    """The name and size of a file here; of one elsewhere its address, which on the hub has a revision."""
    path = Path(address)
    return f"{path.name} {path.stat().st_size}" if path.is_file() else address


def load_documents(
    paths: Sequence[str],
    filter: Mapping[str, Sequence[Any]] | None = None,
    streaming: bool = False,
    shuffle: int = 0,
    held_out: int = 256,
    **how: Any,
) -> tuple[DocumentDataset, MapDocuments]:
    """Documents to train on, and held-out ones, of sources that are loaded whole or streamed.

    Args:
        paths: sources, see `load_splits`.
        filter: which of their rows, see `select_rows`; not of streams.
        streaming: whether they become `StreamingDocuments`, which keep only some rows in memory.
        shuffle: how many of its rows are shuffled together.
        held_out: how many rows of each stream are for the held-out ones.
        how: templates, size, channels and so on of both, see `DocumentDataset`.

    Raises:
        ValueError: as from `load_splits`, `select_rows`, `DocumentDataset` and `StreamingDocuments`; a choice
            of rows of a stream.
    """
    if not streaming:
        splits = [select_rows(load_splits(path), filter or {}) for path in paths]
        train, test = ([s[name] for s in splits] for name in ("train", "test"))
        return MapDocuments(train, **how), MapDocuments(test, **cast(Any, how | {"flip": False}))
    if filter:
        raise ValueError(
            f"rows of a stream cannot be filtered, here by {dict(filter)}; do not stream, or do not filter"
        )
    sources = [load_stream(path, held_out) for path in paths]
    apart = [source.apart for source in sources]
    documents = StreamingDocuments([source.train for source in sources], shuffle=shuffle, apart=apart, **how)
    documents.files = [file for source in sources for file in source.files]
    return documents, MapDocuments([source.test for source in sources], **cast(Any, how | {"flip": False}))


def with_features(rows: IterableDataset, path: str) -> IterableDataset:
    """A stream with known columns and decoded images; without declared columns the first row shows them."""
    if rows.features is not None:
        return find_images(rows, Path(path).parent)
    for _, first in read_rows(rows, f" of {path}"):
        return find_images(rows.cast(datasets.Features.from_arrow_schema(first.schema)), Path(path).parent)
    raise ValueError(f"{path!r} has no rows")


def head(rows: IterableDataset, count: int, path: str) -> Dataset:
    """The first rows of a stream, as stored.

    Args:
        rows: the stream.
        count: how many rows at most.
        path: what messages call it.
    """
    stored = [row for _, table in read_rows(rows.take(count), f" of {path}") for row in table.to_pylist()]
    return Dataset.from_list(stored, features=rows.features)
