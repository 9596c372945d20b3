"""Randomness as a function of (seed, step), without a state to save.

A resumed run gets the same numbers as an uninterrupted one.
"""

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

EVALUATION = "exam"  # key of what is random in an evaluation; another key would change every measured result


def make_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on device and key alone.

    Args:
        key: such as (seed, "noise", step, rank).
        device: of the generator.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class ShuffledOrder:
    """Batches of indices through one shuffle of range(size) after another, each index once an epoch.

    What a batch holds depends on seed, step and batch size alone. The shuffles of the last batch's epochs are
    kept, so that an epoch is shuffled once and not at every step.

    Args:
        size: how many indices.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"an order needs 1 row or more, not {size}")
        self.size = size
        self.epochs: dict[tuple[int, int], Tensor] = {}  # (seed, epoch) -> its shuffle (size,)

    def batch(self, seed: int, step: int, batch: int) -> Tensor:
        """Indices (batch,) of a step.

        Args:
            seed: of all shuffles.
            step: 0, 1, ...
            batch: how many indices a step takes.
        """
        first = step * batch
        epochs = range(first // self.size, (first + batch - 1) // self.size + 1)
        self.epochs = {(seed, epoch): self.shuffle(seed, epoch) for epoch in epochs}
        return torch.cat(list(self.epochs.values()))[first % self.size :][:batch]

    def shuffle(self, seed: int, epoch: int) -> Tensor:
        """The order (size,) of an epoch."""
        if (kept := self.epochs.get((seed, epoch))) is not None:
            return kept
        return torch.randperm(self.size, generator=make_generator(seed, "order", epoch))


class GroupedOrder:
    """Batches of indices in groups of one value, chosen anew in every step.

    The chance of a value grows with its rows; in a batch it comes once, while there are as many values as
    groups. What a batch holds depends on seed, step and batch size alone. Of G groups each G-th index is of
    the same one, so that processes and micro-batches, if their number divides G, get whole groups.

    Args:
        values: of each index; None: in no group.
        size: indices of a group, each once; all of them and some again where a value has fewer.

    Raises:
        ValueError: no values, groups of fewer than 1.
    """

    def __init__(self, values: Sequence[Hashable | None], size: int):
        if size < 1:
            raise ValueError(f"a group needs 1 row or more, not {size}")
        members: dict[Hashable, list[int]] = {}
        for index, value in enumerate(values):
            if value is not None:
                members.setdefault(value, []).append(index)
        if not members:
            raise ValueError(f"none of {len(values)} rows has a value to group it by")
        self.members, self.size = [torch.tensor(mine) for mine in members.values()], size
        self.counts = torch.tensor([float(len(rows)) for rows in self.members])

    def batch(self, seed: int, step: int, batch: int) -> Tensor:
        """Indices (batch,) of a step.

        Args:
            seed: of all choices.
            step: 0, 1, ...
            batch: how many indices a step takes.

        Raises:
            ValueError: a batch that is not made of whole groups.
        """
        groups, rest = divmod(batch, self.size)
        if rest:
            raise ValueError(f"{batch} rows of a step are no whole number of groups of {self.size} rows")
        generator, again = make_generator(seed, "groups", step), groups > len(self.members)
        chosen = self.counts.multinomial(groups, again, generator=generator)
        turns = torch.arange(self.size)
        columns = []
        for rows in (self.members[value] for value in chosen.tolist()):
            columns.append(rows[torch.randperm(len(rows), generator=generator)[turns % len(rows)]])
        return torch.stack(columns, 1).flatten()


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of one step alone; `ShuffledOrder` gives the same for many steps and is faster.

    Args:
        size: indices are those of range(size).
        batch: how many indices a step takes.
        seed: of all shuffles.
        step: 0, 1, ...
    """
    return ShuffledOrder(size).batch(seed, step, batch)
