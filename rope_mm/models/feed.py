"""What a process reads at every step: its share of the documents, packed, by seed and step alone."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from rope_mm.data.documents import Documents
from rope_mm.data.order import seeded
from rope_mm.models.packing import Pack, Packer


@dataclass(frozen=True)
class Feed(Dataset):
    """Packs by step. Of `batch` documents a step, every `world`-th from `rank` on is this process's.

    What is random about a document is so by (seed, step, its number), whichever process reads it.
    """

    documents: Documents
    packer: Packer
    seed: int
    batch: int
    world: int = 1
    rank: int = 0

    def __getitem__(self, step: int) -> Pack:
        rows = self.documents.batch(self.seed, step, self.batch)
        mine = range(self.rank, self.batch, self.world)
        generators = [seeded(self.seed, "document", step, number) for number in mine]
        told = [self.documents.tell(rows[n], g) for n, g in zip(mine, generators, strict=True)]
        return self.packer(told, generators)

    def packs(self, steps: Sequence[int], workers: int = 0) -> Iterator[Pack]:
        """The packs of these steps, made ahead by so many workers."""
        return iter(
            DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, worker_init_fn=be_deaf)
        )


def be_deaf(worker: int) -> None:
    """Leave it to the main process to answer Ctrl-C and SIGTERM, which come to its workers too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
