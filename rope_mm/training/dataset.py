"""What a process reads at every step: its share of the documents, packed, by seed and step alone."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from rope_mm.data.documents import Document, DocumentDataset, Unreadable, too_long_message
from rope_mm.data.seeding import make_generator
from rope_mm.training.packing import PackedBatch, Packer


class DataBatch(NamedTuple):
    """A pack, for each document that is left out of it why, and the mark of a stream."""

    pack: PackedBatch
    left_out: list[str]
    mark: Any


@dataclass(frozen=True)
class PackedDocumentDataset(Dataset):
    """Readings by turn; a step has `parts` turns.

    Of `batch` documents a step every (world * parts)-th is read by this process in a turn. What is random
    about a document is so by (seed, step, its number), whichever process reads it. A document with a row that
    cannot be read, or longer than the packer's rows, is left out, and nothing takes its place.
    """

    documents: DocumentDataset
    packer: Packer
    seed: int
    batch: int
    world: int = 1
    rank: int = 0
    parts: int = 1

    def __getitem__(self, turn: int) -> DataBatch:
        step, part = divmod(turn, self.parts)
        rows = self.documents.batch(self.seed, step, self.batch)
        mine = range(part * self.world + self.rank, self.batch, self.world * self.parts)
        told: list[Document] = []
        numbers, generators, left_out = [], [], []
        for number in mine:
            generator = make_generator(self.seed, "document", step, number)
            try:
                told.append(self.documents.document(rows[number], generator))
            except Unreadable as error:
                left_out.append(str(error))
            else:
                numbers.append(number)
                generators.append(generator)
        drafted = []
        for number, read in zip(numbers, self.packer.read(told, generators), strict=True):
            if read.length <= self.packer.length:
                drafted.append(read)
            else:
                names = ", ".join(self.documents.find(row).name for row in rows[number])
                left_out.append(f"{names}: {too_long_message(read.length, self.packer.length)}")
        if not drafted:  # one without a word or picture, as processes wait for each other's gradients
            drafted = self.packer.read([[""]], [make_generator(self.seed, "nothing")])
        return DataBatch(self.packer.pack(drafted), left_out, self.documents.mark)

    def readings(self, step: int, steps: int, workers: int = 0) -> Iterator[DataBatch]:
        """The readings from one step up to another, made ahead by so many workers."""
        turns = range(step * self.parts, steps * self.parts)
        loader = DataLoader(
            self, batch_size=None, sampler=turns, num_workers=workers, worker_init_fn=ignore_signals
        )
        made = iter(loader)
        atexit.register(kill_workers)  # what is registered last is called first: before torch waits for them
        return without_worker_traceback(made)


def without_worker_traceback(readings: Iterator[DataBatch]) -> Iterator[DataBatch]:
    """Readings, and what a worker refuses without its traceback.

    Raises:
        ValueError: as the worker did, in one sentence.
    """
    try:
        yield from readings
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def ignore_signals(worker: int) -> None:
    """Leave it to the main process to answer Ctrl-C and SIGTERM, which come to its workers too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill what is busy as the main process ends: deaf to being asked, it would be waited for."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's death for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
