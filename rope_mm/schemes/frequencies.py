"""Frequencies: Omega (a, r), the radians that pair r rotates by per unit step on axis a; per head (h, a, r).

Three choices fill it. An ownership says by which axis, or along which direction across the axes, a pair
rotates; a ladder says at which place of how many its frequency stands; a spacing turns places into
frequencies.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rope_mm.registry import Registry


def apportion(pairs: int, shares: Sequence[float]) -> list[int]:
    """How many pairs each axis gets: whole numbers in proportion to the shares, which sum to `pairs`.

    The remainder goes to the largest fractions, earlier axes first: 64 pairs by (1, 1, 1) are 22, 21, 21.
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
    """Each axis gets one pair in every round until it has all its pairs (RoPE-TV: pair i mod a)."""
    return [axis for done in range(max(counts)) for axis, count in enumerate(counts) if done < count]


def yx_then_t(counts: list[int]) -> list[int]:
    """The later axes share the high frequencies in rounds, the first axis owns the lowest (VideoRoPE)."""
    return [axis + 1 for axis in round_robin(counts[1:])] + [0] * counts[0]


def meta233(counts: list[int]) -> list[int]:
    """Two pairs of the first axis, then three rounds of the others, repeated: t t y x y x y x (Lumos-1)."""
    a = len(counts)
    pattern = [0, 0, *(list(range(1, a)) * 3)]
    return [pattern[pair % len(pattern)] for pair in range(sum(counts))]


def meta466(counts: list[int]) -> list[int]:
    """`meta233` with every pair twice, which Lumos-1's code has: t t t t y y x x y y x x y y x x."""
    pairs = sum(counts)
    return [meta233([(pairs + 1) // 2, *(0 for _ in counts[1:])])[pair // 2] for pair in range(pairs)]


OWNERSHIPS = Registry(
    "ownership",
    {
        "chunk": chunk,
        "stride3": stride3,
        "round-robin": round_robin,
        "yx-then-t": yx_then_t,
        "meta233": meta233,
        "meta466": meta466,
    },
)


class Directions(NamedTuple):
    """Unit directions (h, a, r) along which pairs rotate, and the group of each pair that shares a ladder."""

    vectors: Tensor
    groups: list[int]


def bases(axes: int, heads: int, seed: int) -> Tensor:
    """A random orthonormal basis (heads, axes, axes) for every head; columns are directions."""
    noise = torch.randn(heads, axes, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def dense(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Each head has random orthogonal axes, each with a run of pairs (RoPE-Mixed, arXiv 2403.13298).

    Args:
        axes: number of position axes.
        pairs: pairs of each head.
        heads: number of heads.
        shares: part of the pairs on each axis.
        seed: of random directions.
    """
    groups = chunk(apportion(pairs, shares))
    return Directions(bases(axes, heads, seed)[..., groups], groups)


def golden(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Directions spread evenly over heads and pairs (Golden-gate RoPE, jerryxio.ng/posts/nd-rope).

    On two axes each is a golden angle past the one before; on more they are a low-discrepancy sequence.

    Args:
        axes: number of position axes.
        pairs: pairs of each head.
        heads: number of heads.
        shares: part of the pairs on each axis.
        seed: of random directions.
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
    """The a + 1 corners of a regular simplex share each frequency, rotated at random for each head (nD-RoPE).

    Corners are the unit vectors of a + 1 dimensions minus their mean, in the a dimensions orthogonal to it.

    Args:
        axes: number of position axes.
        pairs: pairs of each head.
        heads: number of heads.
        shares: part of the pairs on each axis.
        seed: of random directions.
    """
    corners = torch.eye(axes + 1, dtype=torch.float64) - 1 / (axes + 1)
    projected = torch.linalg.svd(corners).Vh[:axes] @ corners
    groups = round_robin(apportion(pairs, (1,) * (axes + 1)))
    return Directions(bases(axes, heads, seed) @ (projected / projected.norm(dim=0))[:, groups], groups)


def headwise(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Each axis owns whole heads, in proportion to its share (MHRoPE, arXiv 2510.23095).

    Args:
        axes: number of position axes.
        pairs: pairs of each head.
        heads: number of heads.
        shares: part of the pairs on each axis.
        seed: of random directions.
    """
    owners = chunk(apportion(heads, shares))
    vectors = torch.eye(axes, dtype=torch.float64)[owners]
    return Directions(vectors[..., None].expand(heads, axes, pairs), [0] * pairs)


def spiral(axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int) -> Directions:
    """Two pairs along an axis and two at 45 degrees to it in turn, four directions (Spiral RoPE, 2602.03227).

    Args:
        axes: number of position axes, which must be 2.
        pairs: pairs of each head.
        heads: number of heads.
        shares: part of the pairs on each axis.
        seed: of random directions.

    Raises:
        ValueError: other than two axes.
    """
    if axes != 2:
        raise ValueError(f"the directions of 'spiral' lie in a plane of two axes, not {axes}; take 'golden'")
    groups = chunk(apportion(pairs, shares))
    places = own_ladder(groups)[0]
    eighths = [2 * group + place // 2 % 2 for group, place in zip(groups, places, strict=True)]
    angle = torch.tensor(eighths, dtype=torch.float64) * math.pi / 4
    return Directions(torch.stack((angle.cos(), angle.sin()))[None], groups)


DIRECTIONS = Registry(
    "ownership",
    {"dense": dense, "golden": golden, "simplex": simplex, "headwise": headwise, "spiral": spiral},
)


def shared_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """Pair i of all r has place i of r, whoever owns it, as in RoPE-1D (RoFormer, section 3.2.2)."""
    return list(range(len(groups))), [len(groups)] * len(groups)


def own_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """Each axis has a whole ladder of its own: the i-th of its n pairs has place i of n (axial rotary)."""
    counted = Counter()
    places = []
    for group in groups:
        places.append(counted[group])
        counted[group] += 1
    return places, [counted[group] for group in groups]


def dealt_ladder(groups: list[int]) -> tuple[list[int], list[int]]:
    """One ladder of r places is dealt out: the i-th pair of axis k of a has place a i + k (Pixtral)."""
    names = sorted(set(groups))
    own, _ = own_ladder(groups)
    places = [len(names) * i + names.index(group) for i, group in zip(own, groups, strict=True)]
    return places, [len(groups)] * len(groups)


LADDERS = Registry("ladder", {"shared": shared_ladder, "own": own_ladder, "dealt": dealt_ladder})


def geometric(index: Tensor, count: Tensor, theta: float, freq_range: tuple[float, float]) -> Tensor:
    """theta ** -(i / n): from 1 down, the last of n one step above 1 / theta (RoFormer).

    Args:
        index: (r,), place of each pair on its ladder.
        count: (r,), pairs on the ladder.
        theta: base of the frequencies.
        freq_range: first and last frequency; geometric ignores it.
    """
    return theta ** -(index / count)


def logarithmic(index: Tensor, count: Tensor, theta: float, freq_range: tuple[float, float]) -> Tensor:
    """From the first to the last frequency of the range in equal ratios (DINOv3's periods, timm's pixels).

    Args:
        index: (r,), place of each pair on its ladder.
        count: (r,), pairs on the ladder.
        theta: base of the frequencies.
        freq_range: first and last frequency; geometric ignores it.
    """
    first, last = freq_range
    return first * (last / first) ** (index / (count - 1).clamp(min=1))


def linear(index: Tensor, count: Tensor, theta: float, freq_range: tuple[float, float]) -> Tensor:
    """From the first to the last frequency of the range in equal steps (rotary-embedding-torch's pixels).

    Args:
        index: (r,), place of each pair on its ladder.
        count: (r,), pairs on the ladder.
        theta: base of the frequencies.
        freq_range: first and last frequency; geometric ignores it.
    """
    first, last = freq_range
    return first + (last - first) * index / (count - 1).clamp(min=1)


SPACINGS: Registry[Callable[..., Tensor]] = Registry(
    "spacing", {"geometric": geometric, "log": logarithmic, "linear": linear}
)


@dataclass(frozen=True)
class Ladder:
    """The frequencies of all pairs, as extensions read them.

    Attributes:
        freq: frequencies (r,).
        index: place (r,) of each pair on its ladder, from 0.
        count: number of places (r,) of that ladder.
        theta: the base of a geometric ladder.
        directions: unit directions (h, a, r) along which pairs rotate.
    """

    freq: Tensor
    index: Tensor
    count: Tensor
    theta: float
    directions: Tensor


def unextended(ladder: Ladder) -> Tensor:
    """The frequencies as they are: no extension."""
    return ladder.freq


def check_ownership(ownership: str) -> None:
    """Refuse an unknown ownership.

    Raises:
        ValueError: a name that is in neither registry, with all the names there are.
    """
    _ = Registry("ownership", OWNERSHIPS | DIRECTIONS)[ownership]


def pair_directions(
    ownership: str, axes: int, pairs: int, heads: int, shares: Sequence[float], seed: int
) -> Directions:
    """Directions of every pair; along the axes, (1, a, r), where axes own pairs.

    Args:
        ownership: a key of OWNERSHIPS or DIRECTIONS.
        axes: how many axes.
        pairs: how many pairs of channels.
        heads: how many rows of Omega.
        shares: the part of the pairs of each axis.
        seed: of random directions.

    Raises:
        ValueError: an unknown ownership.
    """
    check_ownership(ownership)
    if ownership in DIRECTIONS:
        return DIRECTIONS[ownership](axes, pairs, heads, shares, seed)
    groups = OWNERSHIPS[ownership](apportion(pairs, shares))
    return Directions(torch.eye(axes, dtype=torch.float64)[None, :, groups], groups)


def make_omega(
    axes: int,
    pairs: int,
    theta: float = 10_000.0,
    ownership: str = "round-robin",
    axis_shares: Sequence[float] | None = None,
    ladder: str = "shared",
    spacing: str = "geometric",
    freq_range: tuple[float, float] = (1.0, 1.0),
    extend: Callable[[Ladder], Tensor] = unextended,
    heads: int = 1,
    seed: int = 0,
) -> Tensor:
    """Omega (h, a, r) in float64: the frequency of every pair times its direction across the axes.

    Args:
        axes: how many axes a positions have.
        pairs: how many pairs r of channels rotate.
        theta: the base of the geometric spacing.
        ownership: a key of OWNERSHIPS or DIRECTIONS.
        axis_shares: the part of the pairs of each axis, in any unit; None gives equal parts.
        ladder: a key of LADDERS.
        spacing: a key of SPACINGS.
        freq_range: first and last frequency of the spacings "log" and "linear".
        extend: the frequencies (r,) that replace those of a Ladder.
        heads: how many rows h Omega has.
        seed: of random directions.

    Raises:
        ValueError: shares that are not one per axis, an unknown ownership, ladder or spacing.
    """
    shares = check_shares(axes, axis_shares)
    directions, groups = pair_directions(ownership, axes, pairs, heads, shares, seed)
    index, count = (torch.tensor(x, dtype=torch.float64) for x in LADDERS[ladder](groups))
    freq = SPACINGS[spacing](index, count, theta, freq_range)
    freq = extend(Ladder(freq, index, count, theta, directions))
    return (directions * freq).repeat(heads // len(directions), 1, 1)


def check_shares(axes: int, shares: Sequence[float] | None) -> Sequence[float]:
    """The shares of the axes; equal ones for None.

    Raises:
        ValueError: shares that are not one number >= 0 per axis, or all 0.
    """
    shares = (1,) * axes if shares is None else shares
    if len(shares) != axes or min(shares) < 0 or not sum(shares):
        raise ValueError(
            f"axis_shares must be {axes} numbers >= 0, one per axis, not all 0, but are {shares}"
        )
    return shares


def ownership_map(omega: Tensor, axes: Sequence[str]) -> str:
    """A letter for each pair: its axis, "." where none rotates it, "*" where several do; a line per head.

    Args:
        omega: frequencies (a, r) or (h, a, r).
        axes: a letter for each axis.
    """

    def letter(rotates: list[bool]) -> str:
        mine = [axis for axis, does in zip(axes, rotates, strict=True) if does]
        return mine[0] if len(mine) == 1 else "*" if mine else "."

    heads = omega.reshape(-1, *omega.shape[-2:]) != 0
    lines = ["".join(map(letter, head.T.tolist())) for head in heads]
    return lines[0] if len(set(lines)) == 1 else "\n".join(lines)
