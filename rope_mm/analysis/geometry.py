"""What positions and frequencies make of a sequence: collisions, overlaps, wavelengths, decay, scores."""

import math
from typing import Any

import torch
from torch import Tensor

from rope_mm.segments import Segment

DEAD_TURN = 0.1  # radians over the whole sequence, below which a pair distinguishes no two tokens
REACH = 64  # distances of the decay curves


def find_collisions(positions: Tensor) -> list[list[int]]:
    """Groups of tokens that share one position (s, a)."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for token, place in enumerate(positions.tolist()):
        groups.setdefault(tuple(round(x, 9) for x in place), []).append(token)
    return [group for group in groups.values() if len(group) > 1]


def find_overlaps(segments: list[Segment], times: Tensor) -> list[str]:
    """A sentence for every segment of which tokens stand no later in time than the end of an earlier one.

    Args:
        segments: what the sequence holds.
        times: (s,), the first coordinate of every token.
    """
    found, parts = [], times.split([segment.tokens for segment in segments])
    for later, earlier in ((j, i) for j in range(len(parts)) for i in range(j)):
        count = int((parts[later] <= parts[earlier].max()).sum())
        if count:
            found.append(
                f"{count} of the {len(parts[later])} tokens of {segments[later]} (segment {later}) stand no "
                f"later in time than the last token of {segments[earlier]} (segment {earlier})"
            )
    return found


def describe_pairs(omega: Tensor, span: list[float]) -> list[dict[str, Any]]:
    """For each pair the frequency on every axis, its wavelength, and whether it is of use on this sequence.

    Args:
        omega: (a, r), radians a step.
        span: (a,), how far the positions reach on each axis.
    """
    rows = []
    for column in omega.T.tolist():
        fastest = max(map(abs, column))
        turn = sum(abs(speed) * reach for speed, reach in zip(column, span, strict=True))
        state = "dead" if turn < DEAD_TURN else "aliased" if fastest > math.pi else "useful"
        rows.append({"omega": column, "wavelength": math.tau / fastest if fastest else None, "state": state})
    return rows


def decay(speeds: Tensor) -> list[float]:
    """The mean of cos(omega d) over the pairs (r,) of one axis at distances 0 to REACH - 1.

    It is the expected score of two equal heads that far apart, over that at distance 0 (RoFormer, 3.4.3).
    """
    turning = speeds[speeds != 0]
    if not len(turning):
        return [1.0] * REACH
    return torch.outer(torch.arange(REACH, dtype=speeds.dtype), turning).cos().mean(1).tolist()


def scores(positions: Tensor, omega: Tensor, token: int) -> list[float]:
    """The mean of cos over all pairs of the angles between one token and every token.

    Args:
        positions: (s, a).
        omega: (a, r).
        token: number of the one.
    """
    return ((positions - positions[token]) @ omega).cos().mean(1).tolist()
