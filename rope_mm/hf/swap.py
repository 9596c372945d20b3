"""A model's rotary module changed for one that runs a scheme, and changed back."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from rope_mm.hf.attentions import bare_site, tell_attention
from rope_mm.hf.fitting import ready
from rope_mm.hf.placing import get_rope_index
from rope_mm.hf.reading import read_module, refuse_bent
from rope_mm.hf.saving import fill_learned, read, write
from rope_mm.hf.stand_in import RopeMMRotaryEmbedding, Site, sites
from rope_mm.rope_parameters import read_head_dim
from rope_mm.rotary import Rotary
from rope_mm.scheme import Scheme
from rope_mm.schemes import read_scheme


@dataclass(frozen=True)
class Handle:
    """What `set_rope` did to a model; `undo` takes it back."""

    model: nn.Module

    def undo(self) -> None:
        """Restore the model's own rotary modules.

        Raises:
            ValueError: a model that has its own already.
        """
        unset_rope(self.model)


def ropes_of(site: Site) -> dict[str | None, Any]:
    """What a site runs, for each type of layer.

    Raises:
        ValueError: angles that are not linear in position.
    """
    if site.ours:
        return dict(site.module.runs)
    ropes = read_module(site.module, site.owner)
    refuse_bent(site.module, ropes)
    return ropes


def rope_of(model: nn.Module) -> Any:
    """What a model runs: a ModelRope, the Rotary it was given, or a dict of them where layers differ.

    Of a composite model it is its text's; give the tower itself for its own.

    Raises:
        ValueError: no rotary, angles that are not linear in position, or parts that differ.
    """
    found = [ropes_of(site) for site in sites(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with inv_freq, so no rotary that can be read")
    if any(other != found[0] for other in found):
        names = ", ".join(site.name for site in sites(model))
        raise ValueError(
            f"{type(model).__name__} rotates in several ways, at {names}; give one of these parts"
        )
    return found[0][None] if list(found[0]) == [None] else found[0]


def set_rope(model: nn.Module, scheme: Any = None, layout: str | None = None, **changes: Any) -> Handle:
    """Let a live model of transformers rotate by a scheme; `handle.undo()` or `unset_rope` takes it back.

    Args:
        model: a decoder, a vision-language model (its text is meant), a tower, or a model without rotary.
        scheme: a key of SCHEMES, a Scheme, a Rotary, what `rope_of` gave, or a dict of them by layer type;
            None for the one with which the model was saved.
        layout: another layout than the scheme's.
        changes: fields of the scheme to replace.

    Raises:
        ValueError: what the model cannot run, with the reason; the model is as it was.
    """
    changes |= {"layout": layout} if layout else {}
    places = sites(model) or [bare_site(model)]
    if any(site.ours for site in places):
        raise ValueError(f"{type(model).__name__} has a rope of ours already; `unset_rope` it first")
    swaps = [(site, stand_in(site, scheme, changes)) for site in places]
    for site, rotary in swaps if scheme is None else ():
        for at, rope in enumerate(rotary.learned):
            fill_learned(rope, getattr(model, "name_or_path", ""), f"{site.leaf}.learned.{at}.learned")
    for site, rotary in swaps:
        enter(site, rotary)
        for part in model.modules() if rotary.places else ():
            if hasattr(type(part), "get_rope_index"):  # a model that places pictures itself
                vars(part)["get_rope_index"] = MethodType(get_rope_index, part)
                rotary.undo.append(partial(delattr, part, "get_rope_index"))
    return Handle(model)


def stand_in(site: Site, scheme: Any, changes: dict[str, Any]) -> RopeMMRotaryEmbedding:
    """The module that takes a site's place, checked.

    Raises:
        ValueError: what does not fit.
    """
    original, config = site.module, getattr(site.module or site.owner, "config", None)
    asked = read_module(original, site.owner) if original else {}
    layers = list(asked) or [None]
    if scheme is None:
        scheme = {layer: read(config, layer) for layer in layers}
    given = scheme if isinstance(scheme, Mapping) else dict.fromkeys(layers, scheme)
    if set(given) != set(layers):
        raise ValueError(f"layers are of the types {layers}, but schemes came for {list(given)}")
    if not original:
        return RopeMMRotaryEmbedding({None: whole(given[None], config, changes)}, {}, None, config)
    runs = {layer: ready(given[layer], rope, original, changes) for layer, rope in asked.items()}
    schemes = [rope.scheme for rope in runs.values()]
    if len(layouts := {scheme and (scheme.layout, scheme.options) for scheme in schemes}) > 1:
        raise ValueError(f"layers would place tokens by several layouts, {layouts}; give one layout")
    return RopeMMRotaryEmbedding(runs, asked, original, config)


def whole(scheme: Any, config: Any, changes: dict[str, Any]) -> Rotary:
    """The Rotary of a model that has none: any scheme fits."""
    if isinstance(scheme, Rotary) and not changes:
        return scheme
    chosen = read_scheme(scheme if isinstance(scheme, str | Scheme) else scheme.scheme, **changes)
    return Rotary(
        read_head_dim(config), chosen, heads=config.num_attention_heads if chosen.per_head else None
    )


def enter(site: Site, rotary: RopeMMRotaryEmbedding) -> None:
    """Put our module in its place, and note how to undo it."""
    _, owner, leaf, original = site
    undo, config = rotary.undo, rotary.config
    undo.append(partial(setattr, owner, leaf, original) if original else partial(delattr, owner, leaf))
    setattr(owner, leaf, rotary)
    if config and all(isinstance(rope, Rotary) for rope in rotary.runs.values()):
        undo.append(partial(setattr, config, "rope_parameters", getattr(config, "rope_parameters", None)))
        schemes: Any = {layer: rope.scheme for layer, rope in rotary.runs.items()}
        write(config, schemes, rotary.reads_words)
    if not original:
        return tell_attention(owner, rotary)
    undo.append(owner.register_forward_pre_hook(rotary.split_positions, with_kwargs=True).remove)
    if rotary.call != "rows":
        undo.append(owner.register_forward_hook(rotary.mark_cache, with_kwargs=True).remove)


def unset_rope(model: nn.Module) -> None:
    """Give a model its own rotary modules back.

    Raises:
        ValueError: a model that has them already.
    """
    ours = [site.module for site in sites(model) if site.ours]
    if not ours:
        raise ValueError(f"{type(model).__name__} has no rope of ours to take back")
    for rotary in ours:
        rotary.take_back()
