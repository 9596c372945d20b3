"""What a process reads at every step: its share of the documents, packed, by seed and step alone."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from rope_mm.data.documents import DocumentDataset, Unreadable
from rope_mm.data.seeding import make_generator
from rope_mm.positions.packing import too_long_message
from rope_mm.training.collator import EncodedDocument, PackedBatch, Packer


@dataclass(frozen=True)
class PackedDocumentDataset(Dataset):
    """Packed batches by number; a step has `micro_batches` of them for each process.

    What is random about a document depends on (seed, step, its number), whichever process reads it. A
    document with a row that cannot be read, or longer than the packer's rows, is skipped, and no other
    takes its place.

    Attributes:
        documents: the data.
        packer: makes the batches.
        seed: of the order and of all random choices.
        global_batch_size: documents of a step, of all processes and micro-batches together.
        world: the number of processes.
        rank: this process's number.
        micro_batches: batches that a process reads in a step.
    """

    documents: DocumentDataset
    packer: Packer
    seed: int
    global_batch_size: int
    world: int = 1
    rank: int = 0
    micro_batches: int = 1

    def __getitem__(self, number: int) -> PackedBatch:
        step, part = divmod(number, self.micro_batches)
        rows = self.documents.batch(self.seed, step, self.global_batch_size)
        first, stride = part * self.world + self.rank, self.world * self.micro_batches
        mine = {number: rows[number] for number in range(first, self.global_batch_size, stride)}
        encoded, skipped = self.encode(step, mine)
        if not encoded:  # a document without text or image: processes wait for each other's gradients
            encoded = self.packer.encode([[""]], [make_generator(self.seed, "nothing")])
        packed = self.packer.pack(encoded)
        return replace(packed, skipped=tuple(skipped), stream_state=self.documents.stream_state)

    def encode(self, step: int, rows: Mapping[int, Sequence[Any]]) -> tuple[list[EncodedDocument], list[str]]:
        """Documents of a step that can be read and fit a row, and why the others are skipped.

        Args:
            step: from 0.
            rows: the number of each document in the step -> the rows that it consists of.
        """
        read, skipped = {}, []
        for number in rows:
            generator = make_generator(self.seed, "document", step, number)
            try:
                read[number] = self.documents.document(rows[number], generator), generator
            except Unreadable as error:
                skipped.append(str(error))
        documents = [document for document, _ in read.values()]
        generators: list[torch.Generator] = [generator for _, generator in read.values()]
        fitting = []
        for number, encoded in zip(read, self.packer.encode(documents, generators), strict=True):
            if encoded.length <= self.packer.max_length:
                fitting.append(encoded)
            else:
                names = ", ".join(self.documents.find(row).name for row in rows[number])
                skipped.append(f"{names}: {too_long_message(encoded.length, self.packer.max_length)}")
        return fitting, skipped

    def make_loader(self, step: int, steps: int, num_workers: int = 0) -> Iterator[PackedBatch]:
        """The batches of the steps from `step` up to `steps`, prepared ahead by worker processes.

        Args:
            step: the first step.
            steps: the step after the last one.
            num_workers: processes; 0 prepares each batch when it is asked for.
        """
        numbers = range(step * self.micro_batches, steps * self.micro_batches)
        loader = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=num_workers, worker_init_fn=ignore_signals
        )
        batches = iter(loader)
        atexit.register(kill_workers)  # what is registered last is called first: before torch waits for them
        return without_worker_traceback(batches)


def check_groups(batch: int, size: int, turns: int, streaming: bool) -> None:
    """Refuse groups of rows that do not fill a step or its micro-batches, and those of streams.

    Args:
        batch: documents of a step.
        size: documents of a group.
        turns: micro-batches of a step, of all processes.
        streaming: whether rows are read as they come.
    """
    if streaming:
        raise ValueError("data.group_by needs all rows at hand; do not stream, or do not group")
    if batch % size or batch // size % turns:
        raise ValueError(
            f"global_batch_size {batch} must be a whole number of groups of data.group_size {size} for each "
            f"of {turns} micro-batches"
        )


def without_worker_traceback(batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """The same batches; a worker's ValueError comes without the worker's traceback.

    Raises:
        ValueError: as the worker did, in one sentence.
    """
    try:
        yield from batches
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach workers too, to the main process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill busy workers as the main process ends, which would otherwise wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's death for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
