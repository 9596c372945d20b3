"""SCHEMES: what the field ships, one entry each."""

import math
from functools import partial
from typing import Any

from rope_mm.registry import Registry
from rope_mm.schemes.extensions import NTK
from rope_mm.schemes.scheme import Scheme

YX, XY = ("y", "x"), ("x", "y")
axial = partial(Scheme, ladder="own", ownership="chunk")  # each axis its own channels and whole ladder

# one sequence of words: how they are rotated there, whatever stands between them
TEXT = {
    "flat": Scheme(layout="flat"),
    "gpt-j": Scheme(layout="flat", pairing="interleaved", fraction=0.25),
    "gpt-neox": Scheme(layout="flat", fraction=0.25),
    "glm": Scheme(layout="flat", pairing="interleaved", fraction=0.5),
    "deepseek-mla": Scheme(layout="flat", pairing="interleaved", fraction=1 / 3, slot="tail"),
    "p-rope": Scheme(layout="flat", theta=1e6, still=0.75),
    "v2pe": Scheme(layout="v2pe"),
    "shared-id": Scheme(layout="shared-id"),
}

# words and pictures in one sequence
MULTIMODAL = {
    "m-rope": Scheme(layout="m-rope", ownership="chunk", shares=(2, 3, 3)),
    "m-rope-qwen2-vl": Scheme(layout="m-rope", ownership="chunk", shares=(2, 3, 3), theta=1e6),
    "m-rope-hf": Scheme(layout="m-rope-hf", ownership="chunk", shares=(2, 3, 3), theta=1e6),
    "m-rope-qwen2.5-vl": Scheme(layout="m-rope-time", ownership="chunk", shares=(2, 3, 3), theta=1e6),
    "m-rope-qwen3-vl": Scheme(layout="m-rope", ownership="stride3", shares=(6, 5, 5), theta=5e6),
    "m-rope-qwen3.5": Scheme(
        layout="m-rope", ownership="stride3", shares=(11, 11, 10), theta=1e7, fraction=0.25
    ),
    "m-rope-glm-4.1v": Scheme(
        layout="m-rope", ownership="chunk", shares=(2, 3, 3), pairing="interleaved", fraction=0.5
    ),
    "m-rope-ernie-4.5-vl": Scheme(
        layout="m-rope", ownership="yx-then-t", shares=(10, 11, 11), theta=5e5, pairing="interleaved"
    ),
    "tm-rope": Scheme(layout="tm-rope", ownership="chunk", shares=(2, 3, 3), theta=1e6),
    "m-rope-i": Scheme(layout="m-rope-spatial-reset", ownership="stride3", shares=(6, 5, 5)),
    "mh-rope": Scheme(layout="m-rope-spatial-reset", ownership="headwise", shares=(2, 3, 3), per_head=True),
    "mm-rope": Scheme(layout="m-rope", ownership="meta233"),
    "videorope": Scheme(layout="videorope", ownership="yx-then-t", shares=(2, 3, 3)),
    "hope": Scheme(layout="hope", ownership="yx-then-t", shares=(2, 3, 3), scale=(0.0, 1.0, 1.0)),
    "vrope": Scheme(layout="vrope"),
    "circle": Scheme(layout="circle", ownership="chunk", shares=(2, 3, 3)),
    "omni": axial(layout="omni", pairing="interleaved"),
    "rope-tie": Scheme(layout="rope-tie"),
    "rope-tie-fractional": Scheme(layout="rope-tie-fractional"),
    "rope-tv": Scheme(layout="rope-tv"),
    "rope-tv-2d": Scheme(layout="rope-tv-2d"),
    "rope-tv-causal": Scheme(layout="rope-tv-causal"),
    "hunyuan-image": Scheme(layout="hunyuan-image"),
    "mixed": Scheme(layout="rope-tv", ownership="dense", ladder="own", learnable=True, per_head=True),
}

# pictures by themselves
VISION = {
    "grid": axial(layout="grid"),
    "eva-02": axial(layout="stretched", order=YX, pairing="interleaved"),
    "pixel-log": axial(
        layout="corners",
        order=YX,
        spacing="log",
        band=(1.0, 112.0),
        scale=math.pi,
        pairing="interleaved",
    ),
    "pixel-linear": axial(
        layout="corners",
        order=YX,
        spacing="linear",
        band=(1.0, 5.0),
        scale=math.pi,
        pairing="interleaved",
    ),
    "rope-vit-axial": axial(layout="grid", order=XY, theta=100.0, pairing="interleaved"),
    "rope-vit-mixed": Scheme(
        layout="grid",
        order=XY,
        ownership="dense",
        ladder="own",
        theta=10.0,
        pairing="interleaved",
        learnable=True,
        per_head=True,
    ),
    "dinov3": axial(layout="centres", order=YX, theta=100.0, scale=math.tau),
    "sam2": axial(layout="grid", order=XY, pairing="interleaved"),
    "pixtral": Scheme(layout="grid", order=YX, ownership="chunk", ladder="dealt"),
    "qwen2-vl-vision": axial(layout="grid", options=(("merge", 2),), order=YX),
    "moonvit": Scheme(layout="grid", order=XY, ownership="round-robin", ladder="own", pairing="interleaved"),
    "kimi-vision": Scheme(layout="grid", order=XY, ownership="round-robin", ladder="own"),
    "llama4-vision": axial(layout="grid", options=(("first", 1.0),), order=XY, pairing="interleaved"),
    "gemma4-vision": axial(layout="grid", order=XY, theta=100.0, pairing="block"),
    "minimax-m3-vision": axial(layout="grid", options=(("merge", 2),), fraction=78 / 80),
    "genlip": Scheme(layout="grid", ownership="stride3", shares=(2, 3, 3)),
    "golden-gate": Scheme(
        layout="corners", order=XY, ownership="golden", spacing="log", band=(0.2, 20.0), per_head=True
    ),
    "nd-rope": Scheme(layout="grid", order=YX, ownership="simplex", ladder="own", theta=100.0, per_head=True),
}

# diffusion transformers for pictures and videos
DIFFUSION = {
    "flux": axial(layout="flux", shares=(2, 7, 7), pairing="interleaved"),
    "flux2": axial(layout="flux2", theta=2000.0, pairing="interleaved"),
    "hunyuan-video": axial(layout="flux", shares=(2, 7, 7), theta=256.0, pairing="interleaved"),
    "wan": axial(layout="flux", shares=(22, 21, 21), pairing="interleaved"),
    "cogvideox": axial(
        layout="stretched", options=(("y", 30.0), ("x", 45.0)), shares=(2, 3, 3), pairing="interleaved"
    ),
    "ltx": Scheme(
        layout="ltx",
        ownership="round-robin",
        ladder="own",
        spacing="log",
        band=(1.0, 10_000.0),
        scale=math.pi / 2,
        pairing="interleaved",
        slot="padded",
        per_head=True,
        across=True,
    ),
    "mochi": Scheme(
        layout="mochi", ownership="dense", ladder="own", pairing="interleaved", learnable=True, per_head=True
    ),
    "cosmos": axial(layout="grid", shares=(22, 21, 21), extensions=(NTK(factor=2.0, axes=("t",)),)),
    "allegro": axial(layout="grid", options=(("t", 0.5),), pairing="block"),
    "qwen-image": axial(layout="msrope", shares=(2, 7, 7), pairing="interleaved"),
    "lumina2": axial(layout="lumina", pairing="interleaved"),
    "z-image": axial(layout="z-image", shares=(2, 3, 3), theta=256.0, pairing="interleaved"),
}

SCHEMES: Registry[Scheme] = Registry("scheme", TEXT | MULTIMODAL | VISION | DIFFUSION)


def read_scheme(scheme: str | Scheme, **changes: Any) -> Scheme:
    """The scheme of that name, with some fields changed; None leaves a field as it is.

    Raises:
        ValueError: an unknown name or field.
    """
    chosen = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return chosen.change(**{field: value for field, value in changes.items() if value is not None})
