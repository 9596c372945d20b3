"""Segments -> positions: where each token stands on the axes of its layout, real numbers, 0-based.

Positions are data, made outside models. A sequence may come in pieces: a cursor goes on where the last piece
stopped, and the pieces get the numbers that the whole sequence would have got.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.checks.fields import COUNTABLE, NotNegative, Real, apply_rule, read_value
from rope_mm.checks.tensors import check_generator, check_real_tensors
from rope_mm.positions.cursor import Cursor, OpenVideo
from rope_mm.positions.grids import Raster, at_origin, fill, is_finite, same_frames
from rope_mm.positions.layouts import LAYOUTS, Layout
from rope_mm.segments import Audio, MoreFrames, Segment, Text, Unrotated, Video, VideoAudio, read_segments

Placed = tuple[Raster | Tensor, float]

MOST_TOKENS = 2**24  # of one call, whose positions on three axes take 400 MB


def place(
    segments: str | Sequence[Segment], layout: str = "rope-tv", cursor: Cursor | None = None, **options: Any
) -> tuple[Tensor, Cursor]:
    """Positions (s, a) float64 of the tokens of segments, and the cursor from which the sequence can go on.

    Args:
        segments: segments, or their text form "text:5 image:2x3".
        layout: a key of LAYOUTS.
        cursor: where an earlier call stopped; the start if None.
        options: the layout's own numbers, such as `rate` and `drift` of "rope-tv-causal".

    Raises:
        ValueError: an unknown layout or option, a cursor of another layout, frames or audio without their
            video, further frames where the layout would have to move those already placed, or a layout whose
            rule gives no position for each token.

    Examples:
        >>> positions, cursor = place("text:2 image:1x2", "rope-tv")
        >>> positions.tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.5, 2.5, 2.0], [2.5, 2.5, 3.0]]
        >>> place("text:1", "rope-tv", cursor)[0].tolist()
        [[4.0, 4.0, 4.0]]
    """
    chosen = LAYOUTS[layout]
    options = read_options(layout, options)
    name = layout_id(layout, options)
    cursor = read_cursor(cursor)
    if cursor.layout not in ("", name):
        raise ValueError(f"this cursor stopped in layout {cursor.layout!r}, so it cannot go on in {name!r}")
    pieces = []
    with on_cpu():
        for segment in check_tokens(read_segments(segments)):
            cursor = cursor if cursor.layout else replace(cursor, layout=name)
            piece, cursor = place_segment(segment, chosen, cursor, options)
            pieces.append(piece)
        return join(pieces, len(chosen.axes)), cursor


def read_cursor(cursor: Any) -> Cursor:
    """A cursor, or the start for None.

    Raises:
        ValueError: what is no cursor.
    """
    if cursor is None or isinstance(cursor, Cursor):
        return cursor or Cursor()
    hint = "; write Cursor(**it)" if isinstance(cursor, Mapping) else ""
    raise ValueError(f"a sequence goes on from the Cursor that `place` returned, not from {cursor!r}{hint}")


def check_tokens(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The segments, if their positions fit memory.

    Raises:
        ValueError: more tokens than `MOST_TOKENS`.
    """
    if (tokens := sum(segment.tokens for segment in segments)) > MOST_TOKENS:
        raise ValueError(
            f"{tokens} tokens are too many for one call; place at most {MOST_TOKENS} at a time and go on "
            "from the cursor"
        )
    return segments


def on_cpu() -> Any:
    """Positions are data: on the CPU also where models are built on the meta device."""
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


def join(pieces: Iterable[Raster | Tensor], a: int) -> Tensor:
    """Positions (s, a) of pieces; rasters in a row are computed at once."""
    blocks = [torch.empty(0, a, dtype=torch.float64)]
    for _, run in groupby(pieces, type):
        run = list(run)
        rasters = [piece for piece in run if isinstance(piece, Raster)]
        blocks += [fill(rasters)] if rasters else [piece for piece in run if isinstance(piece, Tensor)]
    return torch.cat(blocks)


def place_segment(
    segment: Segment, layout: Layout, cursor: Cursor, options: Mapping[str, Any]
) -> tuple[Raster | Tensor, Cursor]:
    """Positions of one segment, and the cursor after it.

    Args:
        segment: of any kind.
        layout: whose rules place it.
        cursor: where the sequence stands.
        options: of the image rule.
    """
    a, video, images = len(layout.axes), None, cursor.images
    match segment:
        case Unrotated():
            block, after, video = at_origin(segment.tokens, a), cursor.next, cursor.video
        case MoreFrames():
            block, after, video = continue_video(segment, layout, cursor, options)
        case VideoAudio():
            block, after, video = continue_audio(segment, layout, cursor)
        case Text() | Audio():
            audio_rule = layout.audio_rule if isinstance(segment, Audio) else None
            rule = audio_rule or layout.text_rule
            block, after = check_answer(rule(cursor, segment.tokens, a), segment, layout)
        case _:
            block, after = place_image(layout, cursor, segment, options)
            seconds = getattr(segment, "seconds_per_frame", 1.0)
            video, images = OpenVideo(cursor.next, *segment.grid, seconds), images + 1
    return block, Cursor(after, cursor.tokens + segment.tokens, images, cursor.layout, video)


def place_image(layout: Layout, cursor: Cursor, segment: Segment, options: Mapping[str, Any]) -> Placed:
    """What a layout's rule answers for an image or a video, checked."""
    return check_answer(layout.image_rule(cursor, segment, **options), segment, layout)


def check_answer(answer: Any, segment: Segment, layout: Layout) -> Placed:
    """What a rule answered, positions in float64.

    Args:
        answer: what it returned.
        segment: what it placed.
        layout: whose rule it is.

    Raises:
        ValueError: what is not a finite position on each axis for each token, and a finite `next`.
    """
    who, a = f"the rule of {layout.source!r}", len(layout.axes)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"{who} must return positions and next, not a {type(answer).__name__}")
    positions, after = answer
    after = apply_rule(who, "next", after, COUNTABLE)
    if isinstance(positions, Raster):
        shape = (positions.tokens, *{len(row) for row in (positions.origin, *positions.steps)})
        finite = shape == (segment.tokens, a) and is_finite(positions)
    else:
        positions = read_positions(who, positions)
        shape, finite = tuple(positions.shape), bool(positions.isfinite().all())
    if shape != (segment.tokens, a):
        raise ValueError(f"{who} must place {segment} at positions {(segment.tokens, a)}, not {shape}")
    if not finite:
        raise ValueError(f"{who} places {segment} at positions that are not finite")
    return positions, after


def read_positions(who: str, positions: Any) -> Tensor:
    """Positions that a rule answered, a tensor, an array or lists, as a tensor in float64 on the CPU.

    Raises:
        ValueError: what holds no real numbers.
    """
    try:
        read = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{who} must return positions as a tensor, not {positions!r}") from None
    if read.is_complex() or read.is_meta:
        raise ValueError(f"{who} must return real positions on the CPU, not {read.dtype} on {read.device}")
    return read.to("cpu", torch.float64)


def continue_video(
    segment: MoreFrames, layout: Layout, cursor: Cursor, options: Mapping[str, Any]
) -> tuple[Raster | Tensor, float, OpenVideo]:
    """What a longer video would have had at its end, if it had the same at its beginning."""
    video = cursor.video
    mine = (segment.y, segment.x, segment.seconds_per_frame)
    if video is None or (video.y, video.x, video.seconds_per_frame) != mine:
        raise ValueError(f"{segment} must come after a video of the same rows, columns and frame rate")
    begin = replace(cursor, next=video.start, images=cursor.images - 1)
    shorter, longer = (Video(t, *mine) for t in (video.t, video.t + segment.t))
    before, _ = place_image(layout, begin, shorter, options)
    whole, after = place_image(layout, begin, longer, options)
    more = later_frames(before, whole, shorter, segment)
    if more is None:
        raise ValueError(
            f"layout {cursor.layout!r} places a frame by the number of all frames, so {segment} would move "
            "those before it; give the whole video at once, or take a causal layout such as 'rope-tv-causal'"
        )
    return more, max(after, cursor.next), replace(video, t=longer.t)


def later_frames(
    before: Raster | Tensor, whole: Raster | Tensor, shorter: Video, more: MoreFrames
) -> Raster | Tensor | None:
    """The frames of the whole video after the shorter one; None where those before them would move.

    Args:
        before: positions of the shorter video.
        whole: positions of the whole video.
        shorter: the frames that stand already.
        more: the frames after them.
    """
    if isinstance(before, Raster) and isinstance(whole, Raster) and before.grid == shorter.grid:
        window = whole._replace(grid=more.grid, first_frame=shorter.t)
        return window if same_frames(before, whole) else None
    before, whole = (fill([x]) if isinstance(x, Raster) else x for x in (before, whole))
    return whole[len(before) :] if torch.equal(whole[: len(before)], before) else None


def continue_audio(segment: VideoAudio, layout: Layout, cursor: Cursor) -> tuple[Raster, float, OpenVideo]:
    """Tokens of 40 ms in the video's own time, from where its audio stopped."""
    video, rate = cursor.video, layout.positions_per_second
    if video is None:
        raise ValueError(
            f"{segment} must come after the video that it goes with; write audio for sound alone"
        )
    if rate is None:
        timed = [name for name, other in LAYOUTS.items() if other.positions_per_second]
        raise ValueError(f"layout {cursor.layout!r} has no time in seconds for {segment}; take {timed}")
    step, a = rate / 25, len(layout.axes)
    block = Raster(
        (segment.tokens, 1, 1), (video.start,) * a, ((step,) * a,) * 3, first_frame=video.audio_tokens
    )
    heard = video.audio_tokens + segment.tokens
    after = max(cursor.next, math.floor(video.start + (heard - 1) * step) + 1)
    return block, after, replace(video, audio_tokens=heard)


def options_of(rule: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a layout's rule takes, beside the cursor and the segment."""
    parameters = inspect.signature(rule).parameters.values()
    return {p.name: p for p in parameters if p.default is not p.empty}


def read_options(layout: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the layout's rule declares them.

    Args:
        layout: a key of LAYOUTS.
        options: name -> value.

    Raises:
        ValueError: an option that the layout does not take, or a value that does not fit.
    """
    rule = LAYOUTS[layout].image_rule
    if not options:
        return {}
    known = options_of(rule)
    if unknown := set(options) - set(known):
        raise ValueError(f"layout {layout!r} takes {list(known) or 'no options'}, not {sorted(unknown)}")
    owner = f"layout {layout!r}"
    return {name: read_value(owner, name, value, known[name].annotation) for name, value in options.items()}


def layout_id(layout: str, options: Mapping[str, Any]) -> str:
    """A layout and its options that are not the default in one word, such as rope-tv-causal(rate=0.5)."""
    if not options:
        return layout
    known = options_of(LAYOUTS[layout].image_rule)
    changed = {name: value for name, value in options.items() if value != known[name].default}
    inner = ", ".join(f"{key}={value}" for key, value in sorted(changed.items()))
    return f"{layout}({inner})" if inner else layout


@dataclass(frozen=True)
class PlacedBatch:
    """A batch of placed sequences, padded to the longest.

    Attributes:
        positions: (b, s, a) float64, 0 where a row is padded.
        mask: (b, s), True where there is a token.
        cursors: where each row stopped.
    """

    positions: Tensor
    mask: Tensor
    cursors: tuple[Cursor, ...]


def place_rows(
    rows: Sequence[str | Sequence[Segment]],
    layout: str = "rope-tv",
    cursors: Sequence[Cursor] | None = None,
    padding_side: str = "right",
    **options: Any,
) -> PlacedBatch:
    """Positions of a batch of sequences, each counted by itself and padded with zeros to the longest.

    Args:
        rows: one sequence of segments, or its text form, for each row.
        layout: a key of LAYOUTS.
        cursors: where each row stopped before; the start if None.
        padding_side: "right" or "left".
        options: the layout's own numbers.

    Raises:
        ValueError: as `place`, and where there is no row, not one cursor for each row, or no such side.
    """
    check_rows(rows)
    cursors = [Cursor()] * len(rows) if cursors is None else cursors
    if not isinstance(cursors, Sequence):
        raise ValueError(f"cursors must be a list, one for each row, not {cursors!r}")
    if len(cursors) != len(rows):
        raise ValueError(f"{len(rows)} rows need as many cursors, not {len(cursors)}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    placed = [place(row, layout, cursor, **options) for row, cursor in zip(rows, cursors, strict=True)]
    blocks, after = zip(*placed, strict=True)
    masks = [torch.ones(len(block), dtype=torch.bool, device="cpu") for block in blocks]
    positions, mask = (
        pad_sequence(list(x), batch_first=True, padding_side=padding_side) for x in (blocks, masks)
    )
    return PlacedBatch(positions, mask, after)


def check_rows(rows: Sequence[Any]) -> None:
    """Refuse what is no list of sequences.

    Raises:
        ValueError: one string, or an empty list.
    """
    if isinstance(rows, str | Segment):
        raise ValueError(f"a batch is a list of sequences, not one; write [{rows!r}]")
    if not isinstance(rows, Sequence):
        raise ValueError(
            f"a batch is a list of sequences such as ['text:5', 'text:2 image:2x3'], not {rows!r}"
        )
    if not len(rows):
        raise ValueError("a batch needs at least one sequence")


def augment_positions(
    positions: Any,
    shift: float = 0.0,
    jitter: float = 1.0,
    rescale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions moved and scaled at random, for training at other sizes (DINOv3, arXiv 2508.10104).

    Every axis is moved by up to `shift` either way, then multiplied by a number between 1 / jitter and
    jitter; then all are multiplied by one number between 1 / rescale and rescale. Factors are uniform in the
    logarithm.

    Args:
        positions: (..., s, a), a tensor, an array or lists; whole numbers become float64.
        shift: the largest move, in positions, >= 0.
        jitter: the largest factor of an axis by itself, >= 1.
        rescale: the largest factor of all axes together, >= 1.
        generator: of the random numbers.

    Raises:
        ValueError: a negative shift or a factor below 1; positions of a narrower type, or not all finite.
    """
    shift = read_value("augment_positions", "shift", shift, NotNegative)
    largest = {"jitter": jitter, "rescale": rescale}
    reach = [
        math.log(apply_rule("augment_positions", name, value, Real(at_least=1)))
        for name, value in largest.items()
    ]
    try:
        positions = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"augment_positions: positions must be a tensor, not {positions!r}") from None
    check_real_tensors(positions=positions)
    check_generator(generator)
    if positions.dtype in (torch.bool, torch.float16, torch.bfloat16) or not positions.dim():
        raise ValueError(
            "augment_positions: positions must be (..., s, a), whole numbers, float32 or float64, "
            f"not {positions.dtype} {tuple(positions.shape)}"
        )
    if positions.device.type != "meta" and not positions.isfinite().all():
        raise ValueError("augment_positions: positions must be finite, and some are NaN or infinite")
    positions = positions if positions.is_floating_point() else positions.double()

    def sample(n: int, most: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * most

    a = positions.shape[-1]
    move, stretch, scale = sample(a, shift), sample(a, reach[0]), sample(1, reach[1])
    move, factor = (x.to(positions) for x in (move, (stretch + scale).exp()))
    return (positions + move) * factor
