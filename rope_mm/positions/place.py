"""Segments -> positions: where each token stands on the axes of its layout, real numbers, 0-based.

Positions are data, made outside models. A story may come in pieces: a cursor carries on where the last one
stopped, and the pieces get the numbers that the whole would have got.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.positions.grids import Cursor, diagonal
from rope_mm.positions.layouts import LAYOUTS, Layout
from rope_mm.segments import Audio, MoreFrames, Segment, Text, Unrotated, Video, VideoAudio, read_segments


def place(
    story: str | Sequence[Segment], layout: str = "rope-tv", cursor: Cursor | None = None, **options: Any
) -> tuple[Tensor, Cursor]:
    """Positions (s, a) float64 of a story's tokens, and the cursor from which the story can go on.

    Args:
        story: segments, or their text form "text:5 image:2x3".
        layout: a key of LAYOUTS.
        cursor: where an earlier call stopped; the start if None.
        options: the layout's own numbers, such as `rate` and `drift` of "rope-tv-causal".

    Raises:
        ValueError: an unknown layout or option, a cursor of another layout, frames or sound without their
            video, or more frames where the layout would have to move those already placed.
    """
    chosen = LAYOUTS[layout]
    name = layout_id(layout, read_options(layout, options))
    cursor = cursor or Cursor()
    if cursor.layout not in ("", name):
        raise ValueError(f"this cursor stopped in layout {cursor.layout!r}, so it cannot go on in {name!r}")
    blocks = [torch.empty(0, len(chosen.axes), dtype=torch.float64)]
    for segment in read_segments(story):
        block, cursor = place_segment(segment, chosen, replace(cursor, layout=name), options)
        blocks.append(block)
    return torch.cat(blocks), cursor


def place_segment(
    seen: Segment, layout: Layout, at: Cursor, options: dict[str, Any]
) -> tuple[Tensor, Cursor]:
    """Positions of one segment, and the cursor after it."""
    a, video = len(layout.axes), ()
    match seen:
        case Unrotated():
            block, after, video = torch.zeros(seen.tokens, a, dtype=torch.float64), at.next, at.video
        case MoreFrames():
            block, after, video = continue_video(seen, layout, at, options)
        case VideoAudio():
            block, after, video = continue_audio(seen, layout, at)
        case Text() | Audio():
            block, after = layout.words(at, seen.tokens, a)
        case _:
            block, after = layout.picture(at, seen, **options)
            video = (at.next, *seen.grid, getattr(seen, "seconds", 1.0), 0)
    pictures = at.pictures + (not isinstance(seen, Unrotated | Text | Audio | MoreFrames))
    return block, Cursor(after, at.tokens + seen.tokens, pictures, at.layout, video)


def continue_video(seen: MoreFrames, layout: Layout, at: Cursor, options: dict[str, Any]):
    """What a longer video would have had at its end, if it had the same at its beginning."""
    if not at.video or at.video[2:5] != (seen.y, seen.x, seen.seconds):
        raise ValueError(f"{seen} must come after a video of the same rows, columns and seconds")
    start, t, y, x, seconds, sound = at.video
    begun = replace(at, next=start, pictures=at.pictures - 1)
    shorter, longer = (Video(int(n), int(y), int(x), seconds) for n in (t, t + seen.t))
    before, _ = layout.picture(begun, shorter, **options)
    block, after = layout.picture(begun, longer, **options)
    if not torch.equal(block[: len(before)], before):
        raise ValueError(
            f"layout {at.layout!r} places a frame by the number of all frames, so {seen} would move those "
            "before it; give the whole video at once, or take a causal layout such as 'rope-tv-causal'"
        )
    return block[len(before) :], max(after, at.next), (start, t + seen.t, y, x, seconds, sound)


def continue_audio(seen: VideoAudio, layout: Layout, at: Cursor):
    """Tokens of 40 ms along the video's own clock, from where its sound stopped."""
    if not at.video:
        raise ValueError(f"{seen} must come after the video that it goes with; write audio for sound alone")
    if layout.clock is None:
        timed = [name for name, other in LAYOUTS.items() if other.clock]
        raise ValueError(f"layout {at.layout!r} has no clock for {seen} to keep time with; take {timed}")
    start, *shape, sound = at.video
    step = layout.clock / 25
    block, _ = diagonal(replace(at, next=0.0), seen.tokens, len(layout.axes))
    block = start + step * (sound + block)
    after = max(at.next, math.floor(block.max().item()) + 1)
    return block, after, (start, *shape, sound + seen.tokens)


def read_options(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from the layout's own.

    Raises:
        ValueError: an option that the layout does not take.
    """
    parameters = inspect.signature(LAYOUTS[layout].picture).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty}
    if unknown := set(options) - set(known):
        raise ValueError(f"layout {layout!r} takes {list(known) or 'no options'}, not {sorted(unknown)}")
    return {name: value for name, value in options.items() if value != known[name]}


def layout_id(layout: str, options: dict[str, Any]) -> str:
    """A layout and its options in one word, such as rope-tv-causal(rate=0.5)."""
    inner = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{layout}({inner})" if inner else layout


@dataclass(frozen=True)
class PlacedBatch:
    """Stories side by side: positions (b, s, a), which tokens are there (b, s), and a cursor for each row."""

    positions: Tensor
    mask: Tensor
    cursors: tuple[Cursor, ...]


def place_rows(
    stories: Sequence[str | Sequence[Segment]],
    layout: str = "rope-tv",
    cursors: Sequence[Cursor] | None = None,
    padding_side: str = "right",
    **options: Any,
) -> PlacedBatch:
    """Positions of a batch of stories, each counted for itself and padded with zeros to the longest.

    Raises:
        ValueError: as `place`, and where there are not as many cursors as stories or no such side.
    """
    if isinstance(stories, str):
        raise ValueError(f"a batch is a list of stories, not one text; write [{stories!r}]")
    cursors = cursors or [Cursor()] * len(stories)
    if len(cursors) != len(stories):
        raise ValueError(f"{len(stories)} stories need as many cursors, not {len(cursors)}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    placed = [place(story, layout, at, **options) for story, at in zip(stories, cursors, strict=True)]
    rows, after = zip(*placed, strict=True)
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    positions, mask = (
        pad_sequence(list(x), batch_first=True, padding_side=padding_side) for x in (rows, masks)
    )
    return PlacedBatch(positions, mask, after)


def pack(
    stories: Sequence[str | Sequence[Segment]], layout: str = "rope-tv", **options: Any
) -> tuple[Tensor, Tensor]:
    """Positions (s, a) of stories in one row, each counted from its own start, and their numbers (s,)."""
    rows = [place(story, layout, **options)[0] for story in stories]
    return torch.cat(rows), torch.repeat_interleave(torch.tensor([len(row) for row in rows]))


def augment_positions(
    positions: Tensor,
    shift: float = 0.0,
    jitter: float = 1.0,
    rescale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions (..., s, a) moved and scaled at random, for training at other sizes (DINOv3).

    Every axis is moved by up to `shift` either way, then multiplied by a number between 1 / jitter and
    jitter; then all are multiplied by one between 1 / rescale and rescale. Factors are even in the logarithm.

    Raises:
        ValueError: a negative shift or a factor below 1.
    """
    if shift < 0 or min(jitter, rescale) < 1:
        raise ValueError(f"shift {shift} must be >= 0, jitter {jitter} and rescale {rescale} >= 1")

    def draw(n: int, reach: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * reach

    a = positions.shape[-1]
    move, stretch, scale = draw(a, shift), draw(a, math.log(jitter)), draw(1, math.log(rescale))
    move, factor = (x.to(positions) for x in (move, (stretch + scale).exp()))
    return (positions + move) * factor
