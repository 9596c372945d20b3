"""Where the tokens of diffusers' models stand, read from what reaches the class that makes their tables.

Each function takes that module, a scheme, whether the scheme's layout is the model's own, and the arguments
of one call. The model's own positions are made as diffusers makes them; another layout places tokens.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES

Function = TypeVar("Function", bound=Callable[..., Any])


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


def positions_of_ids(_module: Any, _scheme: Scheme, _own: bool, ids: Tensor) -> Tensor:
    """Ids (s, a) are positions: the pipeline's, or those that `place_ids` put in their place."""
    return ids


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
    """Ids of text and images by a scheme's layout, the text first, in the shapes that the pipeline gave.

    Raises:
        ValueError: keys of reference images that are kept as they were rotated.
    """
    if "position_ids" in arguments:  # Krea 2: one row of ids for both
        ids, n = arguments["position_ids"], arguments["encoder_hidden_states"].shape[1]
        images = sizes_of_images(ids[n:], axes)
        return {"position_ids": place(scheme, " ".join([f"text:{n}", *images]), ids.device)}
    text, images = (arguments[name] for name in ("txt_ids", "img_ids"))
    if arguments.get("image_cond_ids") is not None:  # FLUX.3
        raise ValueError(
            f"image_cond_ids are positions of reference images by the model's own layout, not by "
            f"{scheme.layout!r}; give none, or take a scheme of its layout"
        )
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


def positions_of_image(module: Any, scheme: Scheme, own: bool, hidden_states: Tensor) -> Tensor:
    """Latents (b, c, rows, columns); CogView4 stretches them to whole numbers below a fixed size."""
    y, x = (size // module.patch_size for size in hidden_states.shape[2:])
    if not own:
        return place(scheme, segment(1, y, x), hidden_states.device)
    p = count((1, y, x), hidden_states.device)
    if extent := getattr(module, "rope_axes_dim", None):
        p[:, 1:] = torch.floor(p[:, 1:] * p.new_tensor(extent) / p.new_tensor((y, x)))
    return p


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
