"""The definition: angles = positions @ Omega, and pairs of channels rotated by them.

Heads are (b, s, h, d). Angles are made in float64 (float32 where a device has no other), the rotation runs in
float32 or wider, and the result has the input's dtype.
"""

from collections.abc import Sequence

import torch
from rope_mm_kernels.checks import check_choice, check_pairs
from torch import Tensor
from torch._subclasses import FakeTensor

from rope_mm.registry import Registry


def widest_float(device: torch.device | str) -> torch.dtype:
    """The widest floats that a device has: float64, on MPS float32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def angles(positions: Tensor, omega: Tensor, mode: str = "exact") -> Tensor:
    """Radians (..., s, n, r) by which pairs are rotated.

    Args:
        positions: (..., s, a).
        omega: radians per step (a, r), which makes n = 1, or (n, a, r).
        mode: "exact" in the widest float, or "hf" rounded to float32 product by product, as in transformers.
    """
    recorded = torch.compiler.is_compiling()
    if isinstance(positions, FakeTensor) and not isinstance(omega, FakeTensor) and not recorded:
        omega = positions.fake_mode.from_tensor(omega)
    omega = omega.reshape(-1, *omega.shape[-2:])
    if mode == "hf":
        omega = omega.to(positions.device, torch.float32)
        if omega.shape[1] == 1:
            return positions.float().unsqueeze(-1) * omega[:, 0]
        products = positions.float()[..., None, :, None] * omega
        return sum(products.unbind(-2), products.new_zeros(()))
    wide = widest_float(positions.device)
    if omega.shape[0] == omega.shape[1] == 1 and wide == torch.float64:
        return positions.to(wide).unsqueeze(-1) * omega[0].to(positions.device, wide)
    positions, omega = positions.to(wide), omega.to(positions.device, wide)
    if wide == torch.float64:  # which autocast leaves alone
        return product(positions, omega)
    with torch.autocast(positions.device.type, enabled=False):
        return product(positions, omega)


def product(positions: Tensor, omega: Tensor) -> Tensor:
    """positions (..., s, a) @ Omega (n, a, r): (..., s, n, r)."""
    if omega.shape[1] == 1:
        return positions.unsqueeze(-2) * omega[:, 0]
    if len(omega) == 1:
        return (positions @ omega[0]).unsqueeze(-2)
    return torch.einsum("...sa,nar->...snr", positions, omega)


def cos_sin_of(angle: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles, times `factor`, rounded to `dtype` at the end.

    Args:
        angle: radians, of any shape.
        dtype: of the result.
        factor: of both.
    """
    angle = angle.to(torch.promote_types(angle.dtype, dtype))
    cos, sin = angle.cos(), angle.sin()
    if torch.compiler.is_compiling() or factor != 1:  # a graph would be traced again to know its value
        cos, sin = factor * cos, factor * sin
    return cos.to(dtype), sin.to(dtype)


def cos_sin(
    positions: Tensor,
    omega: Tensor,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    mode: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., s, n, r) of the angles.

    Args:
        positions: (..., s, a).
        omega: (a, r) or (n, a, r).
        dtype: of the results.
        factor: what both are multiplied by (YaRN's attention factor).
        mode: as in `angles`.
    """
    return cos_sin_of(angles(positions, omega, mode), dtype, factor)


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
    """Refuse tables (..., s, n, r) of other rows or pairs than those of heads x (b, s, h, d)."""
    check_choice("pairing", pairing, tuple(PAIRINGS))
    if cos.dim() == 4 and cos.shape[0] != 1 and cos.shape[0] != x.shape[0]:
        raise ValueError(
            f"positions are of {cos.shape[0]} rows, but heads of {x.shape[0]}; give as many, or one for all"
        )
    n, r = cos.shape[-2:]
    check_pairs(x, n, r, pairing, blocks)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str = "half",
    blocks: Sequence[int] = (),
    tail: bool = False,
) -> Tensor:
    """Heads with their first 2r channels, or last, rotated; head j follows row j * n // h of the n rows.

    Equation 34 of RoFormer (arXiv 2104.09864).

    Args:
        x: heads (b, s, h, d).
        cos: cosines (..., s, n, r).
        sin: sines (..., s, n, r).
        pairing: a key of PAIRINGS.
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.

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
    rotated = join(first * cos - second * sin, first * sin + second * cos, blocks)
    return torch.cat((before, rotated, after), dim=-1).to(x.dtype)
