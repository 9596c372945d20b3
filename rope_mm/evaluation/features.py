"""Features of images by any network that lies in a file, such as Inception's for FID or DINOv2."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rope_mm.registry import Registry

BATCH = 64
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]

# what a network takes, from RGB images (b, 3, y, x) in [0, 1]
INPUTS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "input",
    {
        "0..1": lambda images: images,
        "-1..1": lambda images: images * 2 - 1,
        "uint8": lambda images: (images * 255).round().to(torch.uint8),
        "imagenet": lambda images: (images - IMAGENET[0]) / IMAGENET[1],
    },
)


def load_network(path: str | Path) -> Callable[[Tensor], Any]:
    """A network from a file of `torch.export` (.pt2) or TorchScript.

    Raises:
        ValueError: a file that holds none.
    """
    try:
        if Path(path).suffix == ".pt2":
            return torch.export.load(str(path)).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Inception for FID is published in this form
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds no network ({reason}); save one that gives features (b, f) of images by "
            "torch.export.save, as FILE.pt2, or as TorchScript"
        ) from error


@torch.no_grad()
def extract_features(
    network: Callable[[Tensor], Any], images: Iterable[Tensor], size: int, input: str = "0..1"
) -> Tensor:
    """Features (n, f), float64, of images that may differ in size.

    Args:
        network: (b, 3, size, size) -> (b, f).
        images: (ch, y, x) each, in [-1, 1]; grey ones are repeated.
        size: pixels of a side, to which images are resized with antialiasing.
        input: what the network takes, a key of INPUTS.

    Raises:
        ValueError: no images; features of another shape.
    """
    prepare, rows, batch = INPUTS[input], [], []

    def read() -> None:
        given = prepare(torch.cat(batch))
        found = network(given)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(batch):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the network must give features ({len(batch)}, f), not {shape}")
        rows.append(found.double())
        batch.clear()

    for image in images:
        colour = (image.clamp(-1, 1) + 1)[None] / 2
        resized = interpolate(colour, (size, size), mode="bilinear", antialias=True, align_corners=False)
        batch.append(resized[:, :3] if len(image) > 1 else resized.expand(-1, 3, -1, -1))
        if len(batch) == BATCH:
            read()
    if batch:
        read()
    if not rows:
        raise ValueError("there are no images to take features of")
    return torch.cat(rows)
