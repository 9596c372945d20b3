"""Rules that place a picture by itself, as vision towers and diffusion transformers do: see `layouts`."""

import math

from rope_mm.positions.grids import UNIT, Cursor, grid_positions, merge_order
from rope_mm.registry import Registry
from rope_mm.segments import Segment


def grid(at: Cursor, seen: Segment, t=1.0, y=1.0, x=1.0, first=0.0, merge: int = 1):
    """Every picture starts at `first`, in steps of t, y, x, as in vision towers; words do not count it.

    With `merge` its tokens come in blocks of merge x merge patches, row by row in each (Qwen2-VL's tower).
    """
    steps = [[step * unit for unit in row] for step, row in zip((t, y, x), UNIT, strict=True)]
    return merge_order(grid_positions(seen.grid, (first,) * 3, steps), seen, merge), at.next


def fixed_extent(at: Cursor, seen: Segment, t: float | None = None, y: float = 16.0, x: float = 16.0):
    """Rows span y and columns x whatever their number, and frames t if it is given (CogVideoX, EVA-02)."""
    rows, columns = seen.grid[1:]
    return grid(at, seen, 1.0 if t is None else t / seen.grid[0], y / rows, x / columns)


def normalized_centers(at: Cursor, seen: Segment, norm: str = "separate"):
    """Centres of patches in a picture from -1 to 1: 2 (i + 1/2) / n - 1, n its own side or a common one."""
    sides = {"separate": seen.grid[1:], "min": (min(seen.grid[1:]),) * 2, "max": (max(seen.grid[1:]),) * 2}
    y, x = Registry("norm", sides)[norm]
    return grid_positions(
        seen.grid, (0, 1 / y - 1, 1 / x - 1), ((1, 0, 0), (0, 2 / y, 0), (0, 0, 2 / x))
    ), at.next


def normalized_corners(at: Cursor, seen: Segment):
    """First and last patch at -1 and 1 on every axis; a single one at -1."""
    steps = [[2 / max(n - 1, 1) * unit for unit in row] for n, row in zip(seen.grid, UNIT, strict=True)]
    return grid_positions(seen.grid, (-1,) * 3, steps), at.next


def mochi(at: Cursor, seen: Segment, area: float = 192.0**2):
    """Frames counted; rows and columns centred on 0 and scaled so that every picture has the same area."""
    _, y, x = seen.grid
    scale = math.sqrt(area / (y * x))
    origin = (0, scale * (1 - y) / 2, scale * (1 - x) / 2)
    return grid_positions(seen.grid, origin, ((1, 0, 0), (0, scale, 0), (0, 0, scale))), at.next


def ltx(at: Cursor, seen: Segment, patch: float = 32.0, seconds: float = 8 / 25):
    """Of 20 seconds and 2048 pixels, each from -1 to 1; `seconds` and `patch` pixels are a step."""
    steps = ((seconds / 10, 0, 0), (0, patch / 1024, 0), (0, 0, patch / 1024))
    return grid_positions(seen.grid, (-1,) * 3, steps), at.next


def flux(at: Cursor, seen: Segment):
    """Pictures start at the origin, the k-th one at t = k."""
    return grid_positions(seen.grid, (at.pictures, 0, 0), UNIT), at.next


def flux2(at: Cursor, seen: Segment, apart: float = 10.0):
    """The k-th picture starts at t = 10 k; words have an axis of their own."""
    steps = [(*row, 0) for row in UNIT]
    return grid_positions(seen.grid, (apart * at.pictures, 0, 0, 0), steps), at.next


def msrope(at: Cursor, seen: Segment):
    """The k-th picture is centred on row and column 0 at t = k; words start past the largest half side."""
    _, y, x = seen.grid
    origin = (at.pictures, y // 2 - y, x // 2 - x)
    return grid_positions(seen.grid, origin, UNIT), max(at.next, y // 2, x // 2)


def lumina(at: Cursor, seen: Segment, multiple: int = 1, first: int = 0):
    """Rows and columns from 0, at the t of the next word, rounded up to a `multiple`."""
    start = first + math.ceil(at.next / multiple) * multiple
    return grid_positions(seen.grid, (start, 0, 0), UNIT), at.next + seen.grid[0]


def z_image(at: Cursor, seen: Segment):
    """As in Lumina, after a caption padded to a multiple of 32 and counted from 1."""
    return lumina(at, seen, multiple=32, first=1)
