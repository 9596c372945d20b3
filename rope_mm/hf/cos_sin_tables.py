"""Tables of cosine and sine as models hold them, and the Omega that can be read out of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_mm.rotary.definition import PAIRINGS

# how r angles fill a table: on both channels of their pairs, or once each
TABLE_FORMATS: dict[str, Callable[..., Tensor]] = {name: join for name, (_, join) in PAIRINGS.items()}
COMPLEX = {"complex": torch.complex64, "complex128": torch.complex128}
TABLE_FORMATS |= dict.fromkeys(("single", "sin_cos", *COMPLEX), lambda first, _second, _blocks: first)


def fill_tables(angle: Tensor, table_format: str, factor: float = 1.0, axes: int = 1) -> Any:
    """Cosine and sine (..., d) of angles (..., r) in float32, times `factor`; in one tensor if complex."""
    if table_format in COMPLEX:
        return (torch.polar(torch.ones_like(angle), angle) * factor).to(COMPLEX[table_format])
    once, blocks = (angle.cos() * factor, angle.sin() * factor), (angle.shape[-1] // axes,) * axes
    tables = tuple(TABLE_FORMATS[table_format](x.float(), x.float(), blocks) for x in once)
    return tables[::-1] if table_format == "sin_cos" else tables


def split_tables(tables: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine of tables that may be one complex tensor."""
    cos, sin = (tables.real, tables.imag) if isinstance(tables, Tensor) else tables
    return cos, sin


def read_tables(tables: Any, p: Tensor, known: Tensor) -> tuple[str, Tensor, float]:
    """The table format, Omega (a, r) and factor of tables (..., d) at positions p (s, a).

    Args:
        tables: cosine and sine (..., d), or one complex tensor.
        p: positions (s, a), with the origin and, for each axis, a step along it alone below half a turn.
        known: frequencies (n,) of the module; an arc tangent is rounded, so a frequency near one of these
            becomes that one.
    """
    halves = [x.reshape(-1, x.shape[-1]) for x in split_tables(tables)]
    origin = (p == 0).all(-1).int().argmax()
    sine_first = not isinstance(tables, Tensor) and not halves[0][origin].any() and halves[1][origin].all()
    whole = torch.cat(halves[::-1] if sine_first else halves)
    if isinstance(tables, Tensor):
        table_format, once = next(name for name, dtype in COMPLEX.items() if dtype == tables.dtype), whole
    else:
        table_format, once = find_table_format(whole, p.shape[-1])
    if sine_first:  # GPT-J; each angle once
        table_format, once = "sin_cos", whole
    (cos, sin), p = once.chunk(2), p.to(once)
    alone = (p > 0) & ((p != 0).sum(-1, keepdim=True) == 1)
    first = p.where(alone, torch.inf).argmin(0)
    omega = torch.atan2(sin[first], cos[first]) / p[first].diagonal()[:, None]
    nearest = known[(omega[..., None] - known).abs().argmin(-1)]
    near = (nearest - omega).abs() <= 1e-5 * omega.abs().clamp(min=1e-30)
    return table_format, torch.where(near, nearest, omega).to(known.dtype), cos[origin, 0].item()


def find_table_format(table: Tensor, axes: int) -> tuple[str, Tensor]:
    """The format of a table (s, d), and its angles once each (s, r)."""
    d = table.shape[-1]
    for table_format, (split, join) in PAIRINGS.items():
        if d % (2 * axes if table_format == "block" else 2) == 0:
            blocks = (d // 2 // axes,) * axes
            once, _ = split(table, blocks)
            if torch.equal(join(once, once, blocks), table):
                return table_format, once
    return "single", table


def find_pairing(turned: Tensor, still: Tensor) -> str | None:
    """The pairing of a rotary function, from what it made of unit vectors; None if it is neither known one.

    Args:
        turned: the function's outputs (2r, 2r) of unit vectors at angles that are not 0.
        still: its outputs (2r, 2r) at angle 0. Their products are non-zero within pairs alone, also where the
            function puts the channels in another order.
    """
    channel, half = torch.arange(len(turned)), len(turned) // 2
    partner = ((turned @ still.mT) * (1 - torch.eye(2 * half))).abs().argmax(-1)
    others = {"half": (channel + half) % (2 * half), "interleaved": channel ^ 1}
    return next((pairing for pairing, other in others.items() if torch.equal(partner, other)), None)
