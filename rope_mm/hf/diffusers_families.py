"""The rotary classes of diffusers that can be served: their schemes, their positions and their tables.

A family is found by the class that makes a model's tables. Everything else is read from the live object:
`table_rotary` calls it on a small example and compares its tables bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES

Function = TypeVar("Function", bound=Callable[..., Any])
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


def outside_graphs(function: Function) -> Function:
    """A function that torch.compile does not record, for it reads numbers out of tensors."""
    return torch.compiler.disable(function)  # pyright: ignore


@lru_cache(maxsize=32)
def place_on_cpu(scheme: Scheme, segments: str) -> Tensor:
    """Positions (s, a) of segments, the same at every step of a sampler."""
    return scheme.place(segments)[0]


@outside_graphs
def place(scheme: Scheme, segments: str, device: torch.device) -> Tensor:
    """Positions (s, a) of segments in the widest floats of a device."""
    return place_on_cpu(scheme, segments).to(device, widest_float(device))


def segment(t: int, y: int, x: int) -> str:
    """The text form of an image, or of a video of t > 1 frames."""
    return f"video:{t}x{y}x{x}" if t > 1 else f"image:{y}x{x}"


def grid(*axes: Tensor) -> Tensor:
    """All combinations (s, a) of the coordinates of the axes, the last axis running fastest."""
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)


def count(sizes: Any, device: torch.device) -> Tensor:
    """A grid (s, a) of whole numbers from 0."""
    return grid(*(torch.arange(size, device=device, dtype=torch.float32) for size in sizes))


# ---- position ids: one row of coordinates for each token


def positions_of_ids(_module: Any, _scheme: Scheme, _own: bool, ids: Tensor) -> Tensor:
    """Ids (s, a) are positions: the pipeline's, or those that `place_ids` put in their place."""
    return ids


def examples_of_ids(module: Any) -> list[tuple]:
    """Ids (s, a) of a module with channels for each of its axes."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 512, (256, len(module.axes_dim)), generator=generator).float(),)]


@outside_graphs
def sizes_of_images(ids: Tensor, axes: tuple[str, ...]) -> list[str]:
    """Images as segments, from ids (s, a): a run of tokens that share all coordinates but y and x is one.

    Raises:
        ValueError: ids whose rows and columns are no grid from 0 in steps of 1.
    """
    y, x = axes.index("y"), axes.index("x")
    others = [axis for axis in range(len(axes)) if axis not in (y, x)]
    _, lengths = torch.unique_consecutive(ids[:, others], dim=0, return_counts=True)
    found = []
    for run in ids[:, [y, x]].float().cpu().split(lengths.tolist()):
        down, across = (int(size) + 1 for size in run.amax(0).tolist())
        if not torch.equal(run, count((down, across), run.device)):
            raise ValueError(
                "these position ids are no images of rows and columns counted from 0 in steps of 1, one run "
                "of tokens each, so only the model's own layout can place them; take a scheme of its layout"
            )
        found.append(segment(1, down, across))
    return found


def place_ids(arguments: Mapping[str, Any], scheme: Scheme, axes: tuple[str, ...]) -> dict[str, Any]:
    """`txt_ids` and `img_ids` by a scheme's layout, the text first, in the shapes that the pipeline gave.

    Raises:
        ValueError: keys of reference images that are kept as they were rotated.
    """
    text, images = (arguments[name] for name in ("txt_ids", "img_ids"))
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            f"with kv_cache_mode={arguments['kv_cache_mode']!r} reference images keep the keys that they "
            f"had, and layout {scheme.layout!r} would place the others elsewhere; leave kv_cache_mode at None"
        )
    n, ids = text.shape[-2], images.reshape(-1, *images.shape[-2:])[0]
    p = place(scheme, " ".join([f"text:{n}", *sizes_of_images(ids, axes)]), images.device)
    return {
        name: part.expand(*given.shape[:-1], -1)
        for name, given, part in (("txt_ids", text, p[:n]), ("img_ids", images, p[n:]))
    }


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


def captioned(scheme: Scheme, words: int, ids: Tensor) -> Tensor:
    """Positions (s, a) of an image with ids (s, 3) behind a caption."""
    (image,) = sizes_of_images(ids, ("t", "y", "x"))
    return place(scheme, f"text:{words} {image}" if words else image, ids.device)[words:]


def positions_of_z_image(_module: Any, scheme: Scheme, own: bool, ids: Tensor) -> Tensor:
    """Ids (s, 3) of captions one after another, or of images; padding, at 0, stays there."""
    return ids if own else place_z_image(scheme, ids)


@outside_graphs
def place_z_image(scheme: Scheme, ids: Tensor) -> Tensor:
    """Positions (s, a) of the captions or images with these ids (s, 3)."""
    t, away = ids[:, 0], (ids[:, 1:] != 0).any(-1)
    before = torch.cat((ids[:1] * 0, ids[:-1]))
    goes_on = (t == before[:, 0] + 1) & ~(before[:, 1:] != 0).any(-1) & (before[:, 0] > 0)
    starts = (~away & ~goes_on).nonzero().flatten().tolist()
    placed = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        item, first = ids[start:end], int(ids[start, 0])
        if first == 0:
            placed.append(torch.zeros(len(item), len(scheme.axes), device=ids.device, dtype=torch.float64))
        elif first == 1 and not item[:, 1:].any():
            placed.append(place(scheme, f"text:{len(item)}", ids.device))
        else:
            placed.append(captioned(scheme, first - 1, item))
    return torch.cat(placed)


def positions_of_lumina2(_module: Any, scheme: Scheme, own: bool, ids: Tensor) -> Tensor:
    """Ids (b, s, 3): in each row a caption counted along t, its image, and padding at 0."""
    return ids if own else place_lumina2(scheme, ids)


@outside_graphs
def place_lumina2(scheme: Scheme, ids: Tensor) -> Tensor:
    """Positions (b, s, a) of rows with these ids (b, s, 3)."""
    rows = ids.new_zeros((*ids.shape[:2], len(scheme.axes)), dtype=torch.float64)
    for row, given in zip(rows, ids, strict=True):
        words = int(given[:, 0].max())
        end = words + int((given[words:, 0] == words).sum()) if words else len(given)
        row[:words] = place(scheme, f"text:{words}", ids.device) if words else row[:0]
        row[words:end] = captioned(scheme, words, given[words:end])
    return rows


def examples_in_reach(lengths: Any, batch: tuple[int, ...] = ()) -> list[tuple]:
    """Ids (..., s, a) below the lengths of a module's tables."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, min(n, 512), (*batch, 256), generator=generator) for n in lengths]
    return [(torch.stack(columns, -1),)]


# ---- latents, whose shape says how many frames, rows and columns there are


def patches(module: Any) -> tuple[int, ...]:
    """Frames, rows and columns of a patch."""
    size = module.patch_size
    return tuple(size) if isinstance(size, tuple | list) else (module.patch_size_t, size, size)


def positions_of_latents(
    module: Any, scheme: Scheme, own: bool, hidden_states: Tensor, fps: float | None = None
) -> Tensor:
    """Latents (b, c, frames, rows, columns), and for Cosmos the frames per second."""
    sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], patches(module), strict=True)]
    if not own:
        return place(scheme, segment(*sizes), hidden_states.device)
    p = count(sizes, hidden_states.device)
    return p if fps is None else torch.cat((p[:, :1] / fps * module.base_fps, p[:, 1:]), -1)


def examples_of_latents(module: Any) -> list[tuple]:
    """Latents that are long in one direction each, as far as a module's tables reach."""
    reach, patch = min(getattr(module, "max_seq_len", 256), 256), patches(module)
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


def images_of_qwen(video_fhw: Any) -> list[tuple[int, int, int]]:
    """Sizes of a sample's images.

    Raises:
        ValueError: samples whose sizes differ; diffusers gives all of them the positions of the first one.
    """
    first = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
    if isinstance(video_fhw, list) and any(sizes != first for sizes in video_fhw):
        raise ValueError(
            f"samples with images of the sizes {video_fhw} would all get the positions of the first one; "
            "give the model one batch for each size"
        )
    return first if isinstance(first, list) else [first]


def positions_of_qwen(
    _module: Any,
    scheme: Scheme,
    own: bool,
    video_fhw: Any,
    device: Any = None,
    max_txt_seq_len: Any = None,
) -> Tensor:
    """Sizes of images, counted from their middle, and text on the diagonal behind them; other layouts begin
    with the text. The images come first in the result."""
    sizes, words = images_of_qwen(video_fhw), int(max_txt_seq_len)
    device = torch.device("cpu") if device is None else torch.device(device)
    if not own:
        p = place(scheme, " ".join([f"text:{words}", *(segment(*size) for size in sizes)]), device)
        return torch.cat((p[words:], p[:words]))
    axes = {"device": device, "dtype": torch.float32}
    images = [
        grid(
            torch.arange(index, index + t, **axes),
            torch.arange(y // 2 - y, y // 2, **axes),
            torch.arange(x // 2 - x, x // 2, **axes),
        )
        for index, (t, y, x) in enumerate(sizes)
    ]
    first = max(max(y // 2, x // 2) for _, y, x in sizes)
    return torch.cat([*images, torch.arange(first, first + words, **axes)[:, None].expand(-1, 3)])


def images_and_text(
    tables: Tensor, _module: Any, video_fhw: Any, device: Any = None, max_txt_seq_len: Any = None
) -> tuple[Tensor, Tensor]:
    """Tables of the images, and of the text."""
    words = int(max_txt_seq_len)
    return tables[: len(tables) - words], tables[len(tables) - words :]


def positions_of_ltx(
    module: Any,
    scheme: Scheme,
    own: bool,
    hidden_states: Tensor,
    num_frames: Any = None,
    height: Any = None,
    width: Any = None,
    rope_interpolation_scale: Any = None,
    video_coords: Any = None,
) -> Tensor:
    """Frames, rows and columns, or coordinates (b, 3, s) in seconds and pixels; its own run from -1 to 1."""
    device = hidden_states.device
    if not own:
        if video_coords is not None:
            raise ValueError(
                f"video_coords are positions of the layout {SCHEMES['ltx'].layout!r}, and {scheme} would not "
                "use them; give num_frames, height and width, or take a scheme of that layout"
            )
        return place(scheme, segment(num_frames, height, width), device)
    if video_coords is None:
        sizes = num_frames, height, width
        at = module._prepare_video_coords(len(hidden_states), *sizes, rope_interpolation_scale, device)
    else:
        base = module.base_num_frames, module.base_height, module.base_width
        at = torch.stack([video_coords[:, axis] / base[axis] for axis in range(3)], -1)
    return at * 2 - 1


def rows_of_ltx(tables: Tables, _module: Any, hidden_states: Tensor, *_args: Any, **_more: Any) -> Tables:
    """Cosine and sine (b, s, heads * d)."""
    return tuple(table.expand(len(hidden_states), -1, -1) for table in tables)


def examples_of_ltx(module: Any) -> list[tuple]:
    """Videos of several sizes, at the scale of a pipeline."""
    scale = (8 / 25, 32, 32)
    return [(torch.zeros(1, 1, 1), t, y, x, scale) for t, y, x in ((64, 1, 1), (1, 64, 1), (1, 2, 64))]


# ---- tables that come from the pipeline


def video_size(config: Any, latents: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens, from latents (b, frames, c, rows, columns)."""
    frames, (down, across), p = latents.shape[1], latents.shape[3:], config.patch_size
    return math.ceil(frames / (config.patch_size_t or 1)), down // p, across // p


def resized(config: Any, down: int, across: int) -> list[tuple[int, int]]:
    """First and last coordinate of rows and of columns of a video resized into the model's sample size."""
    tall, wide = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    by_height = down / across > tall / wide
    size = (tall, round(tall / down * across)) if by_height else (round(wide / across * down), wide)
    starts = [round((whole - part) / 2.0) for whole, part in zip((tall, wide), size, strict=True)]
    return [(start, start + part) for start, part in zip(starts, size, strict=True)]


def positions_of_cogvideox(model: Any, scheme: Scheme, own: bool, hidden_states: Tensor) -> Tensor:
    """CogVideoX 1.0 stretches rows and columns to the size of its samples, 1.5 counts them."""
    sizes, device = video_size(model.config, hidden_states), hidden_states.device
    if not own:
        return place(scheme, segment(*sizes), device)
    if model.config.patch_size_t is not None:
        return count(sizes, device)
    t, *spatial = sizes
    ends = [(0, t), *resized(model.config, *spatial)]
    axes = [
        torch.linspace(first, last * (size - 1) / size, size, device=device, dtype=torch.float32)
        for (first, last), size in zip(ends, sizes, strict=True)
    ]
    return grid(*axes)


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
    "transformer_wan.WanRotaryPosEmbed": WAN,
    "transformer_wan_animate.WanRotaryPosEmbed": WAN,
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
