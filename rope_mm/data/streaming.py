"""Documents of rows that are read one after another, shuffled in blocks, and resumed where they were."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from datasets import Dataset, IterableDataset

from rope_mm.data.documents import DocumentDataset, MapDocuments, Record
from rope_mm.data.images import EMBEDDED, choose_splits, load, load_splits, select_rows
from rope_mm.data.shuffle_buffer import RowId, ShardOffset, ShuffleBuffer, StreamState, read_rows


class StreamingDocuments(DocumentDataset):
    """Rows of streams as documents; a row is known by its source, its shard there and its row in that.

    Which rows a step has is a function of (seed, step), by the order of `ShuffleBuffer`; to know them, all
    rows before are read, from `mark` on. Every process and worker reads all rows, and decodes its own.

    Raises:
        ValueError: as from `DocumentDataset`; later, as from `Blocks.rows`.
    """

    mark: StreamState | None = None

    def __init__(
        self,
        sources: Sequence[IterableDataset],
        templates: Sequence[str],
        size: int,
        channels: int,
        join: int = 1,
        shuffle: int = 0,
        apart: Sequence[int] = (),
    ):
        super().__init__(sources, templates, size, channels, join)
        self.blocks = ShuffleBuffer(cast(Any, self.sources), max(shuffle, 1), apart or [0] * len(sources))
        self.reader: Iterator[tuple[StreamState, RowId, Any]] = iter(())
        self.owner: tuple[int, int] | None = None
        self.asked: tuple[int, int, int] | None = None
        self.position = -1
        self.places: list[RowId] = []
        self.held: dict[RowId, Any] = {}

    def texts(self) -> Iterator[str]:
        """The words of the templates only.

        Raises:
            ValueError: on asking for more, as those of a stream are not known before it is read.
        """
        yield from super().texts()
        raise ValueError("the words of a stream are not known before it is read; name another tokenizer")

    def batch(self, seed: int, step: int, batch: int) -> list[list[RowId]]:
        """Places of the rows in each document of a step's batch, each row once in an epoch."""
        if self.asked != (seed, step, batch):
            self.hold(seed, step * batch * self.join, batch * self.join)
            self.asked = seed, step, batch
        return [self.places[first : first + self.join] for first in range(0, len(self.places), self.join)]

    def find(self, row: RowId) -> Record:
        """A row of the last batch asked for."""
        source, shard, number = row
        (values,) = self.held[row].to_pylist()
        return Record(source, f"row {number}{self.blocks.name(source, shard)}", values)

    def hold(self, seed: int, first: int, count: int) -> None:
        """Read on to a row, counted over epochs, and keep so many; from the mark or anew if it is past."""
        mark = self.mark
        if not mark or mark.seed != seed or mark.rows > first:
            mark = StreamState(seed)
        # files that a process has opened are not for those forked from it
        if self.owner != (os.getpid(), seed) or not mark.rows <= self.position <= first:
            self.reader, self.position, self.owner = self.blocks.rows(mark), mark.rows, (os.getpid(), seed)
        ahead, self.position = first - self.position, -1  # should reading fail
        taken = list(islice(self.reader, ahead, ahead + count))
        self.position = first + count
        self.mark = taken[0][0]
        self.places = [place for _, place, _ in taken]
        self.held = {place: table for _, place, table in taken}

    def state_dict(self) -> dict[str, Any]:
        """Where the block begins that the last step began in; small, as its rows are read again."""
        return {"mark": self.mark and [*self.mark[:-1], list(map(list, self.mark.reached))]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of processes."""
        if state["mark"]:
            seed, rows, epoch, block, reached = state["mark"]
            self.mark = StreamState(seed, rows, epoch, block, [ShardOffset(*source) for source in reached])


class Source(NamedTuple):
    """A stream to train on, rows held out of it, and how many of these are its own first ones."""

    train: IterableDataset
    test: Dataset
    apart: int


def load_stream(path: str, held_out: int) -> Source:
    """What `load_splits` loads, as a stream, and the first rows of its test or validation split.

    Where there is none, they are the first rows of the first shard, at most all of it.

    Raises:
        ValueError: as from `load_splits`; a stream that cannot be read, or of which nothing is left.
    """
    if path in EMBEDDED or path.startswith("stacked:") or Path(path).suffix == ".npz":
        splits = load_splits(path)
        test = splits["test"]
        return Source(splits["train"].to_iterable_dataset(), test.select(range(min(held_out, len(test)))), 0)
    train, test = choose_splits(load(path, streaming=True))
    train = with_features(train, path)
    if test is not None:
        return Source(train, head(with_features(test, path), held_out, path), 0)
    first = head(train.shard(train.num_shards, 0), held_out + 1, path)
    if train.num_shards == 1 and len(first) <= held_out:
        count = f"all {len(first)} rows of {path!r}"
        raise ValueError(f"{count} are held out: hold out fewer, or give it a test split")
    test = first.select(range(min(held_out, len(first))))
    return Source(train, test, len(test))


def load_documents(
    paths: Sequence[str],
    where: Mapping[str, Sequence[Any]] | None = None,
    streaming: bool = False,
    shuffle: int = 0,
    held_out: int = 256,
    **how: Any,
) -> tuple[DocumentDataset, MapDocuments]:
    """Documents to train on, and held-out ones, of sources that are loaded whole or streamed.

    Args:
        paths: sources, see `load_splits`.
        where: which of their rows, see `select_rows`; not of streams.
        streaming: whether they are a `StreamingDocuments`, of which only some rows are held at a time.
        shuffle: how many of its rows are shuffled together.
        held_out: how many rows of each stream are for the held-out ones.
        how: templates, size, channels and join of both, see `DocumentDataset`.

    Raises:
        ValueError: as from `load_splits`, `select_rows`, `DocumentDataset` and `StreamingDocuments`; a choice
            of rows of a stream.
    """
    if not streaming:
        splits = [select_rows(load_splits(path), where or {}) for path in paths]
        return MapDocuments([s["train"] for s in splits], **how), MapDocuments(
            [s["test"] for s in splits], **how
        )
    if where:
        raise ValueError(
            f"rows of a stream are not chosen by where, here {dict(where)}; give it no other rows"
        )
    sources = [load_stream(path, held_out) for path in paths]
    apart = [source.apart for source in sources]
    documents = StreamingDocuments([source.train for source in sources], shuffle=shuffle, apart=apart, **how)
    return documents, MapDocuments([source.test for source in sources], **how)


def with_features(rows: IterableDataset, path: str) -> IterableDataset:
    """A stream whose columns are known, from its first row where nothing tells."""
    if rows.features is not None:
        return rows
    for _, first in read_rows(rows, f" of {path}"):
        return rows.cast(datasets.Features.from_arrow_schema(first.schema))
    raise ValueError(f"{path!r} has no rows")


def head(rows: IterableDataset, count: int, path: str) -> Dataset:
    """The first rows of a stream, as stored."""
    stored = [row for _, table in read_rows(rows.take(count), f" of {path}") for row in table.to_pylist()]
    return Dataset.from_list(stored, features=rows.features)
