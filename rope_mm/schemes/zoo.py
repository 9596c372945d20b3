"""SCHEMES: what the field ships, one entry each."""

import math
from functools import partial
from typing import Any

from rope_mm.registry import Registry
from rope_mm.schemes.extensions import NTK
from rope_mm.schemes.scheme import Scheme

YX, XY = ("y", "x"), ("x", "y")
axial = partial(Scheme, ladder="own", ownership="chunk")  # each axis its own channels and whole ladder

# one axis: every token is counted, or an image shares a position
TEXT = {
    "flat": Scheme(layout="flat"),
    "gpt-j": Scheme(layout="flat", pairing="interleaved", fraction=0.25),
    "gpt-neox": Scheme(layout="flat", fraction=0.25),
    "glm": Scheme(layout="flat", pairing="interleaved", fraction=0.5),
    "deepseek-mla": Scheme(layout="flat", pairing="interleaved", fraction=1 / 3, channel_offset="end"),
    "p-rope": Scheme(layout="flat", theta=1e6, unrotated_fraction=0.75),
    "v2pe": Scheme(layout="v2pe"),
    "shared-id": Scheme(layout="shared-id"),
}

# text and images in one sequence
MULTIMODAL = {
    "m-rope": Scheme(layout="m-rope", ownership="chunk", axis_shares=(2, 3, 3)),
    "m-rope-qwen2-vl": Scheme(layout="m-rope", ownership="chunk", axis_shares=(2, 3, 3), theta=1e6),
    "m-rope-hf": Scheme(layout="m-rope-hf", ownership="chunk", axis_shares=(2, 3, 3), theta=1e6),
    "m-rope-qwen2.5-vl": Scheme(layout="m-rope-time", ownership="chunk", axis_shares=(2, 3, 3), theta=1e6),
    "m-rope-qwen3-vl": Scheme(layout="m-rope", ownership="stride3", axis_shares=(6, 5, 5), theta=5e6),
    "m-rope-qwen3.5": Scheme(
        layout="m-rope", ownership="stride3", axis_shares=(11, 11, 10), theta=1e7, fraction=0.25
    ),
    "m-rope-glm-4.1v": Scheme(
        layout="m-rope", ownership="chunk", axis_shares=(2, 3, 3), pairing="interleaved", fraction=0.5
    ),
    "m-rope-ernie-4.5-vl": Scheme(
        layout="m-rope", ownership="yx-then-t", axis_shares=(10, 11, 11), theta=5e5, pairing="interleaved"
    ),
    "tarope": Scheme(layout="tarope"),
    "tm-rope": Scheme(layout="tm-rope", ownership="chunk", axis_shares=(2, 3, 3), theta=1e6),
    "m-rope-i": Scheme(layout="m-rope-spatial-reset", ownership="stride3", axis_shares=(6, 5, 5)),
    "mh-rope": Scheme(
        layout="m-rope-spatial-reset", ownership="headwise", axis_shares=(2, 3, 3), per_head=True
    ),
    "lance": Scheme(layout="mape", ownership="chunk", axis_shares=(2, 3, 3), theta=1e6),
    "neomme": Scheme(layout="m-rope-2d"),
    "neomme-global": Scheme(layout="m-rope-2d", theta=1e6, fraction=0.25),
    "mm-rope": Scheme(layout="m-rope", ownership="meta233"),
    "mm-rope-lumos-1": Scheme(layout="lumos", ownership="meta466"),
    "videorope": Scheme(layout="videorope", ownership="yx-then-t", axis_shares=(2, 3, 3)),
    "hope": Scheme(layout="hope", ownership="yx-then-t", axis_shares=(2, 3, 3), freq_scale=(0.0, 1.0, 1.0)),
    "vrope": Scheme(layout="vrope"),
    "circle": Scheme(layout="circle", ownership="chunk", axis_shares=(2, 3, 3)),
    "omni": axial(layout="omni", pairing="interleaved"),
    "rope-tie": Scheme(layout="rope-tie"),
    "rope-tie-fractional": Scheme(layout="rope-tie-fractional"),
    "rope-tv": Scheme(layout="rope-tv"),
    "rope-tv-2d": Scheme(layout="rope-tv-2d"),
    "rope-tv-causal": Scheme(layout="rope-tv-causal"),
    "local": axial(layout="local"),
    "compact": axial(layout="compact"),
    "compact-centred": axial(layout="compact", options=(("origin", "centre"),)),
    "compact-scaled": axial(layout="compact-scaled"),
    "anchored": Scheme(layout="anchored"),
    "dual": axial(layout="dual"),
    "hunyuan-image": Scheme(layout="hunyuan-image"),
    "mixed": Scheme(layout="rope-tv", ownership="dense", ladder="own", learnable=True, per_head=True),
}

# images by themselves
VISION = {
    "rope-2d": axial(layout="grid-2d"),
    "grid": axial(layout="grid"),
    "eva-02": axial(layout="fixed-extent", axis_order=YX, pairing="interleaved"),
    "pixel-log": axial(
        layout="normalized-corners",
        axis_order=YX,
        spacing="log",
        freq_range=(1.0, 112.0),
        freq_scale=math.pi,
        pairing="interleaved",
    ),
    "pixel-linear": axial(
        layout="normalized-corners",
        axis_order=YX,
        spacing="linear",
        freq_range=(1.0, 5.0),
        freq_scale=math.pi,
        pairing="interleaved",
    ),
    "rope-vit-axial": axial(layout="grid", axis_order=XY, theta=100.0, pairing="interleaved"),
    "rope-vit-mixed": Scheme(
        layout="grid",
        axis_order=XY,
        ownership="dense",
        ladder="own",
        theta=10.0,
        pairing="interleaved",
        learnable=True,
        per_head=True,
    ),
    "dinov3": axial(layout="normalized-centers", axis_order=YX, theta=100.0, freq_scale=math.tau),
    "sam2": axial(layout="grid", axis_order=XY, pairing="interleaved"),
    "pixtral": Scheme(layout="grid", axis_order=YX, ownership="chunk", ladder="dealt"),
    "qwen2-vl-vision": axial(layout="grid", options=(("merge", 2),), axis_order=YX),
    "moonvit": Scheme(
        layout="grid", axis_order=XY, ownership="round-robin", ladder="own", pairing="interleaved"
    ),
    "kimi-vision": Scheme(layout="grid", axis_order=XY, ownership="round-robin", ladder="own"),
    "llama4-vision": axial(layout="grid", options=(("first", 1.0),), axis_order=XY, pairing="interleaved"),
    "gemma4-vision": axial(layout="grid", axis_order=XY, theta=100.0, pairing="block"),
    "minimax-m3-vision": axial(layout="grid", options=(("merge", 2),), fraction=78 / 80),
    "genlip": Scheme(layout="grid", ownership="stride3", axis_shares=(2, 3, 3)),
    "spiral-rope": Scheme(
        layout="grid", axis_order=YX, ownership="spiral", ladder="own", freq_scale=1.5, pairing="interleaved"
    ),
    "golden-gate": Scheme(
        layout="normalized-corners",
        axis_order=XY,
        ownership="golden",
        spacing="log",
        freq_range=(0.2, 20.0),
        per_head=True,
    ),
    "nd-rope": Scheme(
        layout="grid", axis_order=YX, ownership="simplex", ladder="own", theta=100.0, per_head=True
    ),
}

# diffusion transformers of images and videos
DIFFUSION = {
    "flux": axial(layout="flux", axis_shares=(2, 7, 7), pairing="interleaved"),
    "flux2": axial(layout="flux2", theta=2000.0, pairing="interleaved"),
    "flux3": axial(layout="flux3", pairing="interleaved"),
    "krea2": axial(layout="flux", axis_shares=(2, 3, 3), theta=1000.0, pairing="interleaved"),
    "hunyuan-video": axial(layout="flux", axis_shares=(2, 7, 7), theta=256.0, pairing="interleaved"),
    "wan": axial(layout="flux", axis_shares=(22, 21, 21), pairing="interleaved"),
    "cogvideox": axial(
        layout="fixed-extent",
        options=(("y", 30.0), ("x", 45.0)),
        axis_shares=(2, 3, 3),
        pairing="interleaved",
    ),
    "ltx": Scheme(
        layout="ltx",
        ownership="round-robin",
        ladder="own",
        spacing="log",
        freq_range=(1.0, 10_000.0),
        freq_scale=math.pi / 2,
        pairing="interleaved",
        channel_offset="padded",
        per_head=True,
        ladder_over_heads=True,
    ),
    "ltx2": Scheme(
        layout="ltx2",
        ownership="round-robin",
        ladder="own",
        spacing="log",
        freq_range=(1.0, 10_000.0),
        freq_scale=math.pi / 2,
        channel_offset="padded",
        per_head=True,
        ladder_over_heads=True,
    ),
    "mochi": Scheme(
        layout="mochi", ownership="dense", ladder="own", pairing="interleaved", learnable=True, per_head=True
    ),
    "cosmos": axial(layout="grid", axis_shares=(22, 21, 21), extensions=(NTK(factor=2.0, axes=("t",)),)),
    "allegro": axial(layout="grid", options=(("t", 0.5),), pairing="block"),
    "kandinsky5": axial(
        layout="grid", options=(("y", 0.5), ("x", 0.5)), axis_shares=(2, 3, 3), pairing="interleaved"
    ),
    "helios": axial(layout="frames", axis_shares=(22, 21, 21), pairing="interleaved"),
    "qwen-image": axial(layout="msrope", axis_shares=(2, 7, 7), pairing="interleaved"),
    "qwen-image-layered": axial(layout="msrope-layers", axis_shares=(2, 7, 7), pairing="interleaved"),
    "qwen-image-2.1": axial(layout="msrope-in-sequence", axis_shares=(2, 7, 7), pairing="interleaved"),
    "ideogram4": Scheme(
        layout="grid", options=(("first", 65_536.0),), ownership="stride3", axis_shares=(6, 5, 5), theta=5e6
    ),
    "lumina2": axial(layout="lumina", pairing="interleaved"),
    "z-image": axial(layout="z-image", axis_shares=(2, 3, 3), theta=256.0, pairing="interleaved"),
}

# audio tokens with a time of their own
AUDIO = {
    "ltx2-audio": DIFFUSION["ltx2"].replace(axis_order=("t",)),
    "music-flamingo": axial(layout="music-flamingo", theta=1200.0, pairing="interleaved", fraction=0.4),
}

# other names that people look for
ALIASES = {
    "rope": "flat",
    "rope-1d": "flat",
    "axial": "rope-2d",
    "axial-2d": "rope-2d",
    "vit": "rope-2d",
    "vit-2d": "rope-2d",
    "axial-3d": "grid",
    "rope-3d": "grid",
    "hunyuan-video-1.5": "hunyuan-video",
    "kandinsky6": "kandinsky5",
}

SCHEMES: Registry[Scheme] = Registry(
    "scheme", TEXT | MULTIMODAL | VISION | DIFFUSION | AUDIO, ALIASES, listing="`rope-mm schemes --names`"
)


def read_scheme(scheme: str | Scheme, **changes: Any) -> Scheme:
    """The scheme of that name, with some fields changed.

    Args:
        scheme: a key or an alias of SCHEMES, or a Scheme.
        changes: fields to change; None leaves a field as it is.

    Raises:
        ValueError: an unknown name or field.
    """
    if not isinstance(scheme, str | Scheme):
        raise ValueError(f"a scheme is a name such as 'rope-tv' or a Scheme, not {scheme!r}")
    chosen = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    changes = {field: value for field, value in changes.items() if value is not None}
    return chosen.replace(**changes) if changes else chosen
