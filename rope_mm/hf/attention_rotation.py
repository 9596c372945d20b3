"""Attention modules whose forward sees other globals, one instance at a time.

This is how a model without rotary gets one, and how our op replaces a model's own rotary function.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm.hf.patch_positions import image_size, patch_grid, place_tokens
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding, RotarySlot
from rope_mm.hf.rotary_inspection import APPLY_FUNCTION, globals_used, modules_using
from rope_mm.rotary.dispatch import RotaryAngles

ATTENTION_REGISTRY = re.compile("ALL_ATTENTION_FUNCTIONS$")
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
            rope, grid = module.rope_mm_context
            if q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"{q.shape[2]} queries meet {k.shape[2]} keys, as with a cache, and this rotation then "
                    "does not know where they stand; pass use_cache=False"
                )
            p = place_tokens(rope.scheme, k.shape[2], grid, k.device)
            q, k = (x.transpose(1, 2) for x in rope(q.transpose(1, 2), k.transpose(1, 2), p))
            return attend(module, q, k, *args, **kwargs)

        return rotated


def pass_positions(model: Any, args: tuple, kwargs: dict[str, Any]):
    """Before a model's forward: pass its rotary and the image's grid along with the arguments."""
    grid, pixels = None, kwargs.get("pixel_values", args[0] if args else None)
    if model.main_input_name == "pixel_values" and pixels is not None:
        grid = patch_grid(model.config, pixels)
    return args, {**kwargs, "rope_mm": (model.rope_mm.ropes[None], grid)}


def receive_positions(attention: Any, args: tuple, kwargs: dict[str, Any]):
    """Before an attention's forward: take what its model passed, also when checkpointing calls it again."""
    if "rope_mm" not in kwargs:
        raise ValueError(
            f"{type(attention).__name__} got no positions: its model does not pass arguments on to it, "
            "so it is not served"
        )
    attention.rope_mm_context = kwargs["rope_mm"]
    return args, {name: value for name, value in kwargs.items() if name != "rope_mm"}


def attention_slot(model: Any) -> RotarySlot:
    """The slot for a rotary in a model without one, beside the layers of its one stack of attention."""
    base, found = model, modules_using(model, ATTENTION_REGISTRY)
    while (inner := getattr(base, "base_model", base)) is not base:  # in its adapters, and in its head
        base = inner
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder without rotary; encoder-decoders with position "
            "embeddings or relative biases, such as BART and T5, are not served"
        )
    if not hasattr(base, "config") or len({id(getattr(module, "config", None)) for module in found}) != 1:
        parts = ", ".join(
            name for name, part in model.named_children() if modules_using(part, ATTENTION_REGISTRY)
        )
        raise ValueError(
            f"{type(model).__name__} has neither a rotary module nor one stack of attention to rotate"
            + (f"; give one of its parts: {parts}" if parts else "")
        )
    refuse_own_rotation(base)
    return RotarySlot("rope_mm", base, "rope_mm", None)


def refuse_own_rotation(base: Any) -> None:
    """Refuse a model that rotates without a module with inv_freq: ours would rotate on top of it.

    Its attention names a rotation in its code, and without a mask its outputs do not move with its inputs.

    Raises:
        ValueError: with the attention's name.
    """
    named = [module for module in modules_using(base, ATTENTION_REGISTRY) if names_rotation(type(module))]
    if named and (base.device.type == "meta" or not moves_with_inputs(base, named[0])):
        raise ValueError(
            f"{type(named[0]).__name__} rotates by tables of its own and not by a module with inv_freq, so "
            "it would rotate twice; it is not served"
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


def rotate_in_attention(base: nn.Module, rotary: RopeMMRotaryEmbedding) -> None:
    """Let a model's attention rotate by the module beside its layers."""
    rotary.undo.append(base.register_forward_pre_hook(pass_positions, with_kwargs=True).remove)
    exchange(rotary, base, ATTENTION_REGISTRY, RotatingAttention)
    for module in modules_using(base, ATTENTION_REGISTRY):
        rotary.set_attr(module, "rope_mm_context", None)
        rotary.undo.append(module.register_forward_pre_hook(receive_positions, with_kwargs=True).remove)
    if base.device.type != "meta":
        probe(base)


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


def probe_inputs(owner: Any) -> dict[str, Any]:
    """Inputs of a probe: noise for 8 tokens, 8 token ids, or an image of 2 x 3 patches or of its own size."""
    config, generator = owner.config, torch.Generator().manual_seed(0)
    if owner.main_input_name == "pixel_values":
        free = modules_using(owner, APPLY_FUNCTION)  # from tables of positions, which fit one size
        image = image_size(config, 2, 3) if free else getattr(config, "image_size", image_size(config, 2, 3))
        y, x = image if isinstance(image, Iterable) else (image, image)
        name, size = "pixel_values", (getattr(config, "num_channels", 3), y, x)
    elif "inputs_embeds" in inspect.signature(type(owner).forward).parameters:
        name, size = "inputs_embeds", (8, owner.get_input_embeddings().weight.shape[-1])
    elif owner.main_input_name == "input_values":  # a wave of sound, long enough for all convolutions
        name, size = "input_values", (64 * math.prod(getattr(config, "conv_stride", (8,))),)
    elif owner.main_input_name == "input_ids":
        return {"input_ids": torch.arange(8, device=owner.device)[None]}
    else:
        raise ValueError(
            f"{type(owner).__name__} reads {owner.main_input_name}, for which there is no probe to prove "
            "the change; it is not served"
        )
    noise = torch.randn(1, *size, generator=generator).to(owner.device, owner.dtype)
    return {name: noise, "use_cache": False} if name == "inputs_embeds" else {name: noise}


@torch.no_grad()
def probe(owner: Any) -> list[Tensor]:
    """Outputs of a small forward: of the first attention that calls a rotary function, and of the model."""
    modes, recorded = [(module, module.training) for module in owner.modules()], []
    first = modules_using(owner, APPLY_FUNCTION)[:1]
    hooks = [module.register_forward_hook(lambda *call: recorded.append(call[-1][0])) for module in first]
    try:
        stream = owner.eval()(**probe_inputs(owner))[0]
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return [*recorded, stream if isinstance(stream, Tensor) else stream[-1]]  # of a backbone's maps the last


def check_equal_answers(before: list[Tensor], after: list[Tensor]) -> None:
    """Refuse outputs of a first attention, or of a model, that differ by more than rounding."""
    for times, one, other in zip((8, 256), before, after, strict=True):
        error, eps = ((one - other).norm() / one.norm()).item(), torch.finfo(one.dtype).eps
        if not error <= times * eps:
            raise ValueError(f"the outputs of the probe differ by {error:.1e} of their norm")


def can_be_probed(owner: Any) -> bool:
    """Whether a small forward runs on a part as it is."""
    tensors = [*owner.parameters(), *owner.buffers()]
    if any(x.is_meta for x in tensors) or not hasattr(owner, "main_input_name"):
        return False
    if any(hasattr(x, "placements") for x in tensors):
        return False  # shards: a part's own forward would gather them as if it were the whole model
    try:
        probe(owner)
    except Exception:  # inputs of another kind, or sizes that the probe does not know
        return False
    return True


def prove_call(owner: Any, rotary: RopeMMRotaryEmbedding) -> None:
    """Run a small forward, to see that it calls our module.

    Raises:
        ValueError: a forward that does not call it; or whatever the forward raises.
    """
    calls: list[int] = []
    hook = rotary.register_forward_hook(lambda *_: calls.append(1))
    try:
        probe(owner)
    finally:
        hook.remove()
    if not calls:
        raise ValueError(f"{type(owner).__name__} does not call its rotary module; it is not served")
