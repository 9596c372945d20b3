"""Rasters: grids of tokens and runs of text, which layouts are made of."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from rope_mm.positions.cursor import Cursor
from rope_mm.segments import Segment

LARGE = 1 << 12  # tokens of a raster that is computed by itself
UNIT = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
TextRule = Callable[[Cursor, int, int], "tuple[Raster | Tensor, float]"]


class Raster(NamedTuple):
    """Positions origin + (t, y, x) @ steps of a grid of tokens, x fastest; `fill` computes them.

    A layout's rule may return one in place of a tensor. Then many segments are computed at once, and more
    frames of a video are computed without those before them.

    Attributes:
        grid: frames, rows and columns.
        origin: position (a,) of the first token of frame 0.
        steps: three steps (a,): from a frame, a row and a column to the next.
        merge: tokens of a frame run in blocks of merge x merge, row by row in each block.
        pace: where it is given, frame k stands floor(k * pace) steps from frame 0, not k.
        first_frame: the number of the first frame of the grid.
        offsets: what is added to the tokens (y*x, a) of every frame.
        lead: how many steps frame 0 stands after the origin, from which the others are counted.
    """

    grid: tuple[int, int, int]
    origin: Sequence[float]
    steps: Sequence[Sequence[float]]
    merge: int = 1
    pace: float | None = None
    first_frame: int = 0
    offsets: Tensor | None = None
    lead: float = 0.0

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        t, y, x = self.grid
        return t * y * x

    def frame_numbers(self) -> Tensor:
        """How many steps each frame (t,) is from the origin, float64."""
        k = torch.arange(self.first_frame, self.first_frame + self.grid[0], dtype=torch.float64)
        if self.pace is not None:
            k = (k * self.pace + 1e-6).floor()  # 69 * (2 / 15) * 25 is a little below 230
        if self.lead and not self.first_frame:
            k[0] += self.lead
        return k


def fill(rasters: Sequence[Raster]) -> Tensor:
    """Positions (s, a) float64 of rasters, one after another; all have a axes.

    Small ones are computed together, as each call of torch costs more than their numbers; large ones by
    themselves, as that takes no more memory than their positions.
    """
    blocks = []
    for large, group in groupby(rasters, lambda raster: raster.tokens > LARGE):
        run = list(group)
        blocks += map(fill_alone, run) if large else [fill_together(run)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def fill_alone(raster: Raster) -> Tensor:
    """Positions (s, a) float64 of one raster."""
    (t, y, x), merge = raster.grid, raster.merge
    numbers = torch.tensor((raster.origin, *raster.steps), dtype=torch.float64)
    origin, of_t, of_y, of_x = numbers
    a = len(origin)
    frames = origin + raster.frame_numbers()[:, None] * of_t
    rows, columns = (
        torch.arange(n, dtype=torch.float64)[:, None] * step for n, step in ((y, of_y), (x, of_x))
    )
    down = frames.view(t, 1, 1, 1, 1, a) + rows.view(1, y // merge, 1, merge, 1, a)
    positions = (down + columns.view(1, 1, x // merge, 1, merge, a)).view(t, y * x, a)
    if raster.offsets is not None:
        positions += raster.offsets
    return positions.view(-1, a)


def fill_together(rasters: Sequence[Raster]) -> Tensor:
    """Positions (s, a) float64 of rasters, one after another."""
    tokens = [raster.tokens for raster in rasters]
    counts = torch.tensor(tokens)
    which = torch.repeat_interleave(counts, output_size=sum(tokens))  # a size that fake tensors know, too
    number = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    shapes = torch.tensor([(r.grid[1] * r.grid[2], r.grid[2], r.merge, r.first_frame) for r in rasters])
    per_frame, columns, merge, first = shapes.T[:, which]
    frame = number // per_frame
    number = number - frame * per_frame
    if all(raster.merge == 1 for raster in rasters):  # divisions of whole numbers are what takes time here
        y = number // columns
        x = number - y * columns
    else:
        block_row, number = number // (merge * columns), number % (merge * columns)
        block_column, inner = number // merge**2, number % merge**2
        y, x = block_row * merge + inner // merge, block_column * merge + inner % merge
    numbers = torch.tensor([(r.origin, *r.steps) for r in rasters], dtype=torch.float64)
    origin, of_t, of_y, of_x = numbers[which].unbind(1)
    t = (frame + first).double()
    start = 0
    for raster in rasters:
        if raster.pace is not None or raster.lead:
            t[start : start + raster.tokens] = raster.frame_numbers().repeat_interleave(
                raster.grid[1] * raster.grid[2]
            )
        start += raster.tokens
    positions = origin + t[:, None] * of_t + y[:, None] * of_y + x[:, None] * of_x
    return add_offsets(positions, rasters)


def add_offsets(positions: Tensor, rasters: Sequence[Raster]) -> Tensor:
    """Positions (s, a) with the offsets of the rasters that have any."""
    start = 0
    for raster in rasters:
        if raster.offsets is not None:
            positions[start : start + raster.tokens] += raster.offsets.repeat(raster.grid[0], 1)
        start += raster.tokens
    return positions


def same_frames(one: Raster, other: Raster) -> bool:
    """Whether two rasters put every frame that both have in the same place, however many frames they have."""
    numbers = [
        (*r.grid[1:], *r.origin, *(n for step in r.steps for n in step), r.merge, r.pace, r.lead)
        for r in (one, other)
    ]
    if one.offsets is None or other.offsets is None:
        return numbers[0] == numbers[1] and one.offsets is other.offsets
    return numbers[0] == numbers[1] and torch.equal(one.offsets, other.offsets)


def grid_positions(grid: Sequence[int], origin: Sequence[float], steps: Sequence[Sequence[float]]) -> Tensor:
    """Positions (t*y*x, a) float64 of a grid: origin + (t, y, x) @ steps, in raster order.

    Args:
        grid: frames t, rows y and columns x.
        origin: position (a,) of the first token.
        steps: three steps (a,): from a frame, a row and a column to the next.
    """
    t, y, x = grid
    return fill([Raster((t, y, x), origin, steps)])


def merge_order(positions: Tensor, segment: Segment, merge: int) -> Tensor:
    """Raster rows (t*y*x, a) in the order of merge x merge blocks, row by row in each block.

    Args:
        positions: rows (t*y*x, a) of the segment's tokens in raster order.
        segment: an image or a video.
        merge: rows and columns of a block.

    Raises:
        ValueError: rows or columns that blocks do not tile.
    """
    check_blocks(segment, merge)
    t, y, x = segment.grid
    blocks = positions.view(t, y // merge, merge, x // merge, merge, -1)
    return blocks.transpose(2, 3).reshape(t * y * x, -1)


def check_blocks(segment: Segment, merge: int) -> None:
    """Refuse a segment that blocks of merge x merge patches do not tile.

    Raises:
        ValueError: its rows or columns are no multiple of `merge`.
    """
    _, y, x = segment.grid
    if y % merge or x % merge:
        raise ValueError(f"{segment} does not divide into blocks of {merge} x {merge} patches")


def centred(start: float, span: float, sizes: Sequence[int]) -> list[float]:
    """First coordinate of a unit grid of each size whose middle is the middle of the span."""
    return [start + (span - size) / 2 for size in sizes]


def causal_latents(stride: int) -> tuple[float, float]:
    """Origin and lead, in steps, of the middles of latents: the first has one frame, the others `stride`.

    A causal autoencoder makes such latents (LTX-2, `causal_offset` 1): latent k > 0 has its middle at
    stride * k + 1 - stride / 2 frames, latent 0 at 1/2.
    """
    return 1 / stride - 1 / 2, (stride - 1) / (2 * stride)


def diagonal(start: float, n: int, a: int, step: float = 1.0) -> Raster:
    """A run of n tokens along all a axes at once."""
    return Raster((n, 1, 1), (start,) * a, ((step,) * a,) * 3)


def text_on_diagonal(cursor: Cursor, n: int, a: int) -> tuple[Raster, float]:
    """Text is counted on all axes at once."""
    return diagonal(cursor.next, n, a), cursor.next + n


def text_along_axes(*axes: int, first: float = 0.0) -> TextRule:
    """Text is counted along some axes from `first`, and stays at 0 on the others.

    Args:
        axes: the numbers of the axes.
        first: where the first text token of a sequence stands.
    """

    def rule(cursor: Cursor, n: int, a: int) -> tuple[Raster, float]:
        unit = tuple(float(k in axes) for k in range(a))
        origin = [(first + cursor.next) * along for along in unit]
        return Raster((n, 1, 1), origin, (unit,) * 3), cursor.next + n

    return rule


def text_at_origin(cursor: Cursor, n: int, a: int) -> tuple[Raster, float]:
    """Text stands at the origin: it is not rotated."""
    return at_origin(n, a), cursor.next


def at_origin(n: int, a: int) -> Raster:
    """n tokens at the origin."""
    return Raster((n, 1, 1), (0.0,) * a, ((0.0,) * a,) * 3)


def is_finite(raster: Raster) -> bool:
    """Whether all its numbers are finite."""
    offsets = raster.offsets is None or bool(raster.offsets.isfinite().all())
    return offsets and all(map(math.isfinite, (*raster.origin, *(n for step in raster.steps for n in step))))
