"""Randomness as a function of (seed, step): nothing to save, and a resumed run draws what it would have."""

import hashlib

import torch
from torch import Tensor


def make_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on device and key alone, such as (seed, "noise", step, rank)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices (batch,) of step 0, 1, ... through one shuffle of range(size) after another, each seen once."""
    first = step * batch
    epochs = range(first // size, (first + batch - 1) // size + 1)
    order = torch.cat(
        [torch.randperm(size, generator=make_generator(seed, "order", epoch)) for epoch in epochs]
    )
    return order[first % size :][:batch]
