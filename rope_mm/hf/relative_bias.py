"""Attention scores that depend on positions by another way than rotation: found, kept or dropped.

T5, BEiT, Swin and others add a learned number for each distance to their scores. Under a rotary such a model
has two ways to see a position, so the caller decides: keep the bias, or drop it.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.rotary_embedding import Changes

CHOICES = "keep", "drop"
SWITCHES = "use_rel_pos", "relative_attention"  # of SAM, of DeBERTa
RELATIVE = re.compile(  # WavLM's gru_rel_pos_linear is a gate of its bias
    r"(^|(?<!gru)_)rel(ative)?_(attention_bias|pos|position|attn|embeddings|bias)|^linear_pos$|alibi|position_bias_mlp"
)


def bias_modules(owner: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules with such a bias: the name from the owner, the module, and the name of what holds it."""
    found = []
    for name, module in owner.named_modules():
        held = [
            *dict(module.named_children()),
            *dict(module.named_parameters(recurse=False)),
            *methods(module),
        ]
        inside = any(RELATIVE.search(part) for part in name.split("."))
        if not inside and (held := [part for part in held if RELATIVE.search(part)]):
            found.append((name, module, held[0]))
    return found


def methods(module: nn.Module) -> list[str]:
    """Names of a model's own methods that make a bias (ALiBi)."""
    return [name for name in vars(type(module)) if "alibi" in name]


class DroppedBias:
    """A hook after a module that makes a bias: zeros in its place. It counts how often it ran."""

    def __init__(self):
        self.calls = 0

    def __call__(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return torch.zeros_like(out) if isinstance(out, Tensor) else out


def settle_bias(owner: nn.Module, choice: str | None, changes: Changes) -> list[DroppedBias]:
    """Keep or drop the biases of a model, as the caller chose.

    Args:
        owner: the model.
        choice: "keep", "drop", or None where the caller did not say.
        changes: records how to undo it.

    Returns:
        The hooks that drop, each of which a forward must have called.

    Raises:
        ValueError: a bias and no choice, a choice without a bias, or a bias that cannot be dropped.
    """
    found, kind = bias_modules(owner), type(owner).__name__
    if choice is not None and choice not in CHOICES:
        raise ValueError(f"relative_bias must be one of {', '.join(CHOICES)}, not {choice!r}")
    if not found:
        refuse_choice(owner, choice)
        return []
    name, _, held = found[0]
    if choice is None:
        raise ValueError(
            f"{kind} adds a bias of relative positions to its scores ({f'{name}.{held}'.strip('.')}); give "
            "relative_bias='keep' for that beside the rotation, or 'drop' for the rotation alone"
        )
    if choice == "keep":
        return []
    switched = [(part, x) for part in owner.modules() for x in SWITCHES if getattr(part, x, None) is True]
    for part, switch in switched:
        changes.set_attr(part, switch, False)
    return [] if switched else [drop(kind, *one, changes) for one in found]


def refuse_choice(owner: nn.Module, choice: str | None) -> None:
    """Refuse a choice about a bias that is not there.

    Raises:
        ValueError: with the owner's class.
    """
    if choice is not None:
        raise ValueError(
            f"{type(owner).__name__} adds no bias of relative positions; leave relative_bias out"
        )


def drop(kind: str, name: str, module: Any, held: str, changes: Changes) -> DroppedBias:
    """Drop one bias: let the module that makes it give zeros.

    Raises:
        ValueError: a bias that no module makes.
    """
    hook = DroppedBias()
    if type(module).__name__.endswith("RelativePositionBias"):
        changes.undo.append(module.register_forward_hook(hook).remove)
    elif isinstance(getattr(module, held, None), nn.Module):
        changes.undo.append(getattr(module, held).register_forward_hook(hook).remove)
    else:
        raise ValueError(
            f"{kind} reads {f'{name}.{held}'.strip('.')} itself, so that bias cannot be dropped; give "
            "relative_bias='keep'"
        )
    return hook
