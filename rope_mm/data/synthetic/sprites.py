"""Sprites, rendered from what they show: a shape of one colour at one of nine places, and how it moves.

What an image shows is a dict of `FACTORS`, each a tensor (n,) of indices into the names; with "motion" it is
a video. Shape -1 is an empty canvas.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Inside = Callable[[Tensor, Tensor], Tensor]

# what lies inside a shape of radius 1, y down and x right
SHAPES: dict[str, Inside] = {
    "circle": lambda y, x: x**2 + y**2 < 1,
    "square": lambda y, x: torch.maximum(x.abs(), y.abs()) < 0.9,
    "triangle": lambda y, x: (x.abs() < (y + 1.05) / 1.9) & (y < 0.95),
    "diamond": lambda y, x: x.abs() + y.abs() < 1.05,
    "cross": lambda y, x: (torch.minimum(x.abs(), y.abs()) < 0.28) & (torch.maximum(x.abs(), y.abs()) < 1),
    "ring": lambda y, x: (x**2 + y**2 < 1.05) & (x**2 + y**2 > 0.3),
    "moon": lambda y, x: (x**2 + y**2 < 1.05) & ((x - 0.55) ** 2 + y**2 > 0.6),
    "hourglass": lambda y, x: (x.abs() < y.abs() + 0.1) & (y.abs() < 0.95) & (x.abs() < 0.95),
}
COLOURS = {
    "red": (230, 45, 50),
    "yellow": (250, 215, 40),
    "green": (50, 200, 80),
    "cyan": (70, 215, 225),
    "blue": (50, 95, 240),
    "purple": (145, 60, 215),
    "pink": (250, 140, 190),
    "white": (245, 245, 245),
}
BACKGROUND = (20, 22, 34)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


class Motion(NamedTuple):
    """How a sprite moves.

    Attributes:
        down: places from one frame to the next.
        right: places from one frame to the next.
        blinks: whether it is away in every second frame.
    """

    down: int = 0
    right: int = 0
    blinks: bool = False


MOTIONS = {
    "still": Motion(),
    "blinking": Motion(blinks=True),
    "moving up": Motion(down=-1),
    "moving down": Motion(down=1),
    "moving left": Motion(right=-1),
    "moving right": Motion(right=1),
}
PLACES = {"row": ROWS, "column": COLUMNS}
FACTORS: dict[str, tuple[str, ...]] = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), **PLACES}
VIDEO_FACTORS = {**FACTORS, "motion": tuple(MOTIONS)}

RADIUS = 3.5 / 16  # of the shorter side
JITTER = 1 / 16  # of a side; a sprite stands up to one from the middle of its place
SAMPLES = 4  # across a pixel, in both directions
CHUNK = 64  # sprites at once: what their samples take stays in the cache

Factors = Mapping[str, Tensor]


def palette() -> tuple[Tensor, Tensor]:
    """The colours (colour, ch) and the background (ch,), both in 0 to 255."""
    return torch.tensor(list(COLOURS.values())).float(), torch.tensor(BACKGROUND).float()


def sprite_masks(factors: Factors, size: tuple[int, int], jitter: Tensor | None = None) -> Tensor:
    """The share (n, y, x) of each pixel that a sprite covers; the colour plays no part.

    Args:
        factors: shape, row and column, (n,) each.
        size: of the canvas, (y, x) in pixels.
        jitter: steps of a sixteenth of the canvas down and right, (n, 2).
    """
    steps = torch.zeros(len(factors["shape"]), 2) if jitter is None else jitter
    centre = (torch.stack([factors["row"], factors["column"]], 1) + 1) / 4 + steps * JITTER
    fine = [(torch.arange(side * SAMPLES) + 0.5) / SAMPLES for side in size]
    masks, radius = torch.zeros(len(centre), *size), RADIUS * min(size)
    for index, inside in enumerate(SHAPES.values()):
        for rows in filter(len, (factors["shape"] == index).nonzero()[:, 0].split(CHUNK)):
            y, x = ((fine[axis] - centre[rows, axis, None] * size[axis]) / radius for axis in (0, 1))
            masks[rows] = avg_pool2d(inside(y[:, :, None], x[:, None, :]).float(), SAMPLES)
    return masks


def render_sprites(
    factors: Factors, size: int | tuple[int, int] = 16, jitter: Tensor | None = None
) -> Tensor:
    """Images (n, 3, y, x) in 0 to 255, uint8, of what the factors say.

    Args:
        factors: of FACTORS, (n,) each.
        size: y and x in pixels, or the side of a square.
        jitter: steps of a sixteenth of the canvas down and right, (n, 2).

    Raises:
        ValueError: a factor that is missing or has no such name, or a canvas too small.
    """
    check_factors(factors, FACTORS)
    colours, background = palette()
    masks = sprite_masks(factors, canvas(size), jitter)[:, None]
    paint = (colours[factors["colour"]] - background)[:, :, None, None]
    return (background[:, None, None] + masks * paint).round().to(torch.uint8)


def render_videos(
    factors: Factors, frames: int = 4, size: int | tuple[int, int] = 16, jitter: Tensor | None = None
) -> Tensor:
    """Videos (n, t, 3, y, x) in 0 to 255, uint8.

    Args:
        factors: of VIDEO_FACTORS, (n,) each; row and column are those of the first frame.
        frames: of a video.
        size: y and x in pixels, or the side of a square.
        jitter: steps of a sixteenth of the canvas down and right, (n, 2).

    Raises:
        ValueError: as `render_sprites`, or less than two frames.
    """
    check_factors(factors, VIDEO_FACTORS)
    if frames < 2:
        raise ValueError(f"a video needs 2 frames or more to show a motion, not {frames}")
    seen = {name: factor.flatten() for name, factor in trajectory(factors, frames).items()}
    steps = None if jitter is None else jitter.repeat_interleave(frames, 0)
    return render_sprites(seen, size, steps).unflatten(0, (-1, frames))


def trajectory(factors: Factors, frames: int) -> dict[str, Tensor]:
    """What each frame shows, (n, t) each: a sprite moves a place a frame; what leaves enters opposite."""
    time = torch.arange(frames)
    down, right, blinks = torch.tensor(list(MOTIONS.values()))[factors["motion"]].T[..., None]
    away = (blinks == 1) & (time % 2 == 1)
    return {
        "shape": torch.where(away, -1, factors["shape"][:, None]),
        "colour": factors["colour"][:, None].expand(-1, frames),
        "row": (factors["row"][:, None] + down * time) % len(ROWS),
        "column": (factors["column"][:, None] + right * time) % len(COLUMNS),
    }


def canvas(size: int | tuple[int, int]) -> tuple[int, int]:
    """The sizes (y, x) of a canvas.

    Raises:
        ValueError: a side too short to show different shapes.
    """
    y, x = (size, size) if isinstance(size, int) else size
    if min(y, x) < 8:
        raise ValueError(f"a canvas needs 8 pixels or more a side, not {y} x {x}")
    return y, x


def check_factors(factors: Factors, names: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse factors that say nothing to draw.

    Raises:
        ValueError: a factor that is missing, or that has an index without a name.
    """
    for factor, words in names.items():
        if factor not in factors:
            raise ValueError(f"the factor {factor!r} is missing; there are: {', '.join(factors)}")
        index, lowest = factors[factor], -1 if factor == "shape" else 0
        if index.numel() and not lowest <= int(index.min()) <= int(index.max()) < len(words):
            wrong = int(index.max()) if int(index.max()) >= len(words) else int(index.min())
            raise ValueError(f"{factor} {wrong} is unknown; there are {lowest} to {len(words) - 1}")
