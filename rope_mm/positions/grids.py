"""Where a story stopped, and the rasters and walks that layouts are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.segments import Segment

UNIT = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


@dataclass(frozen=True)
class Cursor:
    """Where a story stopped: give it back to `place` and the story goes on with the same numbers.

    `next` is the position of the next word; `tokens` and `pictures` stand before it; `layout` is the rule
    that counted; `video` is what more frames or sound would belong to: where it began, its frames, rows,
    columns and seconds, and its sound tokens so far. `Cursor()` is the start of any story; JSON carries it.
    """

    next: float = 0.0
    tokens: int = 0
    pictures: int = 0
    layout: str = ""
    video: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "video", tuple(self.video))  # JSON has lists only


def grid_positions(grid: Sequence[int], origin: Sequence[float], steps: Sequence[Sequence[float]]) -> Tensor:
    """Positions (t*y*x, a) of a raster: origin + (t, y, x) @ steps, in raster order."""
    index = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    return torch.tensor(origin, dtype=torch.float64) + index @ torch.tensor(steps, dtype=torch.float64)


def merge_order(positions: Tensor, seen: Segment, merge: int) -> Tensor:
    """Raster rows (t*y*x, a) in the order of merge x merge blocks.

    Raises:
        ValueError: rows or columns that blocks do not tile.
    """
    t, y, x = seen.grid
    if y % merge or x % merge:
        raise ValueError(f"{seen} does not divide into blocks of {merge} x {merge} patches")
    blocks = positions.view(t, y // merge, merge, x // merge, merge, -1)
    return blocks.transpose(2, 3).reshape(t * y * x, -1)


def centred(start: float, room: float, sizes: Sequence[int]) -> list[float]:
    """First coordinate of a unit grid of each size whose middle is the middle of the room."""
    return [start + (room - size) / 2 for size in sizes]


def diagonal(at: Cursor, n: int, a: int) -> tuple[Tensor, float]:
    """Words walk along all axes at once."""
    return grid_positions((n, 1, 1), (at.next,) * a, ((1,) * a,) * 3), at.next + n


def text_along_axis(axis: int):
    """Words walk along one axis and stay at the origin of the others."""

    def words(at: Cursor, n: int, a: int) -> tuple[Tensor, float]:
        return diagonal(at, n, a)[0] * torch.eye(a, dtype=torch.float64)[axis], at.next + n

    return words


def text_at_origin(at: Cursor, n: int, a: int) -> tuple[Tensor, float]:
    """Words stand at the origin: they are not rotated."""
    return torch.zeros(n, a, dtype=torch.float64), at.next


def text_from_one(at: Cursor, n: int, a: int) -> tuple[Tensor, float]:
    """Words along t, the first at 1."""
    positions, after = text_along_axis(0)(at, n, a)
    return positions + torch.eye(a, dtype=torch.float64)[0], after
