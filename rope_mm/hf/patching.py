"""A model's rotary module changed for one that runs a scheme, and changed back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from rope_mm.hf.attention_patch import (
    ATTEND,
    bare_site,
    check_same,
    exchange,
    probe,
    rotate_both,
    tell_attention,
)
from rope_mm.hf.compatibility import make_stand_in, refuse
from rope_mm.hf.config_io import WAITS, activate, entries, fill_learned, is_pending, pending
from rope_mm.hf.inspection import APPLY, OF_WORDS, modules_using, read_module
from rope_mm.hf.position_ids import METHODS, methods_of
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding, RotarySlot, describe, rotary_slots
from rope_mm.hf.vision_positions import PIXELS


@dataclass(frozen=True)
class Handle:
    """What `set_rope` or `use_kernels` did to a model; `undo` takes it back.

    Raises:
        ValueError: from `undo`, a model of which nothing of it is left.
    """

    model: nn.Module
    places: list[tuple[RopeMMRotaryEmbedding, int]]  # and how many of its changes are older

    def undo(self) -> None:
        """Restore what was there before, and with it what came later."""
        nothing = f"{type(self.model).__name__} has no rope of ours to take back"
        refuse({nothing: all(len(rotary.undo) <= left for rotary, left in self.places)})
        for rotary, left in self.places:
            rotary.take_back(left)


@contextmanager
def all_or_nothing(handle: Handle, what: str) -> Iterator[None]:
    """Take changes back where one of them fails, and say why."""
    try:
        yield
    except Exception as error:
        for rotary, left in handle.places:
            rotary.take_back(left)
        raise ValueError(f"{what} ({type(error).__name__}: {error}); the model is as it was") from error


def ropes_of(site: RotarySlot) -> dict[str | None, Any]:
    """What a site runs, for each type of layer; angles that are not linear in position are refused."""
    if site.ours:
        return dict(site.module.runs)
    refuse({WAITS: pending(site.module, getattr(site.owner, "config", None))})
    ropes = read_module(site.module, site.owner)
    for bent in filter(None, (rope.bent for rope in ropes.values())):
        raise ValueError(
            f"{type(site.module).__name__} {bent}, so it is no positions @ Omega; give set_rope a scheme, "
            "with a fixed extension such as YaRN where contexts are long"
        )
    return ropes


def rope_of(model: nn.Module) -> Any:
    """What a model runs: a ModelRope, the Rotary it was given, or a dict of them where layers differ.

    Of a composite model it is its text's; give the tower itself for its own.

    Raises:
        ValueError: no rotary, angles that are not linear in position, or parts that differ.
    """
    found = [ropes_of(site) for site in rotary_slots(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with inv_freq, so no rotary that can be read")
    if any(other != found[0] for other in found):
        names = ", ".join(site.name for site in rotary_slots(model))
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
    places = rotary_slots(model) or [bare_site(model)]
    if any(site.ours for site in places):
        raise ValueError(f"{type(model).__name__} has a rope of ours already; `unset_rope` it first")
    swaps = [(site, make_stand_in(site, scheme, changes)) for site in places]
    refuse_learned(model, swaps)
    for site, rotary in swaps if scheme is None else ():
        for key, learned in rotary.learned.named_parameters("learned"):
            folder = getattr(model, "name_or_path", "")
            fill_learned(learned, folder, f"{site.name}.{key}", f"{site.leaf}.{key}")
    handle = Handle(model, [(rotary, 0) for _, rotary in swaps])
    with all_or_nothing(handle, f"{type(model).__name__} cannot run what set_rope gave it"):
        for site, rotary in swaps:
            install(site, rotary)
            rotary.alone = bool(rotary.learned) and not methods_of(model)
            for part, name in methods_of(model) if rotary.learned else ():
                rotary.put(part, name, MethodType(METHODS[name], part))
    return handle


def refuse_learned(model: nn.Module, swaps: list[tuple[RotarySlot, RopeMMRotaryEmbedding]]) -> None:
    """Refuse learned Omegas that would not be saved."""
    learned = [rope for _, rotary in swaps for rope in rotary.learned if any(True for _ in rope.parameters())]
    adapted = any(type(part).__module__.startswith("peft.") for part in model.modules())
    late = (
        "adapters that are there already would not save a learned Omega; set_rope first, and then tell peft "
        f"modules_to_save=[{swaps[0][0].leaf!r}]"
    )
    shared = "one learned Omega cannot be saved for several types of layers; give one Rotary for each of them"
    refuse({late: learned and adapted, shared: len(set(learned)) < len(learned)})


def install(site: RotarySlot, rotary: RopeMMRotaryEmbedding) -> None:
    """Put our module in its place, its scheme in the config, and hooks around the owner's forward."""
    owner, config = site.owner, rotary.config
    waited = is_pending(getattr(owner, "config", None))
    rotary.put(owner, site.leaf, rotary)
    if config and len(rotary.learned) == len(rotary.runs):
        schemes: Any = {layer: rope.scheme for layer, rope in rotary.runs.items()}
        for name, value in entries(config, schemes, by_rope=rotary.call in OF_WORDS).items():
            rotary.put(config, name, value)
    if waited:
        activate(owner)
    if not site.module:
        return tell_attention(owner, rotary)
    rotary.undo.append(owner.register_forward_pre_hook(rotary.split_positions, with_kwargs=True).remove)
    rotary.undo.append(owner.register_forward_hook(rotary.mark_cache, with_kwargs=True).remove)


def unset_rope(model: nn.Module) -> None:
    """Give a model, with all of its parts, its own rotary modules back.

    Raises:
        ValueError: a model that has them already.
    """
    Handle(model, [(site.module, 0) for site in rotary_slots(model, every=True) if site.ours]).undo()


def use_kernels(model: nn.Module) -> Handle:
    """Rotate queries and keys of a decoder or a DINOv3 by our op: a kernel on a GPU, else the definition.

    A small forward before and after proves that our path runs and agrees; `undo` takes the model's rope back.

    Raises:
        ValueError: a family whose attention calls no function that can be replaced, or answers that differ;
            the model is as it was.
    """
    places = rotary_slots(model)
    found = [module for site in places for module in modules_using(site.owner, APPLY)]
    kinds = {type(module).__name__ for module in found}
    name, own = ", ".join(sorted(kinds)) or type(model).__name__, [vars(module) for module in found]
    replaced = any("forward" in names and "_old_forward" not in names for names in own)
    refuse(
        {
            f"{name} rotate in their own ways, and our op has one for all": len(kinds) > 1,
            f"{name} has no attention with a rotary function of its own to replace": not found,
            f"{name} rotates by our op already; undo that first": any(
                site.ours and site.module.turns for site in places
            ),
            f"{name} has had its forward replaced; call use_kernels before that": replaced,
        }
    )
    if fresh := not any(site.ours for site in places):
        set_rope(model, rope_of(model))
    places = rotary_slots(model)
    handle = Handle(model, [(site.module, 0 if fresh else len(site.module.undo)) for site in places])
    with all_or_nothing(handle, f"{name} cannot rotate by our op"):
        towers = [site.name for site in places if site.module.call not in (*OF_WORDS, PIXELS)]
        refuse({f"{', '.join(towers)} is told rows and columns, not words or an image": towers})
        before = [probe(site.owner) for site in places]
        for site in places:
            site.module.put(site.module, "turns", True)
            exchange(site.module, site.owner, APPLY, rotate_both)
        for site, answers in zip(places, before, strict=True):
            check_same(answers, probe(site.owner))
    return handle


def explain(model: nn.Module) -> None:
    """Print what each rotary place of a model runs."""
    for site in rotary_slots(model, every=True):
        bare = site.ours and not site.module.asked
        name = f"{len(modules_using(site.owner, ATTEND))} attention modules" if bare else site.name
        how = "our op" if site.ours and site.module.turns else "the model's own function"
        try:
            told = {layer: describe(rope) for layer, rope in ropes_of(site).items()}
        except ValueError as error:
            told = {None: str(error)}
        for layer, what in told.items():
            print(f"{name}{f' ({layer})' if layer else ''}: {what}; applied by {how}")
