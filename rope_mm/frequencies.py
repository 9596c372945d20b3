"""Frequencies: Omega (a, r), radians that pair r turns per unit step on axis a; per head (h, a, r).

Two choices fill it. A ladder says how fast each pair turns; an ownership says on which axis, or, where it is
dense, in which direction across the axes.
"""

import torch
from torch import Tensor

from rope_mm.choice import Choice


def apportion(pairs: int, shares: tuple[int, ...]) -> list[int]:
    """How many pairs each axis gets: in proportion to its share, whole, summing to `pairs`.

    What is left over goes to the largest remainders, earlier axes first: 64 by (1, 1, 1) is 22, 21, 21.
    """
    exact = [pairs * share / sum(shares) for share in shares]
    counts = [int(count) for count in exact]
    for axis in sorted(range(len(shares)), key=lambda a: counts[a] - exact[a])[: pairs - sum(counts)]:
        counts[axis] += 1
    return counts


def chunk(counts: list[int]) -> list[int]:
    """Each axis owns one run of pairs, the first axis the fastest (Qwen2-VL)."""
    return [axis for axis, count in enumerate(counts) for _ in range(count)]


def stride3(counts: list[int]) -> list[int]:
    """Axis k > 0 owns pairs k, k+a, ... below a * count, the first axis all others (Qwen3-VL)."""
    a, owners = len(counts), [0] * sum(counts)
    for axis in range(1, a):
        for pair in range(axis, min(a * counts[axis], len(owners)), a):
            owners[pair] = axis
    return owners


def round_robin(counts: list[int]) -> list[int]:
    """Axes take turns, one pair each, those already served skipped (RoPE-TV: pair i mod a)."""
    turns = max(counts)
    return [axis for turn in range(turns) for axis, count in enumerate(counts) if turn < count]


OWNERSHIPS = Choice("ownership", {"chunk": chunk, "stride3": stride3, "round-robin": round_robin})


def shared_ladder(owners: list[int]) -> list[float]:
    """Pair i of all r turns as in RoPE-1D, whoever owns it: exponents i / r (RoFormer, section 3.2.2)."""
    return [pair / len(owners) for pair in range(len(owners))]


def own_ladder(owners: list[int]) -> list[float]:
    """Each axis runs down its own whole ladder: the i-th of its n pairs has exponent i / n (axial)."""
    return [owners[:pair].count(axis) / owners.count(axis) for pair, axis in enumerate(owners)]


LADDERS = Choice("ladder", {"shared": shared_ladder, "own": own_ladder})


def directions(axes: int, heads: int, seed: int) -> Tensor:
    """A random orthonormal basis (heads, axes, axes) for every head; columns are directions."""
    noise = torch.randn(heads, axes, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def make_omega(
    axes: int,
    pairs: int,
    theta: float = 10_000.0,
    ownership: str = "round-robin",
    shares: tuple[int, ...] | None = None,
    ladder: str = "shared",
    heads: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Omega (a, r), or (h, a, r) for `heads`, in float64: theta ** -exponent on the owner's row, 0 elsewhere.

    With ownership "dense" each head has its own directions: pair i turns along the i-th of them (mod a), as
    at the start of RoPE-Mixed (arXiv 2403.13298), where they are learned.

    Raises:
        ValueError: shares that are not one per axis, an unknown ownership or ladder.
    """
    shares = shares or (1,) * axes
    if len(shares) != axes or min(shares) < 0 or not sum(shares):
        raise ValueError(f"shares must be {axes} numbers >= 0, one per axis, not all 0, but are {shares}")
    dense = ownership == "dense"
    owners = (round_robin if dense else OWNERSHIPS[ownership])(apportion(pairs, shares))
    speed = theta ** -torch.tensor(LADDERS[ladder](owners), dtype=torch.float64)  # (r,)
    basis = directions(axes, heads or 1, seed) if dense else torch.eye(axes, dtype=torch.float64)  # (h, a, a)
    omega = basis[..., owners] * speed
    if heads is None:
        return omega.reshape(axes, pairs)
    return omega.expand(heads, axes, pairs)
