"""Rules that place an image by itself, as vision towers and diffusion transformers do: see `layouts`."""

import math
from typing import Annotated

import torch

from rope_mm.checks.fields import Count, NotNegative, Number, OneOf, Positive, Reals, WholeNumber
from rope_mm.positions.cursor import Cursor
from rope_mm.positions.grids import UNIT, Raster, causal_latents, check_blocks, grid_positions
from rope_mm.segments import Segment

NORMS = ("separate", "min", "max")


def scaled(t: float, y: float, x: float) -> tuple[tuple[float, ...], ...]:
    """Steps of t, y and x, each along its own axis."""
    return (t, 0, 0), (0, y, 0), (0, 0, x)


def grid(
    cursor: Cursor,
    segment: Segment,
    t: NotNegative = 1.0,
    y: Positive = 1.0,
    x: Positive = 1.0,
    first: Number = 0.0,
    merge: Count = 1,
):
    """Every image starts at `first`, in steps of t, y, x, as in vision towers; text does not count it.

    With `merge` its tokens come in blocks of merge x merge patches, row by row in each (Qwen2-VL's tower).

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        t: step between frames.
        y: step between rows.
        x: step between columns.
        first: position of the first frame, row and column.
        merge: rows and columns of a block.
    """
    check_blocks(segment, merge)
    return Raster(segment.grid, (first,) * 3, scaled(t, y, x), merge), cursor.next


def grid_2d(cursor: Cursor, segment: Segment, y: Positive = 1.0, x: Positive = 1.0, first: Number = 0.0):
    """Rows and columns of every image, and of every frame, from `first`; text does not count them.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        y: step between rows.
        x: step between columns.
        first: position of the first row and column.
    """
    return Raster(segment.grid, (first,) * 2, ((0, 0), (y, 0), (0, x))), cursor.next


def fixed_extent(
    cursor: Cursor, segment: Segment, t: Positive | None = None, y: Positive = 16.0, x: Positive = 16.0
):
    """Rows span y and columns x whatever their number, and frames t if it is given (CogVideoX, EVA-02).

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        t: span of all frames; None counts them.
        y: span of all rows.
        x: span of all columns.
    """
    frames, rows, columns = segment.grid
    return grid(cursor, segment, 1.0 if t is None else t / frames, y / rows, x / columns)


def normalized_centers(cursor: Cursor, segment: Segment, norm: Annotated[str, OneOf(NORMS)] = "separate"):
    """Centers of patches in an image from -1 to 1: 2 (i + 1/2) / n - 1, n its own side or a common one.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        norm: the side n: "separate" takes its own, "min" or "max" the shorter or the longer for both.
    """
    _, y, x = segment.grid
    y, x = {"separate": (y, x), "min": (min(y, x),) * 2, "max": (max(y, x),) * 2}[norm]
    return Raster(segment.grid, (0, 1 / y - 1, 1 / x - 1), scaled(1, 2 / y, 2 / x)), cursor.next


def normalized_corners(cursor: Cursor, segment: Segment):
    """First and last patch at -1 and 1 on every axis; a single one at -1."""
    t, y, x = (2 / max(n - 1, 1) for n in segment.grid)
    return Raster(segment.grid, (-1,) * 3, scaled(t, y, x)), cursor.next


def mochi(cursor: Cursor, segment: Segment, area: Positive = 192.0**2):
    """Frames counted; rows and columns centered on 0 and scaled so that every image has the same area.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        area: of an image, in squared positions.
    """
    _, y, x = segment.grid
    scale = math.sqrt(area / (y * x))
    origin = (0, scale * (1 - y) / 2, scale * (1 - x) / 2)
    return Raster(segment.grid, origin, scaled(1, scale, scale)), cursor.next


def ltx(cursor: Cursor, segment: Segment, patch: Positive = 32.0, seconds: Positive = 8 / 25):
    """20 seconds and 2048 pixels each span -1 to 1; a frame lasts `seconds`, a patch has `patch` pixels.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        patch: pixels from one patch to the next.
        seconds: seconds from one frame to the next.
    """
    return Raster(segment.grid, (-1,) * 3, scaled(seconds / 10, patch / 1024, patch / 1024)), cursor.next


def ltx2(cursor: Cursor, segment: Segment, patch: Positive = 32.0, stride: Count = 8, fps: Positive = 24.0):
    """The middle of each patch, where 20 seconds and 2048 pixels each span -1 to 1.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        patch: pixels from one patch to the next.
        stride: frames of the video in each latent frame after the first, which has one.
        fps: frames of the video in a second.
    """
    step, side = stride / fps / 10, patch / 1024
    start, lead = causal_latents(stride)
    origin = (start * step - 1, side / 2 - 1, side / 2 - 1)
    return Raster(segment.grid, origin, scaled(step, side, side), lead=lead), cursor.next


def frames(cursor: Cursor, segment: Segment, numbers: Annotated[tuple[float, ...] | None, Reals()] = None):
    """Rows and columns from 0, and frames at given numbers.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        numbers: t of each frame; None counts them from 0.

    Raises:
        ValueError: not one number for each frame.
    """
    raster = Raster(segment.grid, (0, 0, 0), UNIT)
    if numbers is None:
        return raster, cursor.next
    if len(numbers) != segment.grid[0]:
        raise ValueError(
            f"{segment} has {segment.grid[0]} frames, but `numbers` has {len(numbers)}; give one for each"
        )
    positions = grid_positions(*raster[:3])
    positions[:, 0] = torch.tensor(numbers, dtype=torch.float64)[positions[:, 0].long()]
    return positions, cursor.next


def flux(cursor: Cursor, segment: Segment):
    """Images start at the origin, the k-th one at t = k."""
    return Raster(segment.grid, (cursor.images, 0, 0), UNIT), cursor.next


def flux2(cursor: Cursor, segment: Segment, step: Positive = 10.0):
    """The k-th image starts at t = step * k; text has an axis of its own.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        step: from one image to the next.
    """
    return Raster(segment.grid, (step * cursor.images, 0, 0, 0), [(*row, 0) for row in UNIT]), cursor.next


def flux3(cursor: Cursor, segment: Segment, step: Positive = 0.5):
    """Images start at the origin in steps of `step`, the k-th one at l = -k; text counts l from 0.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        step: from one row or column to the next.
    """
    steps = [(*row, 0) for row in scaled(1, step, step)]
    return Raster(segment.grid, (0, 0, 0, -cursor.images), steps), cursor.next


def msrope(cursor: Cursor, segment: Segment):
    """The k-th image is centered on row and column 0 at t = k; text starts past the largest half side."""
    _, y, x = segment.grid
    origin = (cursor.images, y // 2 - y, x // 2 - x)
    return Raster(segment.grid, origin, UNIT), max(cursor.next, y // 2, x // 2)


def msrope_layers(cursor: Cursor, segment: Segment, layers: Count = 4):
    """As `msrope`, for a composite, its layers and then the image that they are made of, which has t = -1.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        layers: how many layers there are.

    Raises:
        ValueError: an image after the one that the layers are made of.
    """
    if cursor.images > layers + 1:
        raise ValueError(
            f"with layers={layers} the composite, the layers and their source are {layers + 2} images, but "
            f"this is number {cursor.images + 1}; give the number of layers as the option `layers`"
        )
    raster, after = msrope(cursor, segment)
    number = cursor.images if cursor.images <= layers else -1
    return raster._replace(origin=(number, *raster.origin[1:])), max(after, cursor.images)


def lumina(cursor: Cursor, segment: Segment, multiple: Count = 1, first: WholeNumber = 0):
    """Rows and columns from 0, at the t of the next text token, rounded up to a `multiple`.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        multiple: what the start is rounded up to.
        first: what the start is moved by.
    """
    start = first + math.ceil(cursor.next / multiple) * multiple
    return Raster(segment.grid, (start, 0, 0), UNIT), cursor.next + segment.grid[0]


def z_image(cursor: Cursor, segment: Segment):
    """As in Lumina, after a caption padded to a multiple of 32 and counted from 1."""
    return lumina(cursor, segment, multiple=32, first=1)
