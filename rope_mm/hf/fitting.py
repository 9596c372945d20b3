"""Whether a scheme fits a model's rotary module."""

from typing import Any

import torch
from torch import nn

from rope_mm.hf.reading import ModelRope
from rope_mm.lattice import Cursor
from rope_mm.layouts import LAYOUTS
from rope_mm.rope_parameters import read_head_dim
from rope_mm.rotary import Rotary
from rope_mm.scheme import Scheme
from rope_mm.schemes import read_scheme

Runs = Rotary | ModelRope


def axes_of(rope: Runs) -> int:
    """How many coordinates its positions have."""
    return len(rope.omega) if isinstance(rope, ModelRope) else len(rope.scheme.axes)


def factor_of(rope: Runs) -> float:
    """What cosine and sine are multiplied by."""
    return rope.factor if isinstance(rope, ModelRope) else rope.form.factor


def describe(rope: Runs) -> str:
    """In a few words, what runs."""
    if isinstance(rope, Rotary):
        return f"{rope.scheme}, exact angles"
    return f"the model's own, bit for bit ({rope.scheme or 'a scheme of no known name'})"


def ready(scheme: Any, asked: ModelRope, original: nn.Module, changes: dict[str, Any]) -> Runs:
    """A scheme made ready for a module that is asked in this way.

    Raises:
        ValueError: what the module's tables cannot say.
    """
    if isinstance(scheme, ModelRope):
        same = (scheme.call, scheme.spread, scheme.pairs) == (asked.call, asked.spread, asked.pairs)
        if not same or changes:
            raise ValueError(
                f"this rope was read from another kind of module ({scheme.call}, {scheme.pairs} pairs); "
                f"{type(original).__name__} takes {asked.call} and turns {asked.pairs} pairs"
            )
        return scheme
    name, config = type(original).__name__, getattr(original, "config", None)
    if not isinstance(scheme, Rotary):
        chosen = read_scheme(scheme, **changes)
        refuse_scheme(chosen, asked, name, config)
        return Rotary(2 * asked.pairs, chosen.change(fraction=1.0, slot="front"))
    if changes or scheme.head_dim != 2 * asked.pairs:
        raise ValueError(
            f"{name} turns {2 * asked.pairs} channels of a head, so its Rotary needs that head_dim, not "
            f"{scheme.head_dim}, and cannot change {sorted(changes)} any more; make another"
        )
    refuse_scheme(scheme.scheme, asked, name, config)
    return scheme


def refuse_scheme(scheme: Scheme, asked: ModelRope, name: str, config: Any) -> None:
    """Refuse a scheme that tables of this module cannot say.

    Raises:
        ValueError: with what came, what fits and what to do.
    """
    if scheme.per_head or scheme.needs_length:
        what = "an Omega for each head" if scheme.per_head else "an Omega that depends on the length"
        raise ValueError(f"{scheme} has {what}, but {name} makes one table for all heads and every length")
    if scheme.pairing != asked.pairing:
        raise ValueError(
            f"the scheme pairs channels {scheme.pairing!r}, but the model's weights are for "
            f"{asked.pairing!r}; change the scheme's pairing, or the weights by `convert_pairing`"
        )
    head_dim = read_head_dim(config) if config is not None else 2 * asked.pairs
    pairs = asked.pairs if scheme.fraction == 1 else scheme.pairs(head_dim)
    if pairs != asked.pairs or 2 * asked.pairs > head_dim:
        raise ValueError(
            f"fraction {scheme.fraction} of head_dim {head_dim} makes {pairs} pairs, but {name} turns "
            f"{asked.pairs}; leave the fraction at 1 to take the model's"
        )
    if asked.call in ("words", "rows"):
        words, _ = LAYOUTS[scheme.layout].words(Cursor(), 2, len(scheme.axes))
        if not torch.equal(words, torch.arange(2.0, dtype=torch.float64)[:, None].expand_as(words)):
            raise ValueError(
                f"layout {scheme.layout!r} does not count words along all of its axes, as decoding does"
            )
    elif scheme.layout != "grid":
        raise ValueError(
            f"{name} is told rows and columns alone, which layout 'grid' takes, not {scheme.layout!r}"
        )
