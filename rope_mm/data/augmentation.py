"""Augmentations that gradients flow through: what one is real and what is drawn are changed alike.

DiffAugment, arXiv 2006.10738: a critic that sees few pictures learns them by heart, less so if they change,
and the generator learns nothing of the changes as long as both kinds of pictures undergo them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rope_mm.registry import Registry


def brightness(pictures: Tensor, u: Tensor, strength: float) -> Tensor:
    """All entries of a picture moved by up to `strength`."""
    return pictures + strength * u[:, 0, None, None, None]


def contrast(pictures: Tensor, u: Tensor, strength: float) -> Tensor:
    """Distances from the picture's mean times 1 - strength to 1 + strength."""
    mean = pictures.mean((1, 2, 3), keepdim=True)
    return mean + (pictures - mean) * (1 + strength * u[:, 0, None, None, None])


def saturation(pictures: Tensor, u: Tensor, strength: float) -> Tensor:
    """Distances of the channels from their mean times 1 - strength to 1 + strength."""
    grey = pictures.mean(1, keepdim=True)
    return grey + (pictures - grey) * (1 + strength * u[:, 0, None, None, None])


def translation(pictures: Tensor, u: Tensor, strength: float) -> Tensor:
    """Moved by whole pixels, up to `strength` of the sides; 0 comes in at the border."""
    *_, height, width = pictures.shape
    y = torch.arange(height, device=u.device) - (u[:, :1] * strength * height).round().long()
    x = torch.arange(width, device=u.device) - (u[:, 1:] * strength * width).round().long()
    rows = torch.arange(len(pictures), device=u.device)[:, None, None]
    moved = pictures[rows, :, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None]]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    return torch.where(inside[:, None], moved.movedim(-1, 1), 0.0)


def cutout(pictures: Tensor, u: Tensor, strength: float) -> Tensor:
    """A rectangle of `strength` times the sides, anywhere, set to 0."""

    def covered(size: int, u: Tensor) -> Tensor:
        cut = round(strength * size)
        start = ((u + 1) / 2 * size).floor() - cut // 2
        place = torch.arange(size, device=u.device)
        return (place >= start) & (place < start + cut)

    *_, height, width = pictures.shape
    hole = covered(height, u[:, :1])[:, :, None] & covered(width, u[:, 1:])[:, None]
    return torch.where(hole[:, None], 0.0, pictures)


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
    pictures: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """One random change for each of so many pictures: (rows, ch, y, x) -> the same shape.

    Row i is changed by draw i, modulo their number: real pictures above drawn ones share their draws.
    DiffAugment is {brightness: 0.5, saturation: 1, contrast: 0.5, translation: 0.125, cutout: 0.5}.

    Raises:
        ValueError: an unknown augmentation, or a strength outside [0, 1].
    """
    for name, strength in strengths.items():
        if not 0 <= strength <= 1:
            raise ValueError(f"augmentation {name} must have a strength in [0, 1], not {strength}")
    draws = [
        (AUGMENTATIONS[name], (2 * torch.rand(pictures, 2, generator=generator) - 1).to(device), strength)
        for name, strength in strengths.items()
    ]

    def change(images: Tensor) -> Tensor:
        order = torch.arange(len(images), device=images.device) % pictures
        for augmentation, u, strength in draws:
            images = augmentation(images, u[order], strength) if strength else images
        return images

    return change
