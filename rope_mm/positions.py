"""Segments -> positions: where each token stands on the axes of its layout, real numbers, 0-based.

A layout is a rule for pictures, `(start, t, y, x) -> positions (t*y*x, a), room`: `start` is where the
next word would have stood, `room` how far the word after the picture is moved on. Words walk along all axes
at once, n -> (n, ..., n). Every layout's numbers are halves, which float64 holds exactly; a rate or a
drift of one's own may round.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.choice import Choice
from rope_mm.segments import Segment, Text, read_segments

TYX, YX = ("t", "y", "x"), ("y", "x")
UNIT = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


@dataclass(frozen=True)
class Cursor:
    """Where a story stopped: give it back to `place` and the story goes on with the same numbers.

    `next` is the position of the next word, `tokens` how many stand before it, `layout` which rule counted;
    `Cursor()` is the start of any story.
    """

    next: float = 0.0
    tokens: int = 0
    layout: str = ""


@dataclass(frozen=True)
class Layout:
    """Axes, the rule that unfolds a picture on them, and where the rule was published."""

    axes: tuple[str, ...]
    unfold: Callable[..., tuple[Tensor, float]]
    source: str


def lattice(grid: Sequence[int], origin: Sequence[float], steps: Sequence[Sequence[float]]) -> Tensor:
    """Positions (t*y*x, a) of a raster: origin + (t, y, x) @ steps, in raster order."""
    index = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    return torch.tensor(origin, dtype=torch.float64) + index @ torch.tensor(steps, dtype=torch.float64)


def centred(start: float, room: float, sizes: Sequence[int]) -> list[float]:
    """First coordinate of a unit grid of each size whose middle is the middle of the room."""
    return [start + (room - size) / 2 for size in sizes]


def flat(start: float, t: int, y: int, x: int):
    """Patches are counted as words are, row by row."""
    return lattice((t, y, x), (start,), ((y * x,), (x,), (1,))), t * y * x


def grid(start: float, t: int, y: int, x: int):
    """Every picture starts at the origin, as in vision towers; words do not count it."""
    return lattice((t, y, x), (0, 0, 0), UNIT), 0


def m_rope(start: float, t: int, y: int, x: int):
    """The picture hangs from the next word's place; words go on past its longest side, time included."""
    return lattice((t, y, x), (start,) * 3, UNIT), max(t, y, x)


def rope_tie(start: float, t: int, y: int, x: int):
    """Steps of x+1 down and y+1 across end every picture on the diagonal; a video is pictures in a row."""
    room = (x + 1) * (y + 1) - 1
    return lattice((t, y, x), (start + x, start + y), ((room, room), (x + 1, 0), (0, y + 1))), t * room


def rope_tv(start: float, t: int, y: int, x: int):
    """A unit grid in the middle of the room that its tokens would take as words."""
    room = t * y * x
    return lattice((t, y, x), centred(start, room, (t, y, x)), UNIT), room


def rope_tv_2d(start: float, t: int, y: int, x: int):
    """RoPE-TV on rows and columns; a video is pictures in a row."""
    room = y * x
    return lattice((t, y, x), centred(start, room, (y, x)), ((room, room), (1, 0), (0, 1))), t * room


def causal(start: float, t: int, y: int, x: int, rate: float = 1.0, drift: float | None = None):
    """A frame takes the room of `rate` words a patch, the next one stands `drift` further on all axes.

    Without `drift` a frame drifts by its own room: then a video of unknown length counts as its tokens do and
    lies symmetric between its words, and no other drift achieves that.
    """
    room = rate * y * x
    drift = room if drift is None else drift
    steps = ((drift,) * 3, *UNIT[1:])
    return lattice((t, y, x), centred(start, room, (1, y, x)), steps), room + drift * (t - 1)


LAYOUTS = Choice(
    "layout",
    {
        "flat": Layout(("t",), flat, "RoFormer, arXiv 2104.09864, over raster tokens"),
        "grid": Layout(TYX, grid, "axial rotary of vision towers, kexue.fm 8397"),
        "m-rope": Layout(TYX, m_rope, "Qwen2-VL, arXiv 2409.12191"),
        "rope-tie": Layout(YX, rope_tie, "kexue.fm 10040"),
        "rope-tv": Layout(TYX, rope_tv, "kexue.fm 10352"),
        "rope-tv-2d": Layout(YX, rope_tv_2d, "kexue.fm 10352"),
        "rope-tv-causal": Layout(TYX, causal, "kexue.fm 10352, made causal: see `causal`"),
    },
)


def place(
    story: str | Sequence[Segment], layout: str = "rope-tv", cursor: Cursor | None = None, **options: float
) -> tuple[Tensor, Cursor]:
    """Positions (s, a) float64 of a story's tokens, and the cursor from which the story can go on.

    Args:
        story: segments, or their text form "text:5 image:2x3".
        layout: a key of LAYOUTS.
        cursor: where an earlier call stopped; the start if None.
        options: the layout's own numbers, `rate` and `drift` of "rope-tv-causal".

    Raises:
        ValueError: an unknown layout or option, or a cursor of another layout.
    """
    chosen = LAYOUTS[layout]
    name = spell(layout, read_options(layout, options))
    cursor = cursor or Cursor()
    if cursor.layout not in ("", name):
        raise ValueError(f"this cursor stopped in layout {cursor.layout!r}, so it cannot go on in {name!r}")
    a = len(chosen.axes)
    blocks, start, tokens = [torch.empty(0, a, dtype=torch.float64)], cursor.next, cursor.tokens
    for segment in read_segments(story):
        if isinstance(segment, Text):
            block, room = lattice(segment.grid, (start,) * a, ((1,) * a,) * 3), segment.tokens
        else:
            block, room = chosen.unfold(start, *segment.grid, **options)
        blocks.append(block)
        start, tokens = start + room, tokens + segment.tokens
    return torch.cat(blocks), Cursor(start, tokens, name)


def read_options(layout: str, options: dict[str, float]) -> dict[str, float]:
    """The options that differ from the layout's own.

    Raises:
        ValueError: an option that the layout does not take.
    """
    parameters = inspect.signature(LAYOUTS[layout].unfold).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty}
    if unknown := set(options) - set(known):
        raise ValueError(f"layout {layout!r} takes {list(known) or 'no options'}, not {sorted(unknown)}")
    return {name: value for name, value in options.items() if value != known[name]}


def spell(layout: str, options: dict[str, float]) -> str:
    """A layout and its options in one word, such as rope-tv-causal(rate=0.5)."""
    inner = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{layout}({inner})" if inner else layout
