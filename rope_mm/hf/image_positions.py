"""Positions of the patches of an image, for models that give their rotary module the image itself."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Segment, Text, Unrotated, Video

PIXELS = "pixels"  # the call format of a module that takes the image


def image_size(config: Any, down: int, across: int) -> tuple[int, int]:
    """Rows and columns of pixels of an image of `down` x `across` patches."""
    patch = config.patch_size
    y, x = patch if isinstance(patch, Iterable) else (patch, patch)
    return down * y, across * x


def patch_grid(config: Any, pixels: Tensor) -> tuple[int, int]:
    """Patches down and across an image (..., rows, columns)."""
    y, x = image_size(config, 1, 1)
    return pixels.shape[-2] // y, pixels.shape[-1] // x


@torch.compiler.assume_constant_result
def positions_as_lists(scheme: Scheme, tokens: int, grid: tuple[int, ...] | None) -> list[list[float]]:
    """Positions (s, a) of text, or of an image or a video behind tokens that are not rotated."""
    still = tokens - math.prod(grid) if grid else 0
    seen: Segment = (Video(*grid) if len(grid) == 3 else Image(*grid)) if grid else Text(tokens)
    return scheme.place([Unrotated(still), seen] if still else [seen])[0].tolist()


def place_tokens(scheme: Scheme, tokens: int, grid: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """`positions_as_lists` as a tensor of the widest floats that a device has."""
    return torch.tensor(positions_as_lists(scheme, tokens, grid), dtype=widest_float(device), device=device)


def augmentations(config: Any) -> dict[str, float | None]:
    """How far a config lets training move patches, None where it does not."""
    return {name: getattr(config, f"pos_embed_{name}", None) for name in ("shift", "jitter", "rescale")}


def centres_in_radians(config: Any, pixels: Tensor, training: bool) -> Tensor:
    """2 pi times the centres (s, 2) of patches in an image from -1 to 1, rounded and moved as DINOv3 does."""
    p = dinov3.get_patches_center_coordinates(*patch_grid(config, pixels), torch.float32, pixels.device)
    return math.tau * (
        dinov3.augment_patches_center_coordinates(p, **augmentations(config)) if training else p
    )


def place_patches(scheme: Scheme, config: Any, pixels: Tensor, training: bool) -> Tensor:
    """Positions (s, a) of an image's patches by a scheme's layout, which training does not move.

    Raises:
        ValueError: a config by which training moves patches.
    """
    moved = [f"pos_embed_{name}={by}" for name, by in augmentations(config).items() if by is not None]
    if training and moved:
        raise ValueError(
            f"training would move patches ({', '.join(moved)}), but {scheme} has fixed positions for them; "
            "set these fields of the config to None, or keep the model's own rope, which moves them"
        )
    down, across = grid = patch_grid(config, pixels)
    return place_tokens(scheme, down * across, grid, pixels.device)
