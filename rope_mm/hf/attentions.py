"""Attention whose globals are exchanged, for one instance: how models without rotary come to have one."""

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm.hf.reading import seen_globals
from rope_mm.hf.saving import fill_learned, read, restore, wake, write
from rope_mm.rope_parameters import read_head_dim
from rope_mm.rotary import Rotary
from rope_mm.scheme import Scheme
from rope_mm.schemes import read_scheme
from rope_mm.segments import Image, Still, Text

NAME = "ALL_ATTENTION_FUNCTIONS"


@cache
def clone(f: Callable[..., Any], names: tuple[str, ...], value: Any) -> Callable[..., Any]:
    """The function f that sees `value` where it saw the globals `names`."""
    f = inspect.unwrap(f)
    # a module of its own, for torch.compile looks globals up by the name of a function's module
    module = ModuleType(f"{f.__module__}.{f.__qualname__}.{id(value):x}")
    vars(module).update({**f.__globals__, **dict.fromkeys(names, value), "__name__": module.__name__})  # pyright: ignore
    sys.modules[module.__name__] = module
    code: Any = f
    copy = FunctionType(code.__code__, vars(module), f.__name__, code.__defaults__, code.__closure__)
    copy.__kwdefaults__, copy.__module__ = code.__kwdefaults__, module.__name__
    return copy


def put_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a module a forward, or its class's again; behind the hook of accelerate, where there is one."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(forward or type(module).forward, module)
    elif forward:
        vars(module)["forward"] = MethodType(forward, module)
    else:
        vars(module).pop("forward", None)


def attentions(model: nn.Module) -> list[nn.Module]:
    """Attention modules that look their attention up by name, those to other sequences left out."""
    cross = [module for module in model.modules() if "cross" in type(module).__name__.lower()]
    return [module for module in model.modules() if NAME in seen_globals(module) and module not in cross]


class Rotating:
    """Stands where ALL_ATTENTION_FUNCTIONS stood, and rotates q and k (b, h, s, d) on their way."""

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The attention of that name, rotated."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)

        def rotated(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any):
            rope, story = module.rope_mm_told
            if q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"{q.shape[2]} queries meet {k.shape[2]} keys, as with a cache, and this rotation then "
                    "does not know where they stand; pass use_cache=False"
                )
            wide = torch.float32 if k.device.type == "mps" else torch.float64
            p = torch.tensor(numbers_of(rope.scheme, k.shape[2], story), dtype=wide, device=k.device)
            q, k = (x.transpose(1, 2) for x in rope(q.transpose(1, 2), k.transpose(1, 2), p))
            return attend(module, q, k, *args, **kwargs)

        return rotated


ROTATING = Rotating()


@torch.compiler.assume_constant_result
def numbers_of(scheme: Scheme, tokens: int, grid: tuple[int, int] | None) -> list[list[float]]:
    """Positions (s, a): of words, or of an image behind tokens that are not rotated."""
    still = tokens - grid[0] * grid[1] if grid else 0
    picture = [Image(*grid)] if grid else [Text(tokens)]
    return scheme.place([Still(still), *picture] if still else picture)[0].tolist()


def rotated_forward(self: Any, *args: Any, rope_mm: Any = None, **kwargs: Any):
    """The attention's own forward, with q and k rotated by what the model was told.

    Raises:
        ValueError: a model that does not hand its arguments on.
    """
    if rope_mm is None:
        raise ValueError(
            f"{type(self).__name__} was told no positions: its model does not hand arguments on to it, so "
            "`unset_rope` it; it is not served"
        )
    self.rope_mm_told = rope_mm  # read in this very call, also when checkpointing calls it again
    return self.rope_mm_forward(self, *args, **kwargs)


def tell(model: Any, args: tuple, kwargs: dict[str, Any]):
    """Before a model's forward: its rotary and the image's grid go along with the arguments."""
    grid, pixels = None, kwargs.get("pixel_values", args[0] if args else None)
    if model.main_input_name == "pixel_values" and pixels is not None:
        patch = model.config.patch_size
        down, across = patch if isinstance(patch, Iterable) else (patch, patch)
        grid = (pixels.shape[-2] // down, pixels.shape[-1] // across)
    return args, {**kwargs, "rope_mm": (model.rope_mm, grid)}


def base_of(model: Any) -> Any:
    """The model inside its adapters and its head."""
    inner = getattr(model, "base_model", model)
    return model if inner is model else base_of(inner)


def give(model: Any, scheme: Any, changes: dict[str, Any]) -> None:
    """Let a model without rotary rotate by a scheme, or by the one in its config.

    Raises:
        ValueError: no attention that can be served, or several parts with attention of their own.
    """
    base, found = base_of(model), attentions(model)
    if not hasattr(base, "config") or len({id(getattr(module, "config", None)) for module in found}) != 1:
        parts = ", ".join(name for name, part in model.named_children() if attentions(part))
        raise ValueError(
            f"{type(model).__name__} has neither a rotary module nor one stack of attention to rotate"
            + (f"; give one of its parts: {parts}" if parts else "")
        )
    given = read(base.config, None) if scheme is None else getattr(scheme, "scheme", scheme)
    chosen = read_scheme(given, **changes)
    heads = base.config.num_attention_heads if chosen.per_head else None
    own = isinstance(scheme, Rotary) and not changes
    rope = scheme if own else Rotary(read_head_dim(base.config), chosen, heads=heads)
    if scheme is None:
        fill_learned(rope, model.name_or_path, "rope_mm.learned")
    base.rope_mm, base.rope_mm_saved = rope, vars(base.config).get("rope_parameters")
    wake(base)
    write(base.config, {None: chosen}, by_rope=False)
    for module in found:
        vars(module)["rope_mm_forward"] = clone(type(module).forward, (NAME,), ROTATING)
        put_forward(module, rotated_forward)
    base.register_forward_pre_hook(tell, with_kwargs=True)


def take_back(model: Any) -> None:
    """Undo `give`."""
    for module in attentions(model):
        put_forward(module, None)
        for mine in ("rope_mm_forward", "rope_mm_told"):
            vars(module).pop(mine, None)
    base = base_of(model)
    restore(base.config, base.rope_mm_saved)
    del base.rope_mm, base.rope_mm_saved
    drop_hook(base, tell)


def drop_hook(module: nn.Module, mine: Callable[..., Any]) -> None:
    """Remove a hook, found by itself, so that copies of a model can be undone too."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if hook is mine]:
            del hooks[key]
            with_kwargs.pop(key, None)
