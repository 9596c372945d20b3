"""A model's rotary module changed for one that runs a scheme, and changed back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from rope_mm.hf.attentions import base_of, drop_hook, give, put_forward, take_back
from rope_mm.hf.fitting import Runs, ready
from rope_mm.hf.placing import METHODS
from rope_mm.hf.reading import ModelRope, applied, layer_types, named, read_module, rotary_modules
from rope_mm.hf.saving import fill_learned, read, restore, wake, write
from rope_mm.hf.stand_in import RopeMMRotaryEmbedding, mark_cache, split_positions
from rope_mm.rotary import Rotary
from rope_mm.scheme import Scheme


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


def sites(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """(name, owner, attribute, module) of rotary modules, ours included; of words where there are any.

    Raises:
        ValueError: rotary modules in a list, of which only the model knows which it calls.
    """
    ours = [
        (f"{name}.{leaf}".strip("."), owner, leaf, module)
        for name, owner in model.named_modules()
        for leaf, module in owner.named_children()
        if isinstance(module, RopeMMRotaryEmbedding)
    ]
    inside = {id(module.original) for *_, module in ours}
    found = [site for site in rotary_modules(model) if id(site[-1]) not in inside] + ours
    if listed := [name for name, owner, *_ in found if isinstance(owner, nn.ModuleList)]:
        raise ValueError(
            f"{type(model).__name__} keeps rotary modules in a list ({', '.join(listed)}), and only its own "
            "forward knows which layer calls which; it is not served"
        )
    text = getattr(model, "config", None) and model.config.get_text_config()  # pyright: ignore
    words = [site for site in found if getattr(site[-1], "config", None) is text]
    return words or found


def read_site(owner: nn.Module, module: nn.Module, strict: bool = True) -> dict[str | None, ModelRope | Runs]:
    """What a site runs, for each type of layer."""
    if isinstance(module, RopeMMRotaryEmbedding):
        return dict(module.runs)
    return {
        layer: named(read_module(module, layer, strict), owner, getattr(module, "config", None), layer)
        for layer in layer_types(module)
    }


def rope_of(model: nn.Module) -> Any:
    """What a model runs: a ModelRope, the Rotary it was given, or a dict of them where layers differ.

    Of a composite model it is its text's; give the tower itself for its own.

    Raises:
        ValueError: no rotary, angles that are not linear in position, or parts that differ.
    """
    if rope := getattr(base_of(model), "rope_mm", None):
        return rope
    found = [read_site(owner, module) for _, owner, _, module in sites(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with inv_freq, so no rotary that can be read")
    if any(other != found[0] for other in found[1:]):
        names = ", ".join(name for name, *_ in sites(model))
        raise ValueError(
            f"{type(model).__name__} rotates in several ways, at {names}; give one of these parts"
        )
    ropes = found[0]
    return ropes[None] if list(ropes) == [None] else ropes


def set_rope(model: nn.Module, scheme: Any = None, layout: str | None = None, **changes: Any) -> Handle:
    """Let a live model of transformers rotate by a scheme; `handle.undo()` or `unset_rope` takes it back.

    Args:
        model: a decoder, a vision-language model (its text is meant) or a tower with rotary.
        scheme: a key of SCHEMES, a Scheme, a Rotary, what `rope_of` gave, or a dict of them by layer type.
        layout: another layout than the scheme's.
        changes: fields of the scheme to replace.

    Raises:
        ValueError: what the model cannot run, with the reason; the model is as it was.
    """
    changes |= {"layout": layout} if layout else {}
    places = sites(model)
    ours = [module for *_, module in places if isinstance(module, RopeMMRotaryEmbedding)]
    if ours or getattr(base_of(model), "rope_mm", None):
        raise ValueError(f"{type(model).__name__} has a rope of ours already; `unset_rope` it first")
    if not places:
        give(model, scheme, changes)
        return Handle(model)
    folder = getattr(model, "name_or_path", "")
    swaps = [(owner, leaf, swap_for(owner, module, scheme, changes)) for _, owner, leaf, module in places]
    for _, leaf, swapped in swaps if scheme is None else ():
        for at, rope in enumerate(swapped.learned):
            fill_learned(rope, folder, f"{leaf}.learned.{at}.learned")
    for owner, leaf, swapped in swaps:
        setattr(owner, leaf, swapped)
        if all(isinstance(rope, Rotary) for rope in swapped.runs.values()) and swapped.config:
            schemes: Any = {layer: rope.scheme for layer, rope in swapped.runs.items()}
            write(swapped.config, schemes, by_rope=swapped.reads_words)
            wake(owner)
        owner.register_forward_pre_hook(split_positions, with_kwargs=True)
        if not swapped.asked_natively:
            owner.register_forward_hook(mark_cache, with_kwargs=True)
    for part, name in placing_parts(model):
        vars(part)[name] = MethodType(METHODS[name], part)
    return Handle(model)


def placing_parts(model: nn.Module) -> list[tuple[Any, str]]:
    """Parts that place images themselves, and the methods with which they do, where text runs our scheme."""
    runs = [rope for *_, module in sites(model) for rope in getattr(module, "runs", {}).values()]
    ours = any(isinstance(rope, Rotary) for rope in runs)
    places = any(hasattr(type(part), "get_rope_index") for part in model.modules())
    parts = model.modules() if ours and places else ()
    return [(part, name) for part in parts for name in METHODS if hasattr(type(part), name)]


def scheme_of(model: nn.Module) -> Scheme:
    """The scheme by which a model places what it reads.

    Raises:
        ValueError: a model that was given none.
    """
    runs = [rope for *_, module in sites(model) for rope in getattr(module, "runs", {}).values()]
    if not runs or runs[0].scheme is None:
        raise ValueError(f"{type(model).__name__} runs no scheme of ours that places tokens; `set_rope` one")
    return runs[0].scheme


def swap_for(owner: nn.Module, original: Any, scheme: Any, changes: dict[str, Any]) -> RopeMMRotaryEmbedding:
    """The module that takes the place of `original`, checked.

    Raises:
        ValueError: what does not fit.
    """
    asked: dict[str | None, Any] = read_site(owner, original, strict=False)
    if scheme is None:
        scheme = {layer: read(original.config, layer) for layer in asked}
    given = scheme if isinstance(scheme, Mapping) else dict.fromkeys(asked, scheme)
    if set(given) != set(asked):
        raise ValueError(f"layers are of the types {list(asked)}, but schemes came for {list(given)}")
    runs = {layer: ready(given[layer], rope, original, changes) for layer, rope in asked.items()}
    schemes = [rope.scheme for rope in runs.values()]
    if len(layouts := {scheme and (scheme.layout, scheme.options) for scheme in schemes}) > 1:
        raise ValueError(f"layers would place tokens by several layouts, {layouts}; give one layout")
    return RopeMMRotaryEmbedding(original, asked, runs)


def unset_rope(model: nn.Module) -> None:
    """Give a model its own rotary modules back.

    Raises:
        ValueError: a model that has them already.
    """
    if getattr(base_of(model), "rope_mm", None):
        return take_back(model)
    ours = [site for site in sites(model) if isinstance(site[-1], RopeMMRotaryEmbedding)]
    if not ours:
        raise ValueError(f"{type(model).__name__} has no rope of ours to take back")
    for part, name in placing_parts(model):
        vars(part).pop(name, None)
    for _, owner, leaf, module in ours:
        for part, _ in applied(owner) if module.turns else ():  # attention that runs our op
            put_forward(part, None)
        setattr(owner, leaf, module.original)
        if module.config:
            restore(module.config, module.saved)
        drop_hook(owner, split_positions)
        drop_hook(owner, mark_cache)
