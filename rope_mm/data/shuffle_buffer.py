"""Rows of streams in shuffled blocks: an order without end that is a function of the seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from datasets import IterableDataset

from rope_mm.data.seeding import make_generator

RowId = tuple[int, int, int]  # where a row is stored: a source, a shard (file) of it, a row of that


class ShardOffset(NamedTuple):
    """How far a source is read in an epoch: rows in all, shards done, and rows of the next one."""

    rows: int = 0
    shards: int = 0
    row: int = 0


class StreamState(NamedTuple):
    """Where a block begins: how many rows were before it, and of its epoch how much of each source."""

    seed: int
    rows: int = 0
    epoch: int = 0
    block: int = 0
    reached: Sequence[ShardOffset] = ()


@dataclass(frozen=True)
class ShuffleBuffer:
    """Rows of sources, epoch after epoch, each row once in each.

    The sources take turns until each is read, shard after shard in an order drawn anew. Blocks of `shuffle`
    rows are shuffled, the first of an epoch being of any size up to that; 1 leaves all rows as they come.
    `apart` rows, the first ones of each source, are left out.
    """

    sources: Sequence[IterableDataset]
    shuffle: int
    apart: Sequence[int]

    def rows(self, mark: StreamState) -> Iterator[tuple[StreamState, RowId, Any]]:
        """Every row from a mark on, without end: the mark of its block, its place, what it holds.

        Raises:
            ValueError: sources without rows, or that cannot be read.
        """
        while True:
            reached = list(mark.reached) or [ShardOffset()] * len(self.sources)
            rows = self.epoch(mark.seed, mark.epoch, reached)
            while True:
                generator = make_generator(mark.seed, "block", mark.epoch, mark.block)
                size = self.shuffle
                if not mark.block:  # else rows would have the same neighbours in every epoch
                    size = int(torch.randint(1, size + 1, (), generator=generator))
                if not (block := list(islice(rows, size))):
                    break
                for number in torch.randperm(len(block), generator=generator).tolist():
                    yield mark, *block[number]
                mark = StreamState(
                    mark.seed, mark.rows + len(block), mark.epoch, mark.block + 1, tuple(reached)
                )
            if not mark.block:
                raise ValueError("the streams have no rows to train on")
            mark = StreamState(mark.seed, mark.rows, mark.epoch + 1)

    def epoch(self, seed: int, epoch: int, reached: list[ShardOffset]) -> Iterator[tuple[RowId, Any]]:
        """The rest of an epoch's rows; `reached` is kept up with them."""
        left = {}
        for source, rows in enumerate(self.sources):
            order = torch.arange(rows.num_shards)
            if self.shuffle > 1:
                order = torch.randperm(len(order), generator=make_generator(seed, "shards", epoch, source))
            left[source] = self.source(source, order.tolist(), reached[source])
        while left:
            source = min(left, key=lambda source: reached[source].rows)
            if (row := next(left[source], None)) is None:
                del left[source]
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
    """Numbers of a stream's rows from one on, and each as a table; `name` is of what it is read.

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
