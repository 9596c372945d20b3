"""Frequencies: Omega (a, r), radians that pair r turns per unit step on axis a; per head (h, a, r).

Three choices fill it. An ownership says on which axis, or in which direction across the axes, a pair turns; a
ladder on which rung it stands; a spacing how fast the rungs turn.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rope_mm.registry import Registry


def apportion(pairs: int, shares: Sequence[float]) -> list[int]:
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


def yx_then_t(counts: list[int]) -> list[int]:
    """The later axes take turns on the fast pairs, the first axis owns the slowest (VideoRoPE, Ernie 4.5)."""
    return [axis + 1 for axis in round_robin(counts[1:])] + [0] * counts[0]


def meta233(counts: list[int]) -> list[int]:
    """Two pairs of the first axis, three of each other by turns, and again: t t y x y x y x (Lumos-1)."""
    a = len(counts)
    pattern = [0, 0, *(list(range(1, a)) * 3)]
    return [pattern[pair % len(pattern)] for pair in range(sum(counts))]


OWNERSHIPS = Registry(
    "ownership",
    {
        "chunk": chunk,
        "stride3": stride3,
        "round-robin": round_robin,
        "yx-then-t": yx_then_t,
        "meta233": meta233,
    },
)


class Directions(NamedTuple):
    """Unit directions (h, a, r) in which pairs turn, and the group (r,) whose ladder a pair stands on."""

    vectors: Tensor
    groups: list[int]


def bases(axes: int, heads: int, seed: int) -> Tensor:
    """A random orthonormal basis (heads, axes, axes) for every head; columns are directions."""
    noise = torch.randn(heads, axes, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def dense(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Each head has axes of its own, at random, each with a run of pairs (RoPE-Mixed, arXiv 2403.13298)."""
    groups = chunk(apportion(pairs, shares))
    return Directions(bases(axes, heads, seed)[..., groups], groups)


def golden(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Directions spread evenly over heads and pairs (Golden-gate RoPE, jerryxio.ng/posts/nd-rope).

    On two axes each is a golden angle past the last; on more they are a low-discrepancy sequence made normal.
    """
    number = torch.arange(heads * pairs, dtype=torch.float64)
    if axes == 2:
        angle = number * math.pi * (math.sqrt(5) - 1) / 2
        vectors = torch.stack((angle.cos(), angle.sin()))
    else:
        root = 2.0  # of x ** (axes + 1) = x + 1
        for _ in range(64):
            root = (1 + root) ** (1 / (axes + 1))
        steps = root ** -torch.arange(1, axes + 1, dtype=torch.float64)
        vectors = torch.erfinv(2 * ((number + 1) * steps[:, None] % 1) - 1)
        vectors = vectors / vectors.norm(dim=0)
    return Directions(vectors.view(axes, heads, pairs).transpose(0, 1), [0] * pairs)


def simplex(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """On every rung the a + 1 corners of a regular simplex, turned at random for each head (nD-RoPE).

    Corners are the unit vectors of a + 1 dimensions less their mean, seen in the a dimensions across it.
    """
    corners = torch.eye(axes + 1, dtype=torch.float64) - 1 / (axes + 1)
    across = torch.linalg.svd(corners).Vh[:axes] @ corners
    groups = round_robin(apportion(pairs, (1,) * (axes + 1)))
    return Directions(bases(axes, heads, seed) @ (across / across.norm(dim=0))[:, groups], groups)


def headwise(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Each axis owns whole heads, in proportion to its share (MHRoPE, arXiv 2510.23095)."""
    owners = chunk(apportion(heads, shares))
    vectors = torch.eye(axes, dtype=torch.float64)[owners]
    return Directions(vectors[..., None].expand(heads, axes, pairs), [0] * pairs)


DIRECTIONS = Registry(
    "ownership", {"dense": dense, "golden": golden, "simplex": simplex, "headwise": headwise}
)


def shared_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """Pair i of all r stands on rung i of r, whoever owns it, as in RoPE-1D (RoFormer, section 3.2.2)."""
    return list(range(len(groups))), [len(groups)] * len(groups)


def own_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """Each axis runs down its own whole ladder: the i-th of its n pairs is on rung i of n (axial)."""
    counted = Counter()
    rungs = []
    for group in groups:
        rungs.append(counted[group])
        counted[group] += 1
    return rungs, [counted[group] for group in groups]


def dealt_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """One ladder of r rungs dealt out: the i-th pair of axis k of a is on rung a i + k (Pixtral)."""
    names = sorted(set(groups))
    rungs, _ = own_ladder(groups)
    return [len(names) * i + names.index(g) for i, g in zip(rungs, groups, strict=True)], [len(groups)] * len(
        groups
    )


LADDERS = Registry("ladder", {"shared": shared_ladder, "own": own_ladder, "dealt": dealt_ladder})


def geometric(rung: Tensor, rungs: Tensor, theta: float, band: tuple[float, float]) -> Tensor:
    """theta ** -(i / n): from 1 down, the last rung one above 1 / theta (RoFormer)."""
    return theta ** -(rung / rungs)


def logarithmic(rung: Tensor, rungs: Tensor, theta: float, band: tuple[float, float]) -> Tensor:
    """From first to last of the band in equal ratios, both reached (DINOv3's periods, timm's pixels)."""
    first, last = band
    return first * (last / first) ** (rung / (rungs - 1).clamp(min=1))


def linear(rung: Tensor, rungs: Tensor, theta: float, band: tuple[float, float]) -> Tensor:
    """From first to last of the band in equal steps, both reached (rotary-embedding-torch's pixels)."""
    first, last = band
    return first + (last - first) * rung / (rungs - 1).clamp(min=1)


SPACINGS: Registry[Callable[..., Tensor]] = Registry(
    "spacing", {"geometric": geometric, "log": logarithmic, "linear": linear}
)


class Ladder(NamedTuple):
    """What extensions read of the pairs: speeds, rungs, how many (r,), theta and directions (h, a, r)."""

    speed: Tensor
    rung: Tensor
    rungs: Tensor
    theta: float
    vectors: Tensor


def unextended(ladder: Ladder) -> Tensor:
    """Speeds as they are: no extension."""
    return ladder.speed


def pair_directions(
    ownership: str, axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int
) -> Directions:
    """Directions of every pair; along the axes, (1, a, r), where axes own pairs.

    Raises:
        ValueError: an unknown ownership.
    """
    if ownership in DIRECTIONS:
        return DIRECTIONS[ownership](axes, pairs, heads, shares, seed)
    if ownership not in OWNERSHIPS:
        Registry("ownership", OWNERSHIPS | DIRECTIONS)[ownership]  # it is in neither: say what there is
    groups = OWNERSHIPS[ownership](apportion(pairs, shares))
    return Directions(torch.eye(axes, dtype=torch.float64)[None, :, groups], groups)


def make_omega(
    axes: int,
    pairs: int,
    theta: float = 10_000.0,
    ownership: str = "round-robin",
    shares: Sequence[float] | None = None,
    ladder: str = "shared",
    spacing: str = "geometric",
    band: tuple[float, float] = (1.0, 1.0),
    extend: Callable[[Ladder], Tensor] = unextended,
    heads: int = 1,
    seed: int = 0,
) -> Tensor:
    """Omega (h, a, r) in float64: for every pair its speed, times its direction across the axes.

    Raises:
        ValueError: shares that are not one per axis, an unknown ownership, ladder or spacing.
    """
    shares = shares or (1,) * axes
    if len(shares) != axes or min(shares) < 0 or not sum(shares):
        raise ValueError(f"shares must be {axes} numbers >= 0, one per axis, not all 0, but are {shares}")
    vectors, groups = pair_directions(ownership, axes, pairs, heads, shares, seed)
    rung, rungs = (torch.tensor(x, dtype=torch.float64) for x in LADDERS[ladder](groups))
    speed = SPACINGS[spacing](rung, rungs, theta, band)
    speed = extend(Ladder(speed, rung, rungs, theta, vectors))
    return (vectors * speed).repeat(heads // len(vectors), 1, 1)


def ownership_map(omega: Tensor, axes: Sequence[str]) -> str:
    """A letter for each pair: its axis, "." where none, "*" where several turn it; a line for each head."""

    def letter(turned: list[bool]) -> str:
        mine = [axis for axis, turns in zip(axes, turned, strict=True) if turns]
        return mine[0] if len(mine) == 1 else "*" if mine else "."

    heads = omega.reshape(-1, *omega.shape[-2:]) != 0
    lines = ["".join(map(letter, head.T.tolist())) for head in heads]
    return lines[0] if len(set(lines)) == 1 else "\n".join(lines)
