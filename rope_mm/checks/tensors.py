"""What is no tensor of real numbers is refused where a function takes tensors."""

from typing import Any

from torch import Tensor


def check_real_tensors(**tensors: Any) -> None:
    """Refuse what is no tensor, and complex numbers, whose imaginary part would be lost.

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
