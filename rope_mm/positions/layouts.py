"""Layouts: the rule by which each scheme places a picture, one short function each.

A rule is `(at, seen, **options) -> positions (n, a), next`: `at` is the cursor, whose `next` is where the
next word would have stood, `seen` the picture, and the `next` returned is where the word after it stands.
Words walk along all axes at once, n -> (n, ..., n), unless the layout says otherwise. All is 0-based.
Here are the rules that count words and pictures in one sequence; `towers` has the others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.positions import vision_layouts as towers
from rope_mm.positions.grids import (
    UNIT,
    Cursor,
    centred,
    diagonal,
    grid_positions,
    text_along_axis,
    text_at_origin,
    text_from_one,
)
from rope_mm.registry import Registry
from rope_mm.segments import Segment

TYX, YX = ("t", "y", "x"), ("y", "x")


@dataclass(frozen=True)
class Layout:
    """Axes, the rule that places a picture on them, the rule for words, and where they were published.

    `clock` is how many positions a second has, where sound can go with a video.
    """

    axes: tuple[str, ...]
    picture: Callable[..., tuple[Tensor, float]]
    source: str
    words: Callable[[Cursor, int, int], tuple[Tensor, float]] = diagonal
    clock: float | None = None


def flat(at: Cursor, seen: Segment):
    """Patches are counted as words are, row by row."""
    return diagonal(at, seen.tokens, 1)


def shared_id(at: Cursor, seen: Segment):
    """All patches of an image share one position, each frame has the next."""
    t, _, _ = seen.grid
    return grid_positions(seen.grid, (at.next,), ((1,), (0,), (0,))), at.next + t


def v2pe(at: Cursor, seen: Segment, stride: float = 16.0):
    """A picture of any size takes `stride` positions, its patches even parts of it."""
    step, room = stride / seen.tokens, math.ceil(stride)
    return grid_positions((seen.tokens, 1, 1), (at.next - 1 + step,), ((step,),) * 3), at.next + room


def m_rope(at: Cursor, seen: Segment):
    """The picture hangs from the next word's place; words go on past its longest side, time included."""
    return grid_positions(seen.grid, (at.next,) * 3, UNIT), at.next + max(seen.grid)


def m_rope_hf(at: Cursor, seen: Segment):
    """M-RoPE as transformers 5 computes it: words go on past rows and columns only, inside a long video."""
    return m_rope(at, seen)[0], at.next + max(seen.grid[1:])


def m_rope_time(at: Cursor, seen: Segment, rate: float = 2.0):
    """M-RoPE on the clock: a frame stands at its second times `rate`, rounded down."""
    positions, _ = m_rope(at, seen)
    second = (positions[:, 0] - at.next) * getattr(seen, "seconds", 0.0)
    positions[:, 0] = at.next + (second * rate + 1e-6).floor()  # 69 * (2/15) * 25 is a bit below 230
    return positions, at.next + (positions - at.next).max().item() + 1


def tm_rope(at: Cursor, seen: Segment):
    """M-RoPE on a clock of 25 positions a second, which sound tokens walk along."""
    return m_rope_time(at, seen, rate=25.0)


def spatial_reset(at: Cursor, seen: Segment, step: float = 1.0):
    """Time goes on from the text, rows and columns start at 0."""
    t, y, x = seen.grid
    positions = grid_positions(seen.grid, (at.next, 0, 0), ((step, 0, 0), *UNIT[1:]))
    return positions, at.next + max(step * (t - 1) + 1, y, x)


def videorope(at: Cursor, seen: Segment, step: float = 2.0):
    """Frames `step` apart on the diagonal, each centred there but for rounding; words follow the last."""
    t, y, x = seen.grid
    origin = (at.next, at.next - (y - 1) // 2, at.next - (x - 1) // 2)
    return grid_positions(seen.grid, origin, ((step,) * 3, *UNIT[1:])), at.next + step * (t - 1) + 1


def hope(at: Cursor, seen: Segment, step: float = 1.0):
    """VideoRoPE with a step that training draws for each video, from 0.5 to 1.5."""
    return videorope(at, seen, step)


def vrope(at: Cursor, seen: Segment):
    """Rows and columns counted from either side, y + x, y - x, x - y, -y - x, and frames side by side."""
    t, y, x = seen.grid
    room = y + x - 1
    origin = [at.next + shift for shift in (0, x - 1, y - 1, y + x - 2)]
    return grid_positions(
        seen.grid, origin, ((room,) * 4, (1, 1, -1, -1), (1, -1, 1, -1))
    ), at.next + t * room


def circle(at: Cursor, seen: Segment, radius: float = 10.0, alpha: float = 0.5):
    """Patches on a circle around the text's diagonal, at right angles to it; frames step along the diagonal.

    An angle is in `alpha` parts the patch's own around the middle, stretched to a full turn, else its number.
    """
    t, y, x = seen.grid
    rows, columns = grid_positions((1, y, x), (0, (1 - y) / 2, (1 - x) / 2), UNIT)[:, 1:].unbind(-1)
    own = torch.atan2(rows, columns)
    own = (own - own.min()) / (own.max() - own.min()).clamp(min=1e-12) * math.tau
    angle = alpha * own + (1 - alpha) * torch.arange(y * x) / (y * x) * math.tau
    # an orthonormal basis of the plane x + y + t = 0, in the order t, y, x
    across = torch.tensor([[0.0, 1.0, -1.0], [2.0, -1.0, -1.0]], dtype=torch.float64)
    across = torch.nn.functional.normalize(across, dim=1)
    ring = radius * torch.stack((angle.cos(), angle.sin()), -1) @ across
    positions = at.next + (ring + torch.arange(t)[:, None, None]).flatten(0, 1)
    return positions, positions.max().item() + 1


def rope_tie(at: Cursor, seen: Segment):
    """Steps of x+1 down and y+1 across end every picture on the diagonal; a video is pictures in a row."""
    t, y, x = seen.grid
    room = (x + 1) * (y + 1) - 1
    steps = ((room, room), (x + 1, 0), (0, y + 1))
    return grid_positions(seen.grid, (at.next + x, at.next + y), steps), at.next + t * room


def rope_tie_fractional(at: Cursor, seen: Segment):
    """RoPE-Tie squeezed until a patch counts as a word: steps of (yx+1)/(y+1) down, (yx+1)/(x+1) across."""
    t, y, x = seen.grid
    room, down, right = y * x, (y * x + 1) / (y + 1), (y * x + 1) / (x + 1)
    steps = ((room, room), (down, 0), (0, right))
    return grid_positions(seen.grid, (at.next - 1 + down, at.next - 1 + right), steps), at.next + t * room


def rope_tv(at: Cursor, seen: Segment):
    """A unit grid in the middle of the room that its tokens would take as words."""
    return grid_positions(seen.grid, centred(at.next, seen.tokens, seen.grid), UNIT), at.next + seen.tokens


def rope_tv_2d(at: Cursor, seen: Segment):
    """RoPE-TV on rows and columns; a video is pictures in a row."""
    t, y, x = seen.grid
    room = y * x
    steps = ((room, room), (1, 0), (0, 1))
    return grid_positions(seen.grid, centred(at.next, room, (y, x)), steps), at.next + t * room


def hunyuan_image(at: Cursor, seen: Segment):
    """RoPE-TV on rows and columns, cut to whole numbers, so that odd by even pictures lie askew."""
    positions, after = rope_tv_2d(at, seen)
    return positions.trunc(), after


def causal(at: Cursor, seen: Segment, rate: float = 1.0, drift: float | None = None):
    """A frame takes the room of `rate` words a patch, the next one stands `drift` further on all axes.

    Without `drift` a frame drifts by its own room: then a video of unknown length counts as its tokens do and
    lies symmetric between its words, and no other drift achieves that.
    """
    t, y, x = seen.grid
    room = rate * y * x
    drift = room if drift is None else drift
    steps = ((drift,) * 3, *UNIT[1:])
    return grid_positions(seen.grid, centred(at.next, room, (1, y, x)), steps), at.next + room + drift * (
        t - 1
    )


LAYOUTS = Registry(
    "layout",
    {
        "flat": Layout(("t",), flat, "RoFormer, arXiv 2104.09864, over raster tokens: Emu3, Chameleon"),
        "shared-id": Layout(("t",), shared_id, "BAGEL, arXiv 2505.14683; Transfusion, arXiv 2408.11039"),
        "v2pe": Layout(("t",), v2pe, "V2PE, arXiv 2412.09616"),
        "grid": Layout(TYX, towers.grid, "axial rotary of vision towers, kexue.fm 8397"),
        "stretched": Layout(
            TYX, towers.fixed_extent, "EVA-02's and CogVideoX's fixed extents", words=text_at_origin
        ),
        "centres": Layout(TYX, towers.normalized_centers, "DINOv3, arXiv 2508.10104"),
        "corners": Layout(
            TYX, towers.normalized_corners, "rotary-embedding-torch and timm, freqs_for='pixel'"
        ),
        "mochi": Layout(TYX, towers.mochi, "genmo mochi, joint_model/rope_mixed.py", words=text_at_origin),
        "ltx": Layout(TYX, towers.ltx, "LTX-Video, arXiv 2501.00103"),
        "m-rope": Layout(TYX, m_rope, "Qwen2-VL, arXiv 2409.12191, as released"),
        "m-rope-hf": Layout(TYX, m_rope_hf, "transformers 5, Qwen2VLModel.get_rope_index"),
        "m-rope-time": Layout(TYX, m_rope_time, "Qwen2.5-VL, arXiv 2502.13923"),
        "tm-rope": Layout(TYX, tm_rope, "Qwen2.5-Omni, arXiv 2503.20215", clock=25.0),
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
        "hunyuan-image": Layout(YX, hunyuan_image, "HunyuanImage-3.0, build_2d_rope"),
        "flux": Layout(
            TYX, towers.flux, "FLUX.1; HunyuanVideo, Wan and Cosmos in a row", words=text_at_origin
        ),
        "flux2": Layout(
            (*TYX, "l"), towers.flux2, "FLUX.2, Flux2Pipeline._prepare_image_ids", words=text_along_axis(3)
        ),
        "msrope": Layout(TYX, towers.msrope, "Qwen-Image, arXiv 2508.02324"),
        "lumina": Layout(TYX, towers.lumina, "Lumina-Image 2.0, arXiv 2503.21758", words=text_along_axis(0)),
        "z-image": Layout(TYX, towers.z_image, "Z-Image, arXiv 2511.22699", words=text_from_one),
    },
)
