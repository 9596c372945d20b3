"""The rotary module of timm's EVA and RoPE-ViT, `RotaryEmbeddingCat`: one table [sin | cos] of an image."""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from rope_mm.hf.other_libraries.diffusers_families import Family, Tables
from rope_mm.hf.other_libraries.diffusers_positions import place, segment
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES, XY, YX


def scheme_of_cat(module: Any, _config: Any) -> Scheme:
    """Our scheme of a module's grid and frequencies.

    Raises:
        ValueError: coordinates that no scheme here has.
    """
    kind = module.grid_type, module.in_pixels, module.ref_feat_shape is not None
    more = {
        "axis_order": XY if module.grid_indexing == "xy" else YX,
        "pairing": "half" if module.rotate_half else "interleaved",
    }
    if kind == ("index", False, False):
        options = (("first", float(module.grid_offset)),) if module.grid_offset else ()
        return SCHEMES["rope-vit-axial"].replace(theta=float(module.temperature), options=options, **more)
    if kind == ("index", False, True) and not module.grid_offset:
        extent = tuple(zip("yx", map(float, module.ref_feat_shape), strict=True))
        return SCHEMES["eva-02"].replace(theta=float(module.temperature), options=extent, **more)
    if kind == ("pixel", True, False):
        name = "pixel-linear" if module.linear_bands else "pixel-log"
        return SCHEMES[name].replace(freq_range=(1.0, module.max_res / 2), freq_scale=math.pi, **more)
    raise ValueError(
        f"{type(module).__name__} counts coordinates {module.grid_type!r} from {module.grid_offset} on, for "
        f"the extent {module.ref_feat_shape}, as no scheme here does; it is not served"
    )


def positions_of_cat(
    module: Any, scheme: Scheme, own: bool, shape: Any = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Rows and columns of an image's patches: the module's own, or by a layout.

    Raises:
        ValueError: training, where the module moves its coordinates.
    """
    if module.training and module.aug_active:
        raise ValueError(
            f"training would move the coordinates of {type(module).__name__} (shift, jitter or rescale), but "
            "a scheme has fixed positions; set its aug_active to False"
        )
    y, x = module.feat_shape if shape is None or module.feat_shape is not None else shape
    if not own:
        return place(scheme, segment(1, int(y), int(x)), module.bands.device)
    at = (
        sys.modules[type(module).__module__]
        ._build_grid(
            [y, x],
            grid_type=module.grid_type,
            ref_feat_shape=module.ref_feat_shape,
            grid_offset=module.grid_offset,
            grid_indexing=module.grid_indexing,
            device=module.bands.device,
        )
        .flatten(0, 1)
    )
    at = at.flip(-1) if module.grid_indexing == "xy" else at
    return torch.cat((torch.zeros_like(at[:, :1]), at), -1)[:, -len(scheme.axes) :]


def sin_then_cos(tables: Tables, _module: Any, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Sine and cosine side by side (s, 2d)."""
    return torch.cat((tables[1], tables[0]), -1).to(dtype or tables[0].dtype)


def examples_of_cat(module: Any) -> list[tuple]:
    """Images of two sizes, or of the one for which a module keeps its table."""
    return [()] if module.feat_shape is not None else [((17, 13),), ((3, 64),)]


# file and name of the class that makes a model's tables, below timm.layers
TIMM_FAMILIES: dict[str, Family] = {
    "pos_embed_sincos.RotaryEmbeddingCat": Family(
        scheme=scheme_of_cat,
        positions=positions_of_cat,
        examples=examples_of_cat,
        table_format=lambda module: "half" if module.rotate_half else "interleaved",
        pack=sin_then_cos,
        leaf="get_embed",
        columns=4,
    )
}
