"""Where the patches of an image stand, for models that hand over the image itself."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from rope_mm.scheme import Scheme
from rope_mm.segments import Image, Still, Text

PIXELS = "pixels"  # the call of a module that is told the image
AUGMENTED = "shift", "jitter", "rescale"
ASKED = (9, 9), (2, 5)  # patches of images to ask with: one in the middle, and no step is half a turn


def patch_of(config: Any) -> tuple[int, int]:
    """Rows and columns of pixels of a patch."""
    patch = config.patch_size
    return tuple(patch) if isinstance(patch, Iterable) else (patch, patch)


def grid_of(config: Any, pixels: Tensor) -> tuple[int, int]:
    """Patches down and across an image (..., rows, columns)."""
    down, across = patch_of(config)
    return pixels.shape[-2] // down, pixels.shape[-1] // across


@torch.compiler.assume_constant_result
def numbers_of(scheme: Scheme, tokens: int, grid: tuple[int, int] | None) -> list[list[float]]:
    """Positions (s, a): of words, or of an image behind tokens that are not rotated."""
    still = tokens - grid[0] * grid[1] if grid else 0
    seen = Image(*grid) if grid else Text(tokens)
    return scheme.place([Still(still), seen] if still else [seen])[0].tolist()


def place_tokens(scheme: Scheme, tokens: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
    """`numbers_of` as a tensor of the widest floats that a device has."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(numbers_of(scheme, tokens, grid), dtype=wide, device=device)


def augmentations(config: Any) -> dict[str, float | None]:
    """By how much a config lets training move patches, None where it does not."""
    return {name: getattr(config, f"pos_embed_{name}", None) for name in AUGMENTED}


def centres_in_radians(config: Any, pixels: Tensor, training: bool) -> Tensor:
    """2 pi times the centres (s, 2) of patches in an image from -1 to 1, rounded and moved as DINOv3 does."""
    p = dinov3.get_patches_center_coordinates(*grid_of(config, pixels), torch.float32, pixels.device)
    if training:
        p = dinov3.augment_patches_center_coordinates(p, **augmentations(config))
    return math.tau * p


def place_patches(scheme: Scheme, config: Any, pixels: Tensor, training: bool) -> Tensor:
    """Positions (s, a) of an image's patches by a scheme's layout, which nothing moves.

    Raises:
        ValueError: a config by which training moves patches.
    """
    moved = [f"pos_embed_{name}={by}" for name, by in augmentations(config).items() if by is not None]
    if training and moved:
        raise ValueError(
            f"training would move patches ({', '.join(moved)}), but {scheme} has fixed places for them; "
            "set these fields of the config to None, or keep the model's own rope, which moves them"
        )
    down, across = grid = grid_of(config, pixels)
    return place_tokens(scheme, down * across, grid, pixels.device)


def ask_patches(module: Any, *dtypes: torch.dtype) -> list[Any]:
    """2 pi times centres (s, 2), the origin and a step on each axis first, and a module's tables there."""
    (down, across), config, device = patch_of(module.config), module.config, next(module.buffers()).device
    images = [torch.zeros(1, 1, y * down, x * across, device=device) for y, x in ASKED]
    order = [40, 49, 41, *range(sum(y * x for y, x in ASKED))]  # of 9 x 9: the middle, below, to the right
    p = torch.cat([centres_in_radians(config, image, training=False) for image in images])
    told = [[module(image.to(dtype)) for image in images] for dtype in dtypes]
    return [p[order], *(tuple(torch.cat(parts)[order] for parts in zip(*each, strict=True)) for each in told)]
