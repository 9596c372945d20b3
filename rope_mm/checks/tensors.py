"""What is no tensor of real numbers, and no generator, is refused where a function takes them."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REALS = (*FLOATS, *WHOLE, torch.bool)


def check_generator(generator: Any) -> None:
    """Refuse a seed where a generator of random numbers is meant."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is {generator!r}; give a torch.Generator, such as torch.Generator().manual_seed(0)"
        )


def check_real_tensors(**tensors: Any) -> None:
    """Refuse what is no tensor, complex numbers, whose imaginary part would be lost, and what has no sums.

    Args:
        tensors: what was given, by the name that a message calls it.

    Raises:
        ValueError: with the name and what came.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            raise ValueError(f"{name} is a {kind}; give a tensor of real numbers, torch.as_tensor({name})")
        if x.is_complex():
            raise ValueError(f"{name} is {x.dtype}; give a tensor of real numbers, such as its .real")
        if x.is_nested or x.layout != torch.strided:
            raise ValueError(
                f"{name} is a nested or sparse tensor; give a dense one, with one row for each sample"
            )
        if x.dtype not in REALS:
            raise ValueError(f"{name} is {x.dtype}, with which nothing is computed; give it in float32")
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"give all tensors on one device, not {listed}")
