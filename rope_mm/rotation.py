"""The definition: angles = positions @ Omega, and pairs of channels turned by them.

Layouts of q and k are (b, s, h, d). Angles are made in float64 (float32 where a device has no other), the
rotation runs in float32 or wider, and the result has the input's dtype.
"""

import torch
from torch import Tensor

from rope_mm.choice import Choice


def angles(positions: Tensor, omega: Tensor) -> Tensor:
    """Radians (..., s, n, r) from positions (..., s, a) and Omega (a, r), n = 1, or (n, a, r)."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    omega = omega.reshape(-1, *omega.shape[-2:]).to(positions.device, wide)
    return torch.einsum("...sa,nar->...snr", positions.to(wide), omega)


def cos_sin(positions: Tensor, omega: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., s, n, r) of the angles."""
    angle = angles(positions, omega)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def split_half(x: Tensor) -> tuple[Tensor, ...]:
    """Channels (i, i + r)."""
    return x.chunk(2, dim=-1)


def join_half(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of `split_half`."""
    return torch.cat((first, second), dim=-1)


def split_interleaved(x: Tensor) -> tuple[Tensor, ...]:
    """Channels (2i, 2i + 1)."""
    return x.unflatten(-1, (-1, 2)).unbind(-1)


def join_interleaved(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of `split_interleaved`."""
    return torch.stack((first, second), dim=-1).flatten(-2)


PAIRINGS = Choice(
    "pairing", {"half": (split_half, join_half), "interleaved": (split_interleaved, join_interleaved)}
)


def turn_heads(x: Tensor, cos: Tensor, sin: Tensor, pairing: str = "half") -> Tensor:
    """Heads x (b, s, h, d) with their first 2r channels rotated by cos, sin (..., s, n, r).

    Head j follows row j * n // h of the n rows (RoFormer, equation 34).

    Raises:
        ValueError: more pairs than channels, or heads that n does not divide.
    """
    split, join = PAIRINGS[pairing]
    (h, d), (n, r) = x.shape[-2:], cos.shape[-2:]
    if 2 * r > d:
        raise ValueError(f"{r} pairs need {2 * r} channels, but a head has {d}; take a smaller Omega")
    if h % n:
        raise ValueError(f"Omega has {n} heads, which must divide the {h} heads of q and of k")
    if n > 1:
        cos, sin = cos.repeat_interleave(h // n, dim=-2), sin.repeat_interleave(h // n, dim=-2)
    rotated, rest = x.to(torch.promote_types(x.dtype, cos.dtype)).split((2 * r, d - 2 * r), dim=-1)
    first, second = split(rotated)
    return torch.cat((join(first * cos - second * sin, first * sin + second * cos), rest), dim=-1).to(x.dtype)


def rotate(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half"
) -> tuple[Tensor, Tensor]:
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    Args:
        q: queries; k: keys, whose heads g may be fewer.
        positions: (s, a) or (b, s, a), real numbers.
        omega: (a, r), or (n, a, r) with n dividing g.
        pairing: "half" or "interleaved".
    """
    cos, sin = cos_sin(positions, omega, torch.promote_types(q.dtype, torch.float32))
    return turn_heads(q, cos, sin, pairing), turn_heads(k, cos, sin, pairing)
