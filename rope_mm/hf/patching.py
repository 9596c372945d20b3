"""A model's rotary module replaced by one that runs a scheme, and put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from rope_mm.checks.arguments import parameters_of
from rope_mm.hf.attention_rotation import (
    attention_slot,
    exchange,
    rotate_both,
    rotate_in_attention,
)
from rope_mm.hf.build_rotary import make_rotary, refuse
from rope_mm.hf.config_io import (
    PENDING_MESSAGE,
    load_learned_omega,
    save_schemes,
    saved_bias,
    saved_schemes,
    waits_for_scheme,
    wake_slots,
)
from rope_mm.hf.dry_run import can_be_probed, check_equal_answers, probe, prove_call
from rope_mm.hf.image_positions import PIXELS
from rope_mm.hf.other_libraries.diffusers_attention import AttentionRotary
from rope_mm.hf.other_libraries.table_rotary import (
    TableRotary,
    describe_rope,
    explain_tables,
    makes_tables,
    rope_of_tables,
    rotary_of,
    set_table_rope,
)
from rope_mm.hf.position_hooks import PositionHooks
from rope_mm.hf.position_ids import METHODS, position_methods
from rope_mm.hf.relative_bias import refuse_choice
from rope_mm.hf.rotary_embedding import Changes, RopeMMRotaryEmbedding, RotarySlot, describe, rotary_slots
from rope_mm.hf.rotary_inspection import (
    APPLY_FUNCTION,
    TOKEN_CALLS,
    frequency_counts,
    modules_using,
    read_module,
    rotates_one_by_one,
)
from rope_mm.hf.unrotated_modules import cross_attentions, untouched_parts


@dataclass(frozen=True, repr=False)
class Handle:
    """What `set_rope` or `use_kernels` changed in a model; `undo` reverts it.

    Attributes:
        model: the model that was changed.
        slots: the rotary modules now in it, each with the number of its changes before this handle.

    Raises:
        ValueError: from `undo`, if nothing of this change is left in the model.
    """

    model: nn.Module
    slots: list[tuple[RopeMMRotaryEmbedding | TableRotary | AttentionRotary, int]]

    def undo(self) -> None:
        """Revert this change and every later one."""
        nothing = f"{type(self.model).__name__} has no rope of ours to take back"
        refuse({nothing: all(len(rotary.undo) <= older for rotary, older in self.slots)})
        for rotary, older in reversed(self.slots):  # modules may share a config, which each has changed
            rotary.restore(older)

    def __repr__(self) -> str:
        active = [rotary for rotary, older in self.slots if len(rotary.undo) > older]
        ropes = {
            (describe if isinstance(rotary, RopeMMRotaryEmbedding) else describe_rope)(rope): None
            for rotary, _ in self.slots
            for rope in rotary.ropes.values()
        }
        state = f"in {len(active)} rotary module{'s' * (len(active) != 1)}" if active else "undone"
        return f"<Handle of {type(self.model).__name__}, {state}: {'; '.join(ropes)}>"


@contextmanager
def all_or_nothing(handle: Handle, what: str) -> Iterator[None]:
    """Revert every change if one of them fails, and say why."""
    try:
        yield
    except Exception as error:
        for rotary, older in reversed(handle.slots):
            rotary.restore(older)
        raise ValueError(f"{what} ({type(error).__name__}: {error}); the model is as it was") from error


def ropes_of(site: RotarySlot) -> dict[str | None, Any]:
    """What a slot runs, for each layer type; angles that are not linear in position are refused."""
    if site.ours:
        return dict(site.module.ropes)
    refuse({PENDING_MESSAGE: waits_for_scheme(site.module, getattr(site.owner, "config", None))})
    ropes = read_module(site.module, site.owner)
    for reason in filter(None, (rope.nonlinear_reason for rope in ropes.values())):
        raise ValueError(
            f"{type(site.module).__name__} {reason}, so it is no positions @ Omega; give set_rope a scheme, "
            "with a fixed extension such as YaRN where contexts are long"
        )
    return ropes


def rope_of(model: nn.Module) -> Any:
    """Read what a model rotates by.

    Args:
        model: a model of transformers, diffusers or timm; of a composite model its text is meant, so give a
            tower itself.

    Returns:
        A ModelRope, or of diffusers and timm a TableRope, or the Rotary that `set_rope` put in, or a dict of
        them by layer type.

    Raises:
        ValueError: no rotary, angles that are not linear in position, or parts that differ.
    """
    if makes_tables(model):
        return rope_of_tables(model)
    found = [ropes_of(site) for site in rotary_slots(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with inv_freq, so no rotary that can be read")
    if any(other != found[0] for other in found):
        names = ", ".join(site.name for site in rotary_slots(model))
        raise ValueError(
            f"{type(model).__name__} rotates in several ways, at {names}; give one of these parts"
        )
    return found[0][None] if list(found[0]) == [None] else found[0]


def set_rope(
    model: nn.Module,
    scheme: Any = None,
    layout: str | None = None,
    relative_bias: str | None = None,
    **changes: Any,
) -> Handle:
    """Let a live model rotate by a scheme; `handle.undo()` or `unset_rope` reverts it.

    Args:
        model: a decoder, a vision-language model (its text is meant), a tower, a model without rotary, or the
            transformer of a diffusion pipeline.
        scheme: a key of SCHEMES, a Scheme, a Rotary, what `rope_of` gave, or a dict of them by layer type;
            None for the one with which the model was saved.
        layout: another layout than the scheme's.
        relative_bias: of a model that adds a bias of relative positions to its scores (T5, BEiT, Swin):
            "keep" it beside the rotation, or "drop" it.
        changes: fields of the scheme to replace.

    Returns:
        A handle whose `undo` reverts the change.

    Raises:
        ValueError: what the model cannot run, with the reason; the model is as it was.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> llama = LlamaForCausalLM(config)
        >>> handle = set_rope(llama, "rope-tv")
        >>> rope_of(llama).scheme.layout
        'rope-tv'
        >>> handle.undo()
    """
    changes |= {"layout": layout} if layout else {}
    if makes_tables(model):
        refuse_choice(model, relative_bias)
        return Handle(model, [(set_table_rope(model, scheme, changes), 0)])
    slots = rotary_slots(model) or [attention_slot(model)]
    if any(site.ours for site in slots):
        raise ValueError(f"{type(model).__name__} has a rope of ours already; `unset_rope` it first")
    if slots[0].module:
        refuse_choice(model, relative_bias)
    given = [saved_schemes(site) if scheme is None else scheme for site in slots]
    relative_bias = relative_bias or (saved_bias(slots[0]) if scheme is None else None)
    handle, woken = Handle(model, []), Changes()
    try:
        slots = wake_slots(model, slots, woken)
        swaps = [(site, make_rotary(site, one, changes)) for site, one in zip(slots, given, strict=True)]
        check_learned(model, swaps)
        for site, rotary in swaps if scheme is None else ():
            for key, learned in rotary.learned.named_parameters("learned"):
                folder = getattr(model, "name_or_path", "")
                load_learned_omega(learned, folder, f"{site.name}.{key}", f"{site.leaf}.{key}")
        handle.slots.extend((rotary, 0) for _, rotary in swaps)
        with all_or_nothing(handle, f"{type(model).__name__} cannot run what set_rope gave it"):
            install_all(model, swaps, relative_bias)
    except ValueError:
        woken.restore()
        raise
    except Exception as error:
        woken.restore()
        cannot = f"{type(model).__name__} cannot run what set_rope gave it"
        raise ValueError(f"{cannot} ({type(error).__name__}: {error}); the model is as it was") from error
    return handle


def check_learned(model: nn.Module, swaps: list[tuple[RotarySlot, RopeMMRotaryEmbedding]]) -> None:
    """Refuse learned Omegas that would not be saved."""
    learned = [rope for _, rotary in swaps for rope in rotary.learned if any(True for _ in rope.parameters())]
    adapted = any(type(part).__module__.startswith("peft.") for part in model.modules())
    late = (
        "adapters that are there already would not save a learned Omega; set_rope first, and then give peft "
        f"modules_to_save=[{swaps[0][0].leaf!r}]"
    )
    shared = "one learned Omega cannot be saved for several types of layers; give one Rotary for each of them"
    refuse({late: learned and adapted, shared: len(set(learned)) < len(learned)})


def install_all(
    model: nn.Module, swaps: list[tuple[RotarySlot, RopeMMRotaryEmbedding]], relative_bias: str | None
) -> None:
    """Put our modules in their slots, hook positions, and prove by small forwards that they are called."""
    provable = [site for site, _ in swaps if site.module and can_be_probed(site.owner)]
    for site, rotary in swaps:
        install(site, rotary, relative_bias)
    hook_positions(model, [swap for swap in swaps if swap[0].module])
    for site, rotary in swaps:
        if site in provable:
            prove_call(site.owner, rotary)


def install(site: RotarySlot, rotary: RopeMMRotaryEmbedding, relative_bias: str | None) -> None:
    """Put our module in its slot, its scheme in the config, and hooks around the owner's forward."""
    owner, config = site.owner, rotary.config
    rotary.set_attr(owner, site.leaf, rotary)
    rotary.relative_bias = relative_bias
    if config and len(rotary.learned) == len(rotary.ropes):
        schemes: Any = {layer: rope.scheme for layer, rope in rotary.ropes.items()}
        save_schemes(rotary, schemes, frequency_counts(site.module))
    if not site.module:
        rotate_in_attention(owner, rotary, relative_bias)


def hook_positions(model: nn.Module, swaps: list[tuple[RotarySlot, RopeMMRotaryEmbedding]]) -> None:
    """Put hooks around the forwards that pass positions to our rotary modules, and set our methods.

    One stack of layers has one set of positions; an encoder and its decoder have one each.
    """
    apart = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    stacks = [[swap] for swap in swaps] if apart else [swaps] if swaps else []
    for stack in stacks:
        rotary = stack[0][1]
        scheme = rotary.first.scheme if rotary.learned else None
        methods = position_methods(model) if scheme else []
        modules = {id(part): part for site, _ in stack for part in forwards_above(model, site, apart)}
        hooks = PositionHooks([one for _, one in stack], scheme, bool(scheme) and not methods)
        hooks.install(list(modules.values()), rotary)
        for part, name in methods:
            rotary.set_attr(part, name, MethodType(METHODS[name], part))


def forwards_above(model: nn.Module, site: RotarySlot, apart: bool) -> list[nn.Module]:
    """The modules from the model to a slot's owner whose forward takes position_ids, and the owner."""
    path = site.name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    takers = [part for part in above if "position_ids" in parameters_of(type(part))]
    return [*([] if apart else takers), site.owner]


def unset_rope(model: nn.Module) -> None:
    """Give a model and all of its parts their own rotary modules back.

    Raises:
        ValueError: a model that has them already.
    """
    if makes_tables(model):
        Handle(model, [(rotary, 0)] if (rotary := rotary_of(model)) else []).undo()
        return
    Handle(model, [(site.module, 0) for site in rotary_slots(model, every=True) if site.ours]).undo()


def use_kernels(model: nn.Module) -> Handle:
    """Rotate queries and keys of a decoder or a DINOv3 by our op: a kernel on a GPU, else the definition.

    A small forward before and after proves that our path runs and agrees.

    Returns:
        A handle whose `undo` gives the model its own function back.

    Raises:
        ValueError: a family whose attention calls no function that can be replaced, or answers that differ;
            the model is as it was.
    """
    no_op = f"{type(model).__name__} rotates by its own function, where our op has no place; use set_rope"
    refuse({no_op: makes_tables(model)})
    slots = rotary_slots(model)
    found = [module for site in slots for module in modules_using(site.owner, APPLY_FUNCTION)]
    kinds = {type(module).__name__ for module in found}
    name, own = ", ".join(sorted(kinds)) or type(model).__name__, [vars(module) for module in found]
    replaced = any("forward" in names and "_old_forward" not in names for names in own)
    refuse(
        {
            f"{name} rotate in their own ways, and our op has one for all": len(kinds) > 1,
            f"{name} has no attention with a rotary function of its own to replace": not found,
            f"{name} rotates queries and keys in two calls, and our op takes both in one; take set_rope": any(
                map(rotates_one_by_one, found)
            ),
            f"{name} rotates by our op already; undo that first": any(
                site.ours and site.module.use_op for site in slots
            ),
            f"{name} has had its forward replaced; call use_kernels before that": replaced,
        }
    )
    if fresh := not any(site.ours for site in slots):
        set_rope(model, rope_of(model))
    slots = rotary_slots(model)
    handle = Handle(model, [(site.module, 0 if fresh else len(site.module.undo)) for site in slots])
    with all_or_nothing(handle, f"{name} cannot rotate by our op"):
        towers = [site.name for site in slots if site.module.call_format not in (*TOKEN_CALLS, PIXELS)]
        refuse({f"{', '.join(towers)} is given rows and columns, not tokens or an image": towers})
        before = [probe(site.owner) for site in slots]
        for site in slots:
            site.module.set_attr(site.module, "use_op", True)
            exchange(site.module, site.owner, APPLY_FUNCTION, rotate_both)
        for site, answers in zip(slots, before, strict=True):
            check_equal_answers(answers, probe(site.owner))
    return handle


def explain(model: nn.Module) -> None:
    """Print one line for each rotary module of a model: what it runs and what applies it.

    Of a model that we changed, what the scheme leaves as it is follows: cross-attention, biases of relative
    positions and learned position embeddings.
    """
    if makes_tables(model):
        print(explain_tables(model))
        return
    for site in rotary_slots(model, every=True):
        bare = site.ours and not site.module.interfaces
        name = f"{site.module.rotating} attention modules" if bare else site.name
        how = "our op" if site.ours and site.module.use_op else "the model's own function"
        try:
            lines = {layer: describe(rope) for layer, rope in ropes_of(site).items()}
        except ValueError as error:
            lines = {None: str(error)}
        for layer, what in lines.items():
            print(f"{name}{f' ({layer})' if layer else ''}: {what}; applied by {how}")
        if site.ours:
            crossing = site.module.crossing + len(cross_attentions(site.owner))
            for line in untouched_parts(site.owner, crossing, site.module.relative_bias == "drop"):
                print(line)
