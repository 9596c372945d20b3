"""What every loss and penalty expects of a critic's scores: one number an image, in float32 at least."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rope_mm.checks.tensors import check_real_tensors


def at_least_float32(x: Tensor) -> Tensor:
    """The same tensor in float32, or wider where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves the device of x alone; the meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_readable(x: Tensor) -> bool:
    """Whether the host may look at the numbers: an accelerator would make it wait, a graph has none."""
    recorded = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and type(x) is Tensor and not recorded


def check_rows(**tensors: Any) -> None:
    """Refuse what is not all (b,) with one b >= 1: broadcast, tensors would give a wrong number.

    Args:
        tensors: scores or distances, by the name that a message calls them.

    Raises:
        ValueError: another shape, with all shapes and the cure; no tensor, complex numbers, no rows.
    """
    check_real_tensors(**tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        named = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"scores and distances must be (b,), one number for each image and as many of each, not {named}; "
            "flatten scores (b, 1) with .squeeze(1)"
        )
    if (0,) in shapes.values():
        raise ValueError("scores of no images have no mean; give at least one")
