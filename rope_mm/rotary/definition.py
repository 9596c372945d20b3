"""The definition: angles = positions @ Omega, and pairs of channels turned by them.

Layouts of q and k are (b, s, h, d). Angles are made in float64 (float32 where a device has no other), the
rotation runs in float32 or wider, and the result has the input's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rope_mm.registry import Registry


def widest_float(device: torch.device | str) -> torch.dtype:
    """The widest floats that a device has: float64, on MPS float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def angles(positions: Tensor, omega: Tensor) -> Tensor:
    """Radians (..., s, n, r) from positions (..., s, a) and Omega (a, r), n = 1, or (n, a, r)."""
    wide = widest_float(positions.device)
    omega = omega.reshape(-1, *omega.shape[-2:]).to(positions.device, wide)
    with torch.autocast(positions.device.type, enabled=False):
        return torch.einsum("...sa,nar->...snr", positions.to(wide), omega)


def cos_sin(
    positions: Tensor, omega: Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., s, n, r) of the angles, times `factor` (YaRN's attention factor)."""
    angle = angles(positions, omega)
    return (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)


def split_half(x: Tensor, blocks: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Channels (i, i + r)."""
    return x.chunk(2, dim=-1)


def join_half(first: Tensor, second: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """The inverse of `split_half`."""
    return torch.cat((first, second), dim=-1)


def split_interleaved(x: Tensor, blocks: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Channels (2i, 2i + 1)."""
    return x.unflatten(-1, (-1, 2)).unbind(-1)


def join_interleaved(first: Tensor, second: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """The inverse of `split_interleaved`."""
    return torch.stack((first, second), dim=-1).flatten(-2)


def split_block(x: Tensor, blocks: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Within each block of n pairs, one after another, channels (i, i + n) of the block (Gemma 4's tower)."""
    halves = zip(*(part.chunk(2, dim=-1) for part in x.split([2 * n for n in blocks], dim=-1)), strict=True)
    return tuple(torch.cat(half, dim=-1) for half in halves)


def join_block(first: Tensor, second: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """The inverse of `split_block`."""
    parts = zip(first.split(list(blocks), dim=-1), second.split(list(blocks), dim=-1), strict=True)
    return torch.cat([half for pair in parts for half in pair], dim=-1)


PAIRINGS = Registry(
    "pairing",
    {
        "half": (split_half, join_half),
        "interleaved": (split_interleaved, join_interleaved),
        "block": (split_block, join_block),
    },
)


def check_fit(x: Tensor, cos: Tensor, pairing: str, blocks: Sequence[int]) -> None:
    """Refuse other rows, too many pairs, heads that n does not divide, blocks that do not sum to r."""
    (h, d), (n, r) = x.shape[-2:], cos.shape[-2:]
    PAIRINGS[pairing]
    if cos.dim() == 4 and cos.shape[0] != 1 and cos.shape[0] != x.shape[0]:
        raise ValueError(
            f"positions are of {cos.shape[0]} rows, but heads of {x.shape[0]}; give as many, or one for all"
        )
    if 2 * r > d:
        raise ValueError(f"{r} pairs need {2 * r} channels, but a head has {d}; take a smaller Omega")
    if h % n:
        raise ValueError(f"Omega has {n} heads, which must divide the {h} heads of q and of k")
    if pairing == "block" and sum(blocks) != r:
        raise ValueError(f"blocks {tuple(blocks)} must sum to the {r} pairs of Omega")


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str = "half",
    blocks: Sequence[int] = (),
    tail: bool = False,
) -> Tensor:
    """Heads x (b, s, h, d) with their first 2r channels, or last, rotated by cos, sin (..., s, n, r).

    Head j follows row j * n // h of the n rows (RoFormer, equation 34).

    Raises:
        ValueError: other rows, more pairs than channels, heads that n does not divide, blocks that do not sum
            to r.
    """
    check_fit(x, cos, pairing, blocks)
    split, join = PAIRINGS[pairing]
    (h, d), (n, r) = x.shape[-2:], cos.shape[-2:]
    if n > 1:
        cos, sin = cos.repeat_interleave(h // n, dim=-2), sin.repeat_interleave(h // n, dim=-2)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    before, rotated, after = wide.split((d - 2 * r, 2 * r, 0) if tail else (0, 2 * r, d - 2 * r), dim=-1)
    first, second = split(rotated, blocks)
    turned = join(first * cos - second * sin, first * sin + second * cos, blocks)
    return torch.cat((before, turned, after), dim=-1).to(x.dtype)
