"""Attention modules whose forward sees other globals, one instance at a time.

This is how a model without rotary gets one, and how our op replaces a model's own rotary function.
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm.checks.arguments import parameters_of
from rope_mm.hf.attention_positions import (
    AttentionCall,
    AttentionContext,
    ForwardHooks,
    ReadCall,
    query_key_positions,
    reads_images,
)
from rope_mm.hf.dry_run import find_first_patch, probe
from rope_mm.hf.own_attention import own_methods
from rope_mm.hf.projection_rotation import hook_projections, projected_attentions, prove_projections
from rope_mm.hf.relative_bias import DroppedBias, settle_bias
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding, RotarySlot
from rope_mm.hf.rotary_inspection import ATTENTION_REGISTRY, globals_used, modules_using
from rope_mm.rotary.dispatch import RotaryAngles

OWN_ROTATION = re.compile(r"rotary|rotate_|freqs_ci|(^|_)rope(_|$)")  # names in the code of such an attention


CLONES: WeakValueDictionary[Any, Any] = WeakValueDictionary()  # while a model uses them, and no longer


def clone(f: Callable[..., Any], names: tuple[str, ...], value: Any) -> Callable[..., Any]:
    """The function f that sees `value` where it saw the globals `names`.

    torch.compile looks globals up by the name of a function's module, so each clone has its own module in
    `sys.modules`, which goes with the clone.
    """
    f = inspect.unwrap(f)
    if (known := CLONES.get((f, names, value))) is not None:
        return known
    module = ModuleType(f"{f.__module__}.{f.__qualname__}.{id(value):x}")
    vars(module).update({**f.__globals__, **dict.fromkeys(names, value), "__name__": module.__name__})  # pyright: ignore
    sys.modules[module.__name__] = module
    code: Any = f
    copy = FunctionType(code.__code__, vars(module), f.__name__, code.__defaults__, code.__closure__)
    copy.__kwdefaults__, copy.__module__ = code.__kwdefaults__, module.__name__
    finalize(copy, sys.modules.pop, module.__name__, None)
    CLONES[f, names, value] = copy
    return copy


def put_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a module a forward, or its class's again; behind the hook of accelerate, where there is one."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(forward or type(module).forward, module)
    elif forward:
        vars(module)["forward"] = MethodType(forward, module)
    else:
        vars(module).pop("forward", None)


def exchange(rotary: RopeMMRotaryEmbedding, owner: nn.Module, pattern: re.Pattern[str], value: Any) -> None:
    """Let modules see `value` where their forward saw such globals, and record how to undo it."""
    for module in modules_using(owner, pattern):
        put_forward(module, clone(type(module).forward, tuple(globals_used(module, pattern)), value))
        rotary.undo.append(partial(put_forward, module, None))


class RotatingAttention:
    """Replaces ALL_ATTENTION_FUNCTIONS, and rotates q and k (b, h, s, d) before the attention."""

    @staticmethod
    def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The attention of that name, of rotated q and k."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)

        def rotated(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any):
            context, call = module.rope_mm_context, module.rope_mm_call
            if call.cross:
                context.note("cross", module)
                return attend(module, q, k, *args, **kwargs)
            context.note("rotated", module)
            q, k = rotate_queries_keys(context, call, q, k)
            return attend(module, q, k, *args, **kwargs)

        return rotated


def rotate_queries_keys(context: Any, call: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q (b, h, s, d) and k (b, g, n, d) of one call, rotated; the cache holds keys that are not rotated."""
    p, p_k = query_key_positions(context, call, q.shape[2], k.shape[2], k.device)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = context.rotary(q, k, p) if p is p_k else context.rotary(q, k, p, p_k)
    return q.transpose(1, 2), k.transpose(1, 2)


def attention_modules(owner: nn.Module) -> list[nn.Module]:
    """Attention modules that can rotate: in their interface, or else behind their projections."""
    return [*modules_using(owner, ATTENTION_REGISTRY), *projected_attentions(owner)]


def attention_slot(model: Any) -> RotarySlot:
    """The slot for a rotary in a model without one, beside the layers of its attention.

    Raises:
        ValueError: no attention that can be changed, several models in one, or a rotation of another kind.
    """
    base, found = model, attention_modules(model)
    while (inner := getattr(base, "base_model", base)) is not base:  # in its adapters, and in its head
        base = inner
    if hasattr(base, "query_position_embeddings"):
        raise ValueError(
            f"{type(model).__name__} attends from object queries, which stand nowhere, to a map of features "
            "whose rows and columns its attention is not given; it is not served"
        )
    within = {id(module) for module in base.modules()}
    kinds = {type(config) for config in configs_of(model, found)}
    one = found and kinds == {type(getattr(base, "config", None))}
    if not one or not all(id(module) in within for module in found):
        parts = ", ".join(name for name, part in model.named_children() if attention_modules(part))
        raise ValueError(
            f"{type(model).__name__} has neither a rotary module nor one stack of attention to rotate"
            + (f"; give one of its parts: {parts}" if parts else "")
        )
    refuse_own_rotation(base)
    return RotarySlot("rope_mm", base, "rope_mm", None)


def configs_of(model: nn.Module, modules: list[nn.Module]) -> list[Any]:
    """The configs that modules of a model follow: their own, or that of the nearest module around them."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for module in modules:
        path = names[id(module)].split(".")
        around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1))
        found.append(next((part.config for part in around if hasattr(part, "config")), None))
    return found


def refuse_own_rotation(base: Any) -> None:
    """Refuse a model that rotates without a module with inv_freq: ours would rotate on top of it.

    Its attention names a rotation in its code, and without a mask its outputs do not move with its inputs.

    Raises:
        ValueError: with the attention's name.
    """
    if getattr(base.config, "rotary_value", False):
        raise ValueError(
            f"{type(base).__name__} rotates its values too (rotary_value), which no scheme does; it is not "
            "served"
        )
    own = [module for module in attention_modules(base) if not own_methods(module)]
    named = [module for module in own if names_rotation(type(module))]
    if named and (base.device.type == "meta" or not moves_with_inputs(base, named[0])):
        raise ValueError(
            f"{type(named[0]).__name__} sees by itself where tokens stand, and its code names a rotation "
            "without a module with inv_freq, so a scheme might rotate twice; it is not served"
        )


def names_rotation(kind: type) -> bool:
    """Whether the code of a class names a rotation."""
    methods = [inspect.unwrap(f) for f in vars(kind).values() if callable(f)]
    codes = [f.__code__ for f in methods if hasattr(f, "__code__")]
    names = [name for code in codes for name in (*code.co_names, *code.co_varnames)]
    return any(map(OWN_ROTATION.search, names))


@torch.no_grad()
def moves_with_inputs(base: Any, attention: Any) -> bool:
    """Whether an attention without a mask gives each token the same wherever it stands."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    causal = getattr(attention, "is_causal", None)
    hook = attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        probe(base)
    finally:
        hook.remove()
    args, kwargs = calls[0]
    states = args[0] if args else kwargs["hidden_states"]
    rest = {
        name: None if "mask" in name or "cache" in name or "past" in name else x for name, x in kwargs.items()
    }
    order = torch.arange(states.shape[1] - 1, -1, -1, device=states.device)

    def attend(x: Tensor) -> Tensor:
        given = ((x, *args[1:]), rest) if args else ((), {**rest, "hidden_states": x})
        return attention(*given[0], **given[1])[0]

    try:
        if causal is not None:
            attention.is_causal = False
        one, other = attend(states)[:, order], attend(states[:, order])
    finally:
        if causal is not None:
            attention.is_causal = causal
    return bool((one - other).norm() <= 1e-3 * one.norm())


def rotate_in_attention(base: Any, rotary: RopeMMRotaryEmbedding, relative_bias: str | None) -> None:
    """Let a model's attention rotate by the module beside its layers, and prove that it does.

    Raises:
        ValueError: a bias of relative positions about which the caller says nothing, or an attention that the
            change does not reach.
    """
    dropped = settle_bias(base, relative_bias, rotary)
    rope: Any = rotary.ropes[None]
    context = AttentionContext(rope, reads_images(base))
    by_interface, by_projection = modules_using(base, ATTENTION_REGISTRY), projected_attentions(base)
    attentions = [*by_interface, *by_projection]
    rotary.rotating = len(attentions)
    there = base.device.type != "meta"
    for module in attentions:
        for name, function in own_methods(module).items():
            rotary.set_attr(module, name, partial(function, module))
    before = probe(base) if by_projection and there else []
    hook_forward(base, rotary, context)
    for module in attentions:
        rotary.set_attr(module, "rope_mm_call", AttentionCall())
    exchange(rotary, base, ATTENTION_REGISTRY, RotatingAttention)
    for module in by_interface:
        rotary.set_attr(module, "rope_mm_context", context)
        rotary.undo.append(module.register_forward_pre_hook(ReadCall(module), with_kwargs=True).remove)
    for module in by_projection:
        hook_projections(module, rotary, context, rope.head_dim)
    if there:
        context.first_patch = find_first_patch(base, attentions) if context.of_images else None
        rotary.crossing = prove_attention(base, context, attentions, dropped)
        rotary.rotating -= rotary.crossing
    if before:
        prove_projections(base, context, before, rope.head_dim)


def hook_forward(base: Any, rotary: RopeMMRotaryEmbedding, context: AttentionContext) -> None:
    """Put hooks around a model's forward, which keep what its attentions must know."""
    hooks = ForwardHooks(context, base)
    rotary.undo.append(base.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
    rotary.undo.append(base.register_forward_hook(hooks.after, always_call=True).remove)
    if "noise" in parameters_of(type(base)) and hasattr(base, "embeddings"):
        rotary.undo.append(base.embeddings.register_forward_hook(hooks.keep_shuffled).remove)


def prove_attention(
    base: Any, context: AttentionContext, attentions: list[nn.Module], dropped: list[DroppedBias]
) -> int:
    """Run a small forward, to see that every attention rotates, or that its keys are of another sequence.

    Returns:
        How many attentions rotate nothing, as their keys are of another sequence.

    Raises:
        ValueError: with the attention that is not reached; or whatever the forward raises.
    """
    context.calls = {}
    try:
        probe(base)
        calls = context.calls
    finally:
        context.calls = None
    reached = {id(module) for modules in calls.values() for module in modules}
    missed = sorted({type(module).__name__ for module in attentions if id(module) not in reached})
    if missed or not calls.get("rotated"):
        raise ValueError(f"{', '.join(missed) or type(base).__name__} is not reached, so it is not served")
    if not all(hook.calls for hook in dropped):
        raise ValueError("a bias of relative positions is read past the module that holds it; keep it")
    rotated = {id(module) for module in calls["rotated"]}
    return len(reached - rotated)


def rotate_both(
    q: Tensor,
    k: Tensor,
    angles: RotaryAngles,
    _same: RotaryAngles | None = None,
    unsqueeze_dim: int = 1,
    **_: Any,
):
    """Replaces `apply_rotary_pos_emb`.

    Args:
        q: queries (b, h, s, d), or (b, s, h, d) where `unsqueeze_dim` is not 1.
        k: keys (b, g, s, d), or (b, s, g, d).
        angles: angles of the last tokens; those before them, such as class tokens, are not rotated.
        unsqueeze_dim: the axis of the heads.
    """
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    start = q.shape[1] - angles.tokens
    if start:
        q_rotated, k_rotated = angles.rotate(q[:, start:], k[:, start:])
        q, k = torch.cat((q[:, :start], q_rotated), 1), torch.cat((k[:, :start], k_rotated), 1)
    else:
        q, k = angles.rotate(q, k)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)
