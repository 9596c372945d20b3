"""Whether a scheme fits a model's rotary module."""

from typing import Any

from torch import nn

from rope_mm.hf.reading import ModelRope
from rope_mm.hf.stand_in import Runs
from rope_mm.rope_parameters import read_head_dim
from rope_mm.rotary import Rotary
from rope_mm.scheme import Scheme
from rope_mm.schemes import read_scheme


def ready(scheme: Any, asked: ModelRope, original: nn.Module, changes: dict[str, Any]) -> Runs:
    """A scheme made ready for a module that is asked in this way.

    Raises:
        ValueError: what the module's tables cannot say.
    """
    name, pairs = type(original).__name__, asked.pairs
    if isinstance(scheme, ModelRope):
        if changes or (scheme.call, scheme.spread, scheme.pairs) != (asked.call, asked.spread, pairs):
            raise ValueError(
                f"this rope was read from another kind of module ({scheme.call}, {scheme.pairs} pairs); "
                f"{name} takes {asked.call} and turns {pairs} pairs"
            )
        return scheme
    made = isinstance(scheme, Rotary)
    if made and (changes or scheme.head_dim != 2 * pairs):
        raise ValueError(
            f"{name} turns {2 * pairs} channels of a head, so its Rotary needs that head_dim, not "
            f"{scheme.head_dim}, and cannot change {sorted(changes)} any more; make another"
        )
    chosen = scheme.scheme if made else read_scheme(scheme, **changes)
    config = getattr(original, "config", None)
    refuse_scheme(chosen, asked, name, 2 * pairs if config is None else read_head_dim(config))
    return scheme if made else Rotary(2 * pairs, chosen.change(fraction=1.0, slot="front"))


def refuse_scheme(scheme: Scheme, asked: ModelRope, name: str, head_dim: int) -> None:
    """Refuse a scheme that tables of this module cannot say.

    Raises:
        ValueError: with what came, what fits and what to do.
    """
    a = len(scheme.axes)
    pairs = asked.pairs if scheme.fraction == 1 else scheme.pairs(head_dim)
    if scheme.per_head or scheme.needs_length:
        what = "an Omega for each head" if scheme.per_head else "an Omega that depends on the length"
        raise ValueError(f"{scheme} has {what}, but {name} makes one table for all heads and every length")
    if scheme.pairing != asked.pairing:
        raise ValueError(
            f"the scheme pairs channels {scheme.pairing!r}, but the model's weights are for "
            f"{asked.pairing!r}; change the scheme's pairing, or the weights by `convert_pairing`"
        )
    if pairs != asked.pairs or 2 * asked.pairs > head_dim:
        raise ValueError(
            f"fraction {scheme.fraction} of head_dim {head_dim} makes {pairs} pairs, but {name} turns "
            f"{asked.pairs}; leave the fraction at 1 to take the model's"
        )
    if not asked.of_words and scheme.layout != "grid":
        raise ValueError(
            f"{name} is told rows and columns alone, which layout 'grid' takes, not {scheme.layout!r}"
        )
    if asked.of_words and scheme.word_line != ([0.0] * a, [1.0] * a):
        raise ValueError(
            f"layout {scheme.layout!r} does not count words along all of its axes, as decoding does"
        )
