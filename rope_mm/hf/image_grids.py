"""The grids of the images and videos that a model's processor laid out as tokens."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.checks.arguments import parameters_of
from rope_mm.segments import Image, Segment, Video

IMAGES, VIDEOS = 1, 2  # kinds of tokens, as processors number them
TOKEN_IDS = {  # the fields of a config with the token of each kind
    IMAGES: ("image_token_id", "image_token_index"),
    VIDEOS: ("video_token_id", "video_token_index"),
}
PACES = ("second_per_grid_ts", "second_per_grids", "video_second_per_grid")  # one argument, by family
SIZES = ("image_grid_thw", "video_grid_thw", "image_sizes", *PACES)  # arguments that say sizes of images
SHRINK = {"scale_factor": 1.0, "spatial_merge_size": 1.0, "downsample_ratio": -1.0}  # and its exponent


def takes_images(module: nn.Module) -> bool:
    """Whether a module's forward takes an image or a video beside text."""
    names = parameters_of(type(module))
    return "input_ids" in names and any(re.match("pixel_values|(image|video)_grid", name) for name in names)


def token_kinds(config: Any, input_ids: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The kind of each token (b, s): 0 text, 1 image, 2 video; None where nothing says it."""
    if given is not None:
        return given.long() * (given < 3)  # audio stands as text does
    if input_ids is None:
        return None
    kinds = torch.zeros_like(input_ids)
    for kind, names in TOKEN_IDS.items():
        for number in {getattr(config, name, None) for name in names} - {None}:
            kinds[input_ids == number] = kind
    return kinds


def read_grids(config: Any, inputs: Mapping[str, Any], kinds: Tensor) -> dict[int, list[Segment]]:
    """Images and videos in their order, in merged patches.

    Args:
        config: the model's config.
        inputs: image_grid_thw and video_grid_thw (n, 3), image_sizes (n, 2) of Pixtral's tower, and the
            seconds of a video's grid, where there are.
        kinds: (b, s), the kinds of the tokens to place.

    Raises:
        ValueError: image tokens without grids, where the config's size of images does not explain them.
    """
    vision = getattr(config, "vision_config", None)
    side, frames = (getattr(vision, f"{axis}_merge_size", 1) or 1 for axis in ("spatial", "temporal"))
    grids = [inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")]
    images, videos = ([] if x is None else torch.as_tensor(x).cpu().tolist() for x in grids)
    images = [(t, y // side, x // side) for t, y, x in images]
    videos = [(max(t // frames, 1), y // side, x // side) for t, y, x in videos]
    if not images and (kinds == IMAGES).any():
        images = sized_images(config, inputs.get("image_sizes"), kinds) or square_images(config, kinds)
    paces = next((inputs[name] for name in PACES if inputs.get(name) is not None), None)
    paces = [1.0] * len(videos) if paces is None else [float(pace) for pace in paces]
    if len(paces) != len(videos):
        raise ValueError(f"{len(videos)} videos need a pace each, but {len(paces)} came")
    return {
        IMAGES: [Video(t, y, x) if t > 1 else Image(y, x) for t, y, x in images],
        VIDEOS: [Video(t, y, x, pace) for (t, y, x), pace in zip(videos, paces, strict=True)],
    }


def sized_images(config: Any, sizes: Any, kinds: Tensor) -> list[tuple[int, int, int]]:
    """Grids of images from their sizes in pixels (n, 2), of Pixtral's tower (Mistral 3); [] for others."""
    side = pixels_of_token(config)
    if sizes is None or not side:
        return []
    return [(1, int(y) // side, int(x) // side) for y, x in torch.as_tensor(sizes).tolist()]


def pixels_of_token(config: Any) -> int:
    """Pixels along the side of one token of Pixtral's tower; 0 for other towers."""
    vision: Any = getattr(config, "vision_config", None)
    pixtral = getattr(vision, "model_type", None) == "pixtral"
    return vision.patch_size * getattr(config, "spatial_merge_size", 1) if pixtral else 0


def close_rows(
    config: Any, inputs: Mapping[str, Any], kinds: Tensor, cached: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Tokens behind the rows of an image as one more column of it: [IMG_BREAK] and [IMG_END] of Mistral 3.

    Args:
        config: the model's config.
        inputs: image_sizes (n, 2), and others, which stay.
        kinds: (b, s), the kinds of the tokens to place.
        cached: whether the first images may be in a cache, and not among these tokens.

    Returns:
        The kinds and inputs of images that are a column wider; the same where no token is between rows.
    """
    sizes, side = inputs.get("image_sizes"), pixels_of_token(config)
    if sizes is None or not side:
        return kinds, dict(inputs)
    images, rows = sized_images(config, sizes, kinds), kinds.tolist()
    if cached:
        images = newest(images, int((kinds == IMAGES).sum()), math.prod)
    wider = []
    for row in rows:
        start = 0
        while IMAGES in row[start:] and len(wider) < len(images):
            start = row.index(IMAGES, start)
            _, y, x = images[len(wider)]
            lines = [row[at : at + x + 1] for at in range(start, start + y * (x + 1), x + 1)]
            broken = y > 1 and all(line == [IMAGES] * x + [0] for line in lines)
            for n in range(y if broken else 0):
                row[start + n * (x + 1) + x] = IMAGES
            start += y * (x + broken)
            wider.append((y * side, (x + broken) * side))
    wider += [(y * side, x * side) for _, y, x in images[len(wider) :]]
    closed = torch.tensor(rows, dtype=kinds.dtype, device=kinds.device)
    return closed, {**inputs, "image_sizes": torch.tensor(wider).view(-1, 2)}


def newest(images: list[Any], tokens: int, size: Callable[[Any], int]) -> list[Any]:
    """The last images, which fill at most this number of tokens; earlier ones are in the cache.

    Args:
        images: in their order.
        tokens: how many there are for images.
        size: how many tokens an image takes.
    """
    while images and sum(map(size, images)) > tokens:
        images = images[1:]
    return images


def square_images(config: Any, kinds: Tensor) -> list[tuple[int, int, int]]:
    """Grids of the runs of image tokens in kinds (b, s), each of whole images of the config's one size.

    Raises:
        ValueError: a run that is not such images.
    """
    side, images = square_side(config), 0
    for row in kinds.tolist():
        for kind, run in groupby(row):
            tokens = len(list(run)) if kind == IMAGES else 0
            if not side or tokens % side**2:
                size = f"images of {side} x {side} tokens" if side else "an image of a size that is known"
                raise ValueError(
                    f"{tokens or 'some'} image tokens stand in a row without a grid and are not {size}; give"
                    " position_ids, as positions_for(model, [[Text(3), Image(2, 3), Text(4)]]) makes them"
                )
            images += tokens // side**2
    return [(1, side, side)] * images


def square_side(config: Any) -> int:
    """Tokens along a side of an image, where the config gives all images one size; else 0."""
    vision = getattr(config, "vision_config", None)
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return math.isqrt(tokens) if math.isqrt(tokens) ** 2 == tokens else 0
    sizes: list[Any] = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    sizes = [set(x) if isinstance(x, Iterable) else {x} for x in sizes]
    if any(len(x) != 1 or None in x for x in sizes):
        return 0
    side = sizes[0].pop() / sizes[1].pop()
    for name, power in SHRINK.items():
        side /= (getattr(config, name, None) or 1) ** power
    return int(side) if side == int(side) else 0
