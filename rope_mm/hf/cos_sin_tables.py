"""Tables of cosine and sine as models hold them, and the Omega that can be read out of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_mm.rotary.definition import PAIRINGS

# how r angles fill a table: on both channels of their pairs, or each once
TABLE_FORMATS: dict[str, Callable[..., Tensor]] = {name: join for name, (_, join) in PAIRINGS.items()}
TABLE_FORMATS |= dict.fromkeys(("single", "complex"), lambda first, _second, _blocks: first)


def fill_tables(angle: Tensor, spread: str, factor: float = 1.0, axes: int = 1) -> Any:
    """Cosine and sine (..., d) of angles (..., r) in float32, times `factor`; for "complex" in one tensor."""
    if spread == "complex":
        return (torch.polar(torch.ones_like(angle), angle) * factor).to(torch.complex64)
    once, blocks = (angle.cos() * factor, angle.sin() * factor), (angle.shape[-1] // axes,) * axes
    return tuple(TABLE_FORMATS[spread](x.float(), x.float(), blocks) for x in once)


def split_tables(tables: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine of tables that may be one complex tensor."""
    cos, sin = (tables.real, tables.imag) if isinstance(tables, Tensor) else tables
    return cos, sin


def read_tables(tables: Any, p: Tensor, known: Tensor) -> tuple[str, Tensor, float]:
    """The spread, Omega (a, r) and factor of tables (..., d) at positions p (s, a).

    Among them are the origin and, for each axis, a step along it alone that is below half a turn. An arc
    tangent has been rounded: a frequency that is near one of the `known` (n,) becomes that one.
    """
    whole = torch.cat([x.reshape(-1, x.shape[-1]) for x in split_tables(tables)])
    spread, once = ("complex", whole) if isinstance(tables, Tensor) else unspread(whole, p.shape[-1])
    (cos, sin), p = once.chunk(2), p.to(once)
    alone = (p > 0) & ((p != 0).sum(-1, keepdim=True) == 1)
    first = p.where(alone, torch.inf).argmin(0)
    omega = torch.atan2(sin[first], cos[first]) / p[first].diagonal()[:, None]
    nearest = known[(omega[..., None] - known).abs().argmin(-1)]
    near = (nearest - omega).abs() <= 1e-5 * omega.abs().clamp(min=1e-30)
    origin = (p == 0).all(-1).int().argmax()
    return spread, torch.where(near, nearest, omega), cos[origin, 0].item()


def unspread(table: Tensor, axes: int) -> tuple[str, Tensor]:
    """How a table (s, d) holds its angles, and each of them once (s, r)."""
    d = table.shape[-1]
    for spread, (split, join) in PAIRINGS.items():
        if d % (2 * axes if spread == "block" else 2) == 0:
            blocks = (d // 2 // axes,) * axes
            once, _ = split(table, blocks)
            if torch.equal(join(once, once, blocks), table):
                return spread, once
    return "single", table


def find_pairing(turned: Tensor, still: Tensor) -> str | None:
    """The pairing of a function that made `turned` (2r, 2r) of unit vectors, and `still` without an angle.

    Their products meet the two channels of each pair alone, also where it puts the channels in another order.
    """
    channel, half = torch.arange(len(turned)), len(turned) // 2
    partner = ((turned @ still.mT) * (1 - torch.eye(2 * half))).abs().argmax(-1)
    others = {"half": (channel + half) % (2 * half), "interleaved": channel ^ 1}
    return next((pairing for pairing, other in others.items() if torch.equal(partner, other)), None)
