"""Augmentations that gradients flow through, applied to real and generated images alike.

DiffAugment, arXiv 2006.10738: a critic that sees few images memorises them, less so if they change, and the
generator does not learn the changes as long as both kinds of images undergo them. Each takes images
(b, ch, y, x), uniform random numbers u (b, 2) in [-1, 1] and a strength in [0, 1].
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rope_mm.registry import Registry


def brightness(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """All entries of an image moved by up to `strength`.

    Args:
        images: (n, ch, y, x), in [-1, 1].
        u: (n, 2), uniform in [-1, 1].
        strength: as the first sentence says.
    """
    return images + strength * u[:, 0, None, None, None]


def contrast(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """Distances from the image's mean times 1 - strength to 1 + strength.

    Args:
        images: (n, ch, y, x), in [-1, 1].
        u: (n, 2), uniform in [-1, 1].
        strength: as the first sentence says.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + strength * u[:, 0, None, None, None])


def saturation(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """Distances of the channels from their mean times 1 - strength to 1 + strength.

    Args:
        images: (n, ch, y, x), in [-1, 1].
        u: (n, 2), uniform in [-1, 1].
        strength: as the first sentence says.
    """
    grey = images.mean(1, keepdim=True)
    return grey + (images - grey) * (1 + strength * u[:, 0, None, None, None])


def translation(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """Moved by whole pixels, up to `strength` of the sides; 0 comes in at the border.

    Args:
        images: (n, ch, y, x), in [-1, 1].
        u: (n, 2), uniform in [-1, 1].
        strength: as the first sentence says.
    """
    *_, height, width = images.shape
    y = torch.arange(height, device=u.device) - (u[:, :1] * strength * height).round().long()
    x = torch.arange(width, device=u.device) - (u[:, 1:] * strength * width).round().long()
    rows = torch.arange(len(images), device=u.device)[:, None, None]
    moved = images[rows, :, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None]]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    return torch.where(inside[:, None], moved.movedim(-1, 1), 0.0)


def cutout(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """A rectangle of `strength` times the sides, anywhere, set to 0.

    Args:
        images: (n, ch, y, x), in [-1, 1].
        u: (n, 2), uniform in [-1, 1].
        strength: as the first sentence says.
    """

    def covered(size: int, u: Tensor) -> Tensor:
        cut = round(strength * size)
        start = ((u + 1) / 2 * size).floor() - cut // 2
        place = torch.arange(size, device=u.device)
        return (place >= start) & (place < start + cut)

    *_, height, width = images.shape
    hole = covered(height, u[:, :1])[:, :, None] & covered(width, u[:, 1:])[:, None]
    return torch.where(hole[:, None], 0.0, images)


AUGMENTATIONS = Registry(
    "augmentation",
    {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "translation": translation,
        "cutout": cutout,
    },
)


def draw_augmentation(
    strengths: Mapping[str, float],
    images: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """One random change for each of some images: a function of (rows, ch, y, x) to the same shape.

    Row i undergoes change i modulo their number, so that real images above generated ones are changed alike.
    DiffAugment is {brightness: 0.5, saturation: 1, contrast: 0.5, translation: 0.125, cutout: 0.5}.

    Args:
        strengths: key of AUGMENTATIONS -> strength.
        images: how many changes.
        generator: of the random numbers.
        device: of the images.

    Raises:
        ValueError: an unknown augmentation, or a strength outside [0, 1].
    """
    for name, strength in strengths.items():
        if not 0 <= strength <= 1:
            raise ValueError(f"augmentation {name} must have a strength in [0, 1], not {strength}")
    draws = [
        (AUGMENTATIONS[name], (2 * torch.rand(images, 2, generator=generator) - 1).to(device), strength)
        for name, strength in strengths.items()
    ]

    def change(rows: Tensor) -> Tensor:
        order = torch.arange(len(rows), device=rows.device) % images
        for augmentation, u, strength in draws:
            rows = augmentation(rows, u[order], strength) if strength else rows
        return rows

    return change
