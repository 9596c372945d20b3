"""The rotary classes of diffusers that can be served: their schemes, their positions and their tables.

A family is found by the class that makes a model's tables. Everything else is read from the live object:
`table_rotary` calls it on a small example and compares its tables bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rope_mm.hf.other_libraries.diffusers_positions import (
    patches,
    place_ids,
    positions_of_cogvideox,
    positions_of_ids,
    positions_of_image,
    positions_of_latents,
    positions_of_ltx,
    positions_of_lumina2,
    positions_of_qwen,
    positions_of_z_image,
    resized,
    video_size,
)
from rope_mm.schemes.extensions import NTK
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES, YX

Tables = Any  # cosine and sine (..., d), or one complex tensor (..., d / 2)


@dataclass(frozen=True)
class Family:
    """A rotary class of diffusers.

    Attributes:
        scheme: our scheme of a module's own Omega, from the module and the model's config.
        positions: positions (..., s, a) of one call, from the module, a scheme, whether its layout is the
            model's own, and the call's arguments.
        examples: arguments of small calls of a module.
        table_format: how angles fill tables, a key of `cos_sin_tables.TABLE_FORMATS`, or what gives it for a
            module.
        pack: tables (..., s, d) in the shape in which the module returns them, from the tables, the module
            and the call's arguments.
        leaf: what is replaced: the module's method of this name; the module itself, which is no nn.Module,
            where it is empty; the model's argument of this name where `tables` makes it.
        tables: what makes the tables where the pipeline does it, from the model and latents.
        arguments: what to change in the model's arguments so that another layout places its tokens: from the
            arguments and the scheme.
        columns: how many columns each pair has in the last dimension of what the module returns.
        wide: whether one table runs over the channels of all heads.
        unrotated_text: whether text is in the same attention and is not rotated.
    """

    scheme: Callable[[Any, Any], Scheme]
    positions: Callable[..., Tensor]
    examples: Callable[[Any], list[tuple]]
    table_format: str | Callable[[Any], str] = "interleaved"
    pack: Callable[..., Any] = lambda tables, _module, *_args, **_more: tables
    leaf: str = "forward"
    tables: Callable[[Any, Tensor], Any] | None = None
    arguments: Callable[[Mapping[str, Any], Scheme], dict[str, Any]] | None = None
    columns: int = 2
    wide: bool = False
    unrotated_text: bool = False


def axial(name: str, channels: Any, theta: float) -> Scheme:
    """The scheme of that name with other channels for each axis, and another theta."""
    channels = [int(count) for count in channels]
    least = math.gcd(*channels)
    shares = tuple(float(count // least) for count in channels)
    return SCHEMES[name].replace(theta=float(theta), axis_shares=None if len(set(shares)) == 1 else shares)


# ---- position ids: one row of coordinates for each token


def examples_of_ids(module: Any) -> list[tuple]:
    """Ids (s, a) of a module with channels for each of its axes."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 512, (256, len(module.axes_dim)), generator=generator).float(),)]


def scheme_of_cosmos(module: Any, config: Any) -> Scheme:
    """Axes that a config scales have NTK's theta."""
    scales = zip("tyx", config.rope_scale, strict=True)
    extensions = tuple(NTK(factor=float(scale), axes=(axis,)) for axis, scale in scales if scale != 1)
    chosen = axial("cosmos", (module.dim_t, module.dim_h, module.dim_w), 10_000.0)
    return chosen.replace(extensions=extensions)


def flux(name: str) -> Family:
    """Ids (s, a) from the pipeline, for text and images in one call or in two."""
    axes = SCHEMES[name].axes
    return Family(
        scheme=lambda module, _config: axial(name, module.axes_dim, module.theta),
        positions=positions_of_ids,
        examples=examples_of_ids,
        arguments=lambda arguments, scheme: place_ids(arguments, scheme, axes),
    )


# ---- ids that the transformer makes, of captions and of the images behind them


def examples_in_reach(lengths: Any, batch: tuple[int, ...] = ()) -> list[tuple]:
    """Ids (..., s, a) below the lengths of a module's tables."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, min(n, 512), (*batch, 256), generator=generator) for n in lengths]
    return [(torch.stack(columns, -1),)]


# ---- latents, whose shape says how many frames, rows and columns there are


def examples_of_latents(module: Any) -> list[tuple]:
    """Latents that are long in one direction each, as far as a module's tables reach."""
    patch = patches(module)
    reach = min(256, getattr(module, "max_seq_len", 256), *getattr(module, "max_size", ()))
    long = [[reach if axis == far else 2 for axis in range(3)] for far in range(3)]
    return [(torch.zeros(1, 1, *(a * b for a, b in zip(sizes, patch, strict=True))),) for sizes in long]


def one_table_of_heads(tables: Tables, _module: Any, *_args: Any) -> Tables:
    """Cosine and sine (1, s, 1, d)."""
    return tuple(table[None, :, None] for table in tables)


def of_latents(name: str, channels: str, **more: Any) -> Family:
    """A family whose module takes latents; `channels` names its channels for each axis."""
    names = channels.split()

    def scheme(module: Any, _config: Any) -> Scheme:
        counts = [getattr(module, name) for name in names] if len(names) > 1 else getattr(module, names[0])
        return axial(name, counts, getattr(module, "theta", SCHEMES[name].theta))

    return Family(scheme=scheme, positions=positions_of_latents, examples=examples_of_latents, **more)


# ---- sizes as numbers


def images_and_text(
    tables: Tensor, _module: Any, video_fhw: Any, device: Any = None, max_txt_seq_len: Any = None
) -> tuple[Tensor, Tensor]:
    """Tables of the images, and of the text."""
    words = int(max_txt_seq_len)
    return tables[: len(tables) - words], tables[len(tables) - words :]


def rows_of_ltx(tables: Tables, _module: Any, hidden_states: Tensor, *_args: Any, **_more: Any) -> Tables:
    """Cosine and sine (b, s, heads * d)."""
    return tuple(table.expand(len(hidden_states), -1, -1) for table in tables)


def examples_of_ltx(module: Any) -> list[tuple]:
    """Videos of several sizes, at the scale of a pipeline."""
    scale = (8 / 25, 32, 32)
    return [(torch.zeros(1, 1, 1), t, y, x, scale) for t, y, x in ((64, 1, 1), (1, 64, 1), (1, 2, 64))]


# ---- tables that come from the pipeline


def scheme_of_cogvideox(_module: Any, config: Any) -> Scheme:
    """By the version: a fixed extent, or a grid."""
    if not config.use_rotary_positional_embeddings:
        raise ValueError(
            "this CogVideoX adds position embeddings to its tokens and rotates nothing; it is not served"
        )
    p = config.patch_size
    extent = {"y": float(config.sample_height // p), "x": float(config.sample_width // p)}
    if config.patch_size_t is None:
        return SCHEMES["cogvideox"].replace(options=tuple(extent.items()))
    return SCHEMES["cogvideox"].replace(layout="grid", options=())


def tables_of_cogvideox(model: Any, hidden_states: Tensor) -> Tables:
    """The tables that CogVideoX's pipelines give a model for these latents."""
    make = import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed
    config, (t, down, across) = model.config, video_size(model.config, hidden_states)
    size: dict[str, Any] = {"grid_type": "slice", "max_size": (down, across), "crops_coords": None}
    if config.patch_size_t is None:
        crops = tuple(zip(*resized(config, down, across), strict=True))
        size = {"crops_coords": crops}
    return make(config.attention_head_dim, grid_size=(down, across), temporal_size=t, **size)


def examples_of_cogvideox(model: Any) -> list[tuple]:
    """Latents of several sizes."""
    p, frames = model.config.patch_size, model.config.patch_size_t or 1
    sizes = (64, 1, 1), (2, 30, 45), (1, 40, 9)
    return [(torch.zeros(1, t * frames, 1, y * p, x * p),) for t, y, x in sizes]


def examples_of_image(module: Any) -> list[tuple]:
    """Latents of images of several sizes."""
    p = module.patch_size
    return [(torch.zeros(1, 1, y * p, x * p),) for y, x in ((64, 1), (1, 64), (5, 7))]


IMAGE = Family(
    scheme=lambda module, _config: SCHEMES["grid"].replace(axis_order=YX, theta=float(module.theta)),
    positions=positions_of_image,
    examples=examples_of_image,
    table_format="half",
    unrotated_text=True,
)
HUNYUAN = of_latents("hunyuan-video", "rope_dim", unrotated_text=True)
WAN = of_latents("wan", "t_dim h_dim w_dim", pack=one_table_of_heads)

# file and name of the class that makes a model's tables, below diffusers.models.transformers
FAMILIES: dict[str, Family] = {
    "transformer_flux.FluxPosEmbed": flux("flux"),
    "transformer_bria.BriaEmbedND": flux("flux"),
    "transformer_bria_fibo.BriaFiboEmbedND": flux("flux"),
    "transformer_longcat_image.LongCatImagePosEmbed": flux("flux"),
    "transformer_ovis_image.OvisImagePosEmbed": flux("flux"),
    "transformer_flux2.Flux2PosEmbed": flux("flux2"),
    "transformer_flux3.Flux3PosEmbed": flux("flux3"),
    "transformer_cogview4.CogView4RotaryPosEmbed": IMAGE,
    "transformer_glm_image.GlmImageRotaryPosEmbed": IMAGE,
    "transformer_krea2.Krea2RotaryPosEmbed": flux("flux"),
    "transformer_cosmos.CosmosRotaryPosEmbed": Family(
        scheme=scheme_of_cosmos,
        positions=positions_of_latents,
        examples=examples_of_latents,
        table_format="half",
    ),
    "transformer_wan.WanRotaryPosEmbed": WAN,
    "transformer_wan_animate.WanRotaryPosEmbed": WAN,
    "transformer_sana_video.WanRotaryPosEmbed": WAN,
    "transformer_skyreels_v2.SkyReelsV2RotaryPosEmbed": WAN,
    "transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed": HUNYUAN,
    "transformer_hunyuan_video15.HunyuanVideo15RotaryPosEmbed": HUNYUAN,
    "transformer_motif_video.MotifVideoRotaryPosEmbed": HUNYUAN,
    "transformer_qwenimage.QwenEmbedRope": Family(
        scheme=lambda module, _config: axial("qwen-image", module.axes_dim, module.theta),
        positions=positions_of_qwen,
        examples=lambda _module: [
            ([[(2, 5, 7)]], None, 256),
            ([[(1, 256, 1), (1, 2, 3)]], None, 2),
            ([[(1, 1, 256)]], None, 1),
        ],
        table_format="complex",
        columns=1,
        pack=images_and_text,
    ),
    "transformer_z_image.RopeEmbedder": Family(
        scheme=lambda module, _config: axial("z-image", module.axes_dims, module.theta),
        positions=positions_of_z_image,
        examples=lambda module: examples_in_reach(module.axes_lens),
        table_format="complex",
        columns=1,
        leaf="",
    ),
    "transformer_lumina2.Lumina2RotaryPosEmbed": Family(
        scheme=lambda module, _config: axial("lumina2", module.axes_dim, module.theta),
        positions=positions_of_lumina2,
        examples=lambda module: examples_in_reach(module.axes_lens, (1,)),
        table_format="complex128",
        columns=1,
        leaf="_get_freqs_cis",
    ),
    "transformer_ltx.LTXVideoRotaryPosEmbed": Family(
        scheme=lambda module, _config: SCHEMES["ltx"].replace(freq_range=(1.0, float(module.theta))),
        positions=positions_of_ltx,
        examples=examples_of_ltx,
        pack=rows_of_ltx,
        wide=True,
    ),
    "cogvideox_transformer_3d.CogVideoXTransformer3DModel": Family(
        scheme=scheme_of_cogvideox,
        positions=positions_of_cogvideox,
        examples=examples_of_cogvideox,
        leaf="image_rotary_emb",
        tables=tables_of_cogvideox,
        unrotated_text=True,
    ),
}
