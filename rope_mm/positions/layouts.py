"""Layouts: the rules by which each scheme places images and text, one short function each.

A rule is `(cursor, segment, **options) -> positions, next`: the cursor's `next` is where the next text token
would stand, the segment is an image or a video, and the `next` returned is where the text token after it
stands. Positions are a Raster or a tensor (n, a). Text is counted on all axes at once, n -> (n, ..., n),
unless the layout says otherwise. All is 0-based. Here are the rules that count text and images in one
sequence; `vision_layouts` and `audio_layouts` have the others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any

import torch
from torch import Tensor

from rope_mm.checks.fields import Names, NotNegative, OneOf, Positive, Real, Reals, check_fields
from rope_mm.positions import audio_layouts as audio
from rope_mm.positions import vision_layouts as vision
from rope_mm.positions.cursor import Cursor
from rope_mm.positions.grids import (
    UNIT,
    Raster,
    TextRule,
    centred,
    diagonal,
    text_along_axes,
    text_at_origin,
    text_on_diagonal,
)
from rope_mm.registry import Registry
from rope_mm.segments import Segment

TYX, YX = ("t", "y", "x"), ("y", "x")
Origin = Annotated[str, OneOf(("corner", "centre"))]


def check_rule(name: str, rule: Any, *arguments: str) -> None:
    """Refuse what cannot be called with these arguments alone.

    Raises:
        ValueError: no function, or one of other arguments.
    """
    try:
        signature(rule).bind(*arguments)
    except TypeError:
        takes = ", ".join(arguments)
        raise ValueError(f"Layout: {name} must be a function of ({takes}), not {rule!r}") from None


@dataclass(frozen=True)
class Layout:
    """How segments become positions.

    Attributes:
        axes: names of the a axes that positions have.
        image_rule: `(cursor, segment, **options) -> (positions, next)` of an image or a video.
        source: where the rule was published.
        text_rule: `(cursor, n, a) -> (positions, next)` of n text tokens.
        positions_per_second: of the time axis, where a video's audio can go with it; else None.
        audio_rule: as `text_rule`, of audio tokens; None places them as text.
    """

    axes: Annotated[tuple[str, ...], Names(alone=False)]
    image_rule: Callable[..., tuple[Raster | Tensor, float]]
    source: str
    text_rule: TextRule = text_on_diagonal
    positions_per_second: Positive | None = None
    audio_rule: TextRule | None = None

    def __post_init__(self):
        check_fields(self)
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"Layout: axes must be a tuple of different names, not {self.axes!r}")
        check_rule("image_rule", self.image_rule, "cursor", "segment")
        check_rule("text_rule", self.text_rule, "cursor", "n", "a")
        if self.audio_rule is not None:
            check_rule("audio_rule", self.audio_rule, "cursor", "n", "a")


def flat(cursor: Cursor, segment: Segment):
    """Patches are counted as text tokens are, row by row."""
    _, y, x = segment.grid
    return Raster(segment.grid, (cursor.next,), ((y * x,), (x,), (1,))), cursor.next + segment.tokens


def shared_id(cursor: Cursor, segment: Segment):
    """All patches of an image share one position, each frame has the next."""
    return Raster(segment.grid, (cursor.next,), ((1,), (0,), (0,))), cursor.next + segment.grid[0]


def v2pe(cursor: Cursor, segment: Segment, stride: Positive = 16.0):
    """An image of any size takes `stride` positions, its patches even parts of it.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        stride: positions that an image takes.
    """
    step = stride / segment.tokens
    return diagonal(cursor.next - 1 + step, segment.tokens, 1, step), cursor.next + math.ceil(stride)


def m_rope(cursor: Cursor, segment: Segment):
    """The first patch stands where the next text token would; text goes on past the longest side, even t."""
    return Raster(segment.grid, (cursor.next,) * 3, UNIT), cursor.next + max(segment.grid)


def m_rope_hf(cursor: Cursor, segment: Segment):
    """M-RoPE as transformers 5 computes it: text goes on past rows and columns only, inside a long video."""
    return m_rope(cursor, segment)[0], cursor.next + max(segment.grid[1:])


def m_rope_time(cursor: Cursor, segment: Segment, rate: Positive = 2.0):
    """M-RoPE in real time: a frame stands at its second times `rate`, rounded down.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        rate: positions of a second.
    """
    raster = Raster(
        segment.grid, (cursor.next,) * 3, UNIT, pace=getattr(segment, "seconds_per_frame", 0.0) * rate
    )
    t, y, x = segment.grid
    last = raster._replace(grid=(1, y, x), first_frame=t - 1).frame_numbers().item()
    return raster, cursor.next + max(last, y - 1, x - 1) + 1


def tm_rope(cursor: Cursor, segment: Segment):
    """M-RoPE in real time with 25 positions a second, which audio tokens are counted by."""
    return m_rope_time(cursor, segment, rate=25.0)


def tarope(cursor: Cursor, segment: Segment):
    """Time alone: a frame's patches stand at its second times 25, as its audio tokens of 40 ms do."""
    step = 25 * getattr(segment, "seconds_per_frame", 0.0)
    raster = Raster(segment.grid, (cursor.next,), ((step,), (0,), (0,)))
    return raster, cursor.next + step * (segment.grid[0] - 1) + 1


def mape(cursor: Cursor, segment: Segment, starts: Annotated[tuple[float, ...], Reals()] = (1000.0, 2000.0)):
    """M-RoPE in real time, with given times of the first images, so that groups of tokens differ.

    In Lance the first image is what the encoder saw, the second its clean latents.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        starts: t of the first frame of each image, in order; further ones stand where M-RoPE puts them.
    """
    raster, after = m_rope_time(cursor, segment)
    start = starts[cursor.images] if cursor.images < len(starts) else cursor.next
    return raster._replace(origin=(start, *raster.origin[1:])), after


def m_rope_2d(cursor: Cursor, segment: Segment):
    """M-RoPE on rows and columns; a video is images in a row."""
    t, y, x = segment.grid
    span = max(y, x)
    return Raster(segment.grid, (cursor.next,) * 2, ((span, span), (1, 0), (0, 1))), cursor.next + t * span


def lumos(cursor: Cursor, segment: Segment, t: Positive = 4.0, y: Positive = 8.0, x: Positive = 8.0):
    """Steps of frames and pixels from the next text token on; text counts patches as tokens.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        t: step between frames.
        y: step between rows.
        x: step between columns.
    """
    raster = Raster(segment.grid, (cursor.next,) * 3, vision.scaled(t, y, x))
    return raster, cursor.next + segment.tokens


def msrope_in_sequence(cursor: Cursor, segment: Segment):
    """Rows and columns centered on 0, t goes on from the text; text goes on past the longest side."""
    _, y, x = segment.grid
    origin = (cursor.next, y // 2 - y, x // 2 - x)
    return Raster(segment.grid, origin, UNIT), cursor.next + max(segment.grid)


def spatial_reset(cursor: Cursor, segment: Segment, step: Positive = 1.0):
    """Time goes on from the text, rows and columns start at 0.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        step: from one frame to the next.
    """
    t, y, x = segment.grid
    raster = Raster(segment.grid, (cursor.next, 0, 0), ((step, 0, 0), *UNIT[1:]))
    return raster, cursor.next + max(step * (t - 1) + 1, y, x)


def videorope(cursor: Cursor, segment: Segment, step: Positive = 2.0):
    """Frames `step` apart on the diagonal, each centered there but for rounding; text follows the last.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        step: from one frame to the next.
    """
    t, y, x = segment.grid
    origin = (cursor.next, cursor.next - (y - 1) // 2, cursor.next - (x - 1) // 2)
    return Raster(segment.grid, origin, ((step,) * 3, *UNIT[1:])), cursor.next + step * (t - 1) + 1


def hope(cursor: Cursor, segment: Segment, step: Positive = 1.0):
    """VideoRoPE with a step that training takes at random for each video, from 0.5 to 1.5.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        step: from one frame to the next.
    """
    return videorope(cursor, segment, step)


def vrope(cursor: Cursor, segment: Segment):
    """Rows and columns counted from either side, y + x, y - x, x - y, -y - x, and frames side by side."""
    t, y, x = segment.grid
    span = y + x - 1
    origin = [cursor.next + shift for shift in (0, x - 1, y - 1, y + x - 2)]
    steps = ((span,) * 4, (1, 1, -1, -1), (1, -1, 1, -1))
    return Raster(segment.grid, origin, steps), cursor.next + t * span


def circle(
    cursor: Cursor,
    segment: Segment,
    radius: Positive = 10.0,
    alpha: Annotated[float, Real(at_least=0, at_most=1)] = 0.5,
):
    """Patches on a circle around the text's diagonal, at right angles to it; frames step along the diagonal.

    An angle is in `alpha` parts the patch's own around the middle, stretched to a full turn, else its number.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        radius: of the circle, in positions.
        alpha: the part of a patch's own angle, 0 to 1.
    """
    t, y, x = segment.grid
    rows, columns = (
        torch.cartesian_prod(torch.arange(y) - (y - 1) / 2, torch.arange(x) - (x - 1) / 2).double().unbind(-1)
    )
    own = torch.atan2(rows, columns)
    own = (own - own.min()) / (own.max() - own.min()).clamp(min=1e-12) * math.tau
    angle = alpha * own + (1 - alpha) * torch.arange(y * x) / (y * x) * math.tau
    # an orthonormal basis of the plane x + y + t = 0, in the order t, y, x
    plane = torch.tensor([[0.0, 1.0, -1.0], [2.0, -1.0, -1.0]], dtype=torch.float64)
    plane = torch.nn.functional.normalize(plane, dim=1)
    ring = radius * torch.stack((angle.cos(), angle.sin()), -1) @ plane
    raster = Raster(segment.grid, (cursor.next,) * 3, ((1,) * 3, (0,) * 3, (0,) * 3), offsets=ring)
    return raster, cursor.next + (t - 1) + ring.max().item() + 1


def rope_tie(cursor: Cursor, segment: Segment):
    """Steps of x+1 between rows and y+1 between columns end an image on the diagonal; frames follow."""
    t, y, x = segment.grid
    span = (x + 1) * (y + 1) - 1
    steps = ((span, span), (x + 1, 0), (0, y + 1))
    return Raster(segment.grid, (cursor.next + x, cursor.next + y), steps), cursor.next + t * span


def rope_tie_fractional(cursor: Cursor, segment: Segment):
    """RoPE-Tie scaled so that a patch counts as a token: steps of (yx+1)/(y+1) and (yx+1)/(x+1)."""
    t, y, x = segment.grid
    span, down, right = y * x, (y * x + 1) / (y + 1), (y * x + 1) / (x + 1)
    origin = (cursor.next - 1 + down, cursor.next - 1 + right)
    return Raster(segment.grid, origin, ((span, span), (down, 0), (0, right))), cursor.next + t * span


def rope_tv(cursor: Cursor, segment: Segment):
    """A unit grid in the middle of the span that its tokens would take as text."""
    origin = centred(cursor.next, segment.tokens, segment.grid)
    return Raster(segment.grid, origin, UNIT), cursor.next + segment.tokens


def rope_tv_2d(cursor: Cursor, segment: Segment):
    """RoPE-TV on rows and columns; a video is images in a row."""
    t, y, x = segment.grid
    span = y * x
    steps = ((span, span), (1, 0), (0, 1))
    return Raster(segment.grid, centred(cursor.next, span, (y, x)), steps), cursor.next + t * span


def hunyuan_image(cursor: Cursor, segment: Segment):
    """RoPE-TV on rows and columns, cut to whole numbers, so that odd by even images are off center by 1/2."""
    raster, after = rope_tv_2d(cursor, segment)
    return raster._replace(origin=tuple(map(math.trunc, raster.origin))), after


def causal(cursor: Cursor, segment: Segment, rate: NotNegative = 1.0, drift: NotNegative | None = None):
    """A frame takes the span of `rate` text tokens a patch, the next one stands `drift` further on all axes.

    Without `drift` a frame drifts by its own span: then a video of unknown length counts as its tokens do and
    lies symmetric between the text before and after it. No other drift does both (`docs/theory.md`).

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        rate: text tokens that a patch counts as.
        drift: from one frame to the next, on every axis; None takes rate * y * x.
    """
    t, y, x = segment.grid
    span = rate * y * x
    drift = span if drift is None else drift
    raster = Raster(segment.grid, centred(cursor.next, span, (1, y, x)), ((drift,) * 3, *UNIT[1:]))
    return raster, cursor.next + span + drift * (t - 1)


def own_raster(segment: Segment, t: float, middle: float, origin: str, steps=UNIT) -> Raster:
    """A unit grid that begins at `t`; its corner or its centre is at `middle` on rows and columns.

    Args:
        segment: the image or video.
        t: of the first frame.
        middle: place of the corner or of the centre on the axes y and x.
        origin: "corner" or "centre", what is at `middle`.
        steps: from a frame, a row and a column to the next.
    """
    sides = segment.grid[1:]
    back = [(side - 1) / 2 if origin == "centre" else 0.0 for side in sides]
    return Raster(segment.grid, (t, *(middle - part for part in back)), steps)


def local(cursor: Cursor, segment: Segment, origin: Origin = "corner"):
    """Rows and columns from the image's own corner, time goes on; an image takes the span of its tokens.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        origin: where rows and columns are 0, the image's "corner" or its "centre".
    """
    return own_raster(segment, cursor.next, 0.0, origin), cursor.next + segment.tokens


def compact(cursor: Cursor, segment: Segment, origin: Origin = "corner"):
    """Rows and columns from the image's own corner, time goes on; a frame takes one step of time.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        origin: where rows and columns are 0, the image's "corner" or its "centre".
    """
    return own_raster(segment, cursor.next, 0.0, origin), cursor.next + segment.grid[0]


def anchored(cursor: Cursor, segment: Segment, origin: Origin = "centre"):
    """A frame takes one step of the diagonal and is centred there, as in VideoRoPE with step 1, unrounded.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        origin: what of a frame stands on the diagonal, its "centre" or its "corner".
    """
    raster = own_raster(segment, cursor.next, cursor.next, origin, ((1, 1, 1), *UNIT[1:]))
    return raster, cursor.next + segment.grid[0]


def compact_scaled(cursor: Cursor, segment: Segment, reach: Positive = 2.0):
    """As `compact`, and rows i and columns j once more, scaled so that every image spans -reach to reach.

    Args:
        cursor: where the sequence stands.
        segment: the image or video.
        reach: i of the lower edge of every image, j of its right edge.
    """
    _, y, x = segment.grid
    origin = (cursor.next, 0, 0, reach * (1 - y) / y, reach * (1 - x) / x)
    steps = ((1, 0, 0, 0, 0), (0, 1, 0, 2 * reach / y, 0), (0, 0, 1, 0, 2 * reach / x))
    return Raster(segment.grid, origin, steps), cursor.next + segment.grid[0]


def dual(cursor: Cursor, segment: Segment):
    """RoPE-TV on t, y and x, and rows i and columns j from the image's own corner."""
    origin = (*centred(cursor.next, segment.tokens, segment.grid), 0, 0)
    steps = ((1, 0, 0, 0, 0), (0, 1, 0, 1, 0), (0, 0, 1, 0, 1))
    return Raster(segment.grid, origin, steps), cursor.next + segment.tokens


LAYOUTS: Registry[Layout] = Registry(
    "layout",
    {
        "flat": Layout(("t",), flat, "RoFormer, arXiv 2104.09864, over raster tokens: Emu3, Chameleon"),
        "shared-id": Layout(("t",), shared_id, "BAGEL, arXiv 2505.14683; Transfusion, arXiv 2408.11039"),
        "v2pe": Layout(("t",), v2pe, "V2PE, arXiv 2412.09616"),
        "grid": Layout(TYX, vision.grid, "axial rotary of vision towers, kexue.fm 8397"),
        "grid-2d": Layout(YX, vision.grid_2d, "axial rotary of vision transformers, kexue.fm 8397"),
        "fixed-extent": Layout(
            TYX, vision.fixed_extent, "EVA-02's and CogVideoX's fixed extents", text_rule=text_at_origin
        ),
        "normalized-centers": Layout(TYX, vision.normalized_centers, "DINOv3, arXiv 2508.10104"),
        "normalized-corners": Layout(
            TYX, vision.normalized_corners, "rotary-embedding-torch and timm, freqs_for='pixel'"
        ),
        "mochi": Layout(
            TYX, vision.mochi, "genmo mochi, joint_model/rope_mixed.py", text_rule=text_at_origin
        ),
        "ltx": Layout(TYX, vision.ltx, "LTX-Video, arXiv 2501.00103"),
        "m-rope": Layout(TYX, m_rope, "Qwen2-VL, arXiv 2409.12191, as released"),
        "m-rope-hf": Layout(TYX, m_rope_hf, "transformers 5, Qwen2VLModel.get_rope_index"),
        "m-rope-time": Layout(TYX, m_rope_time, "Qwen2.5-VL, arXiv 2502.13923"),
        "tm-rope": Layout(TYX, tm_rope, "Qwen2.5-Omni, arXiv 2503.20215", positions_per_second=25.0),
        "tarope": Layout(("t",), tarope, "TaRoPE, arXiv 2603.11095", positions_per_second=25.0),
        "mape": Layout(TYX, mape, "Lance, arXiv 2605.18678, data/common.py::shift_position_ids"),
        "m-rope-2d": Layout(YX, m_rope_2d, "NeoMME, NeoMMEProcessor._image_positions"),
        "lumos": Layout(TYX, lumos, "Lumos-1, arXiv 2507.08801, generate_mm_position_ids"),
        "m-rope-spatial-reset": Layout(TYX, spatial_reset, "MRoPE-I, arXiv 2510.23095; IL-RoPE"),
        "omni": Layout(TYX, spatial_reset, "OmniGen2, arXiv 2506.18871"),
        "videorope": Layout(TYX, videorope, "VideoRoPE, arXiv 2502.05173"),
        "hope": Layout(TYX, hope, "HoPE, arXiv 2505.20444"),
        "vrope": Layout(("p", "q", "r", "s"), vrope, "VRoPE, arXiv 2502.11664"),
        "circle": Layout(TYX, circle, "Circle-RoPE, arXiv 2505.16416"),
        "rope-tie": Layout(YX, rope_tie, "kexue.fm 10040"),
        "rope-tie-fractional": Layout(YX, rope_tie_fractional, "kexue.fm 10040"),
        "rope-tv": Layout(TYX, rope_tv, "kexue.fm 10352"),
        "rope-tv-2d": Layout(YX, rope_tv_2d, "kexue.fm 10352"),
        "rope-tv-causal": Layout(TYX, causal, "kexue.fm 10352, made causal: see `causal`"),
        "local": Layout(TYX, local, "this library", text_rule=text_along_axes(0)),
        "compact": Layout(TYX, compact, "this library", text_rule=text_along_axes(0)),
        "anchored": Layout(TYX, anchored, "this library"),
        "compact-scaled": Layout(
            (*TYX, "i", "j"), compact_scaled, "this library", text_rule=text_along_axes(0)
        ),
        "dual": Layout((*TYX, "i", "j"), dual, "this library", text_rule=text_along_axes(0, 1, 2)),
        "hunyuan-image": Layout(YX, hunyuan_image, "HunyuanImage-3.0, build_2d_rope"),
        "flux": Layout(
            TYX, vision.flux, "FLUX.1; HunyuanVideo, Wan and Cosmos in a row", text_rule=text_at_origin
        ),
        "flux2": Layout(
            (*TYX, "l"),
            vision.flux2,
            "FLUX.2, Flux2Pipeline._prepare_image_ids",
            text_rule=text_along_axes(3),
        ),
        "flux3": Layout(
            (*TYX, "l"), vision.flux3, "FLUX.3, Flux3PrepareLatentsStep", text_rule=text_along_axes(3)
        ),
        "msrope": Layout(TYX, vision.msrope, "Qwen-Image, arXiv 2508.02324"),
        "msrope-layers": Layout(TYX, vision.msrope_layers, "Qwen-Image-Layered, QwenEmbedLayer3DRope"),
        "msrope-in-sequence": Layout(TYX, msrope_in_sequence, "Qwen-Image 2.1, QwenImage21Rope"),
        "frames": Layout(
            TYX, vision.frames, "Helios, HeliosRotaryPosEmbed(frame_indices)", text_rule=text_at_origin
        ),
        "ltx2": Layout(
            TYX,
            vision.ltx2,
            "LTX-2, LTX2AudioVideoRotaryPosEmbed",
            text_rule=text_at_origin,
            audio_rule=audio.ltx2_audio,
        ),
        "music-flamingo": Layout(
            ("w", "i"),
            audio.unrotated,
            "Music Flamingo, MusicFlamingoRotaryEmbedding",
            text_rule=text_at_origin,
            audio_rule=audio.music_flamingo,
        ),
        "lumina": Layout(
            TYX, vision.lumina, "Lumina-Image 2.0, arXiv 2503.21758", text_rule=text_along_axes(0)
        ),
        "z-image": Layout(
            TYX, vision.z_image, "Z-Image, arXiv 2511.22699", text_rule=text_along_axes(0, first=1.0)
        ),
    },
    listing="`sorted(rope_mm.LAYOUTS)`",
)
