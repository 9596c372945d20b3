"""Batches of images of one size, from data whose images have several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rope_mm.data.seeding import ShuffledOrder, make_generator

Size = tuple[int, int]  # pixels (y, x)


class Buckets:
    """Rows by the size of their images; the rows of a batch have one size.

    A step's size is chosen with probability proportional to its number of rows. What a batch holds depends
    on seed, step and batch size alone.

    Args:
        sizes: pixels (y, x) of each row's image.

    Attributes:
        rows: the numbers of the rows of each size, most rows first.
    """

    def __init__(self, sizes: Sequence[Size]):
        rows: dict[Size, list[int]] = {}
        for row, size in enumerate(sizes):
            rows.setdefault(size, []).append(row)
        most_first = sorted(rows, key=lambda size: (-len(rows[size]), size))
        self.rows = {size: torch.tensor(rows[size]) for size in most_first}
        self.orders = {size: ShuffledOrder(len(rows[size])) for size in most_first}

    @property
    def sizes(self) -> list[Size]:
        """The sizes there are, that of most rows first."""
        return list(self.rows)

    def batch(self, seed: int, step: int, batch: int) -> tuple[Size, Tensor]:
        """The size of a step's images, and the numbers (batch,) of their rows.

        Args:
            seed: of all draws and shuffles.
            step: 0, 1, ...
            batch: how many rows a step takes.
        """
        size = self.sizes[0]
        if len(self.rows) > 1:
            weights = torch.tensor([float(len(rows)) for rows in self.rows.values()])
            size = self.sizes[
                int(torch.multinomial(weights, 1, generator=make_generator(seed, "bucket", step)))
            ]
        return size, self.rows[size][self.orders[size].batch(seed, step, batch)]
