"""Rotation right behind the projections of q and k, of attention that looks up no ALL_ATTENTION_FUNCTIONS.

A hook after each projection rotates its output. So a cache holds rotated keys, and every kind of cache
serves. Whether an attention takes queries and keys out of its projections as assumed here is proved by a
forward in which all tokens stand at one place: it must change nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.attention_positions import AttentionContext, ReadCall
from rope_mm.hf.dry_run import probe
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding
from rope_mm.hf.rotary_inspection import ATTENTION_REGISTRY, globals_used
from rope_mm.rotary.module import Rotary

PAIRS = {  # names of the projections of queries, and of keys beside them
    "q_proj": "k_proj",
    "query": "key",
    "q": "k",
    "q_lin": "k_lin",
    "linear_q": "linear_k",
    "query_proj": "key_proj",
    "to_q": "to_k",
}
FUSED = {  # projections of q, k and v in one: all queries first, or q, k, v of each head
    **dict.fromkeys(("qkv", "Wqkv", "qkv_proj", "c_attn"), "stacked"),
    "query_key_value": "grouped",
    "in_proj": "grouped",
}


def projections(module: nn.Module) -> dict[str, str]:
    """Names of the projections of an attention's queries and keys, and what each holds; empty without."""
    held = {
        name: child for name, child in module.named_children() if getattr(child, "weight", None) is not None
    }
    for q, k in PAIRS.items():
        if q in held and k in held:
            return {q: "alone", k: "alone"}
    return {name: FUSED[name] for name in held if name in FUSED}


def projected_attentions(owner: nn.Module) -> list[nn.Module]:
    """Attention modules that look up no ALL_ATTENTION_FUNCTIONS and have projections of q and k."""
    named = (module for module in owner.modules() if "attention" in type(module).__name__.lower())
    own = (module for module in named if "cross" not in type(module).__name__.lower())
    return [module for module in own if projections(module) and not globals_used(module, ATTENTION_REGISTRY)]


class CheckedCall(ReadCall):
    """`ReadCall` that also sees that the projections are those which have the hooks."""

    def __init__(self, attention: nn.Module, hooked: dict[str, nn.Module]):
        super().__init__(attention)
        self.hooked = hooked

    def __call__(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, module in self.hooked.items():
            if getattr(attention, name) is not module:
                raise ValueError(
                    f"{type(attention).__name__}.{name} was replaced after set_rope, as by adapters, and "
                    "would not be rotated; unset_rope, change it, and set_rope again"
                )
        super().__call__(attention, args, kwargs)


class RotateProjection:
    """A hook after a projection: rotates the heads of q and k in its output.

    Attributes:
        attention: the module whose projection it is.
        holds: "alone" for queries or keys, "stacked" or "grouped" for all three.
        width: channels of a head.
        tokens_first: whether the attention puts tokens before rows; read while `set_rope` proves the change.
    """

    def __init__(self, attention: nn.Module, holds: str, width: int):
        self.attention, self.holds, self.width = attention, holds, width
        self.tokens_first = False

    def __call__(self, _projection: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
        module: Any = self.attention
        context, call = module.rope_mm_context, module.rope_mm_call
        if call.cross:
            context.note("cross", module)
            return None
        context.note("rotated", module)
        if context.calls is not None and out.dim() == 3:
            self.tokens_first = out.shape[1] == 1 < out.shape[0]
        x = out.transpose(0, 1) if self.tokens_first else out
        x = x if x.dim() == 3 else x.flatten(1, -2)
        tokens = x.shape[1]
        if call.tokens is not None and call.tokens != tokens:
            raise ValueError(
                f"{type(module).__name__} projects {tokens} tokens of {call.tokens}; it is not served"
            )
        past = int(call.past or 0)
        p = context.positions(call, past + tokens, out.device)[..., past:, :]
        x = self.rotate(x, context.rotary, p)
        return x.transpose(0, 1).reshape(out.shape) if self.tokens_first else x.reshape(out.shape)

    def rotate(self, x: Tensor, rope: Any, p: Tensor) -> Tensor:
        """Rotated heads of a projection's output (b, s, c)."""
        if self.holds == "alone":
            return rope.rotate_one(x.unflatten(-1, (-1, self.width)), p).flatten(-2)
        axis = 2 if self.holds == "stacked" else 3
        shape = (3, -1, self.width) if self.holds == "stacked" else (-1, 3, self.width)
        q, k, v = x.unflatten(-1, shape).unbind(axis)
        bias: Any = getattr(self.attention, "q_bias", None)  # of DeBERTa, which adds it to the queries later
        bias = 0 if bias is None else bias.view(-1, self.width)
        q, k = rope(q + bias, k, p)
        return torch.stack((q - bias, k, v), axis).flatten(2)


def hook_projections(
    attention: nn.Module, rotary: RopeMMRotaryEmbedding, context: AttentionContext, width: int
) -> None:
    """Hook the projections of one attention module; `rotary` records how to undo it."""
    rotary.set_attr(attention, "rope_mm_context", context)
    parts = projections(attention)
    hooked = {name: getattr(attention, name) for name in parts}
    before = CheckedCall(attention, hooked)
    rotary.undo.append(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
    for name, holds in parts.items():
        hook = RotateProjection(attention, holds, width)
        rotary.undo.append(hooked[name].register_forward_hook(hook).remove)


def prove_projections(base: Any, context: AttentionContext, before: list[Tensor], width: int) -> None:
    """Refuse a model that changes where all of its tokens stand at one place, or does not where they move.

    Args:
        base: the model with its hooks.
        context: what its attentions share.
        before: answers of the probe without the change.
        width: channels of a head.

    Raises:
        ValueError: heads that lie otherwise in the projections, or scores with other terms of q or k.
    """
    answers = []
    context.proof = Rotary(width, "flat").to(before[-1].device)
    try:
        for context.one_place in (False, True):
            answers.append([x - y for x, y in zip(probe(base), before, strict=True)])
    finally:
        context.proof, context.one_place = None, False
    for far, near, y in zip(*answers, before, strict=True):
        eps = torch.finfo(y.dtype).eps * y.norm()
        if not far.norm() > eps / 8:
            raise ValueError("the rotation of its projections changes nothing, so it is not served")
        if near.norm() > max(32 * eps, 0.2 * far.norm()):
            raise ValueError(
                "its scores do not depend on the product of its projections of q and k alone, as with other "
                "terms of q or heads in another order, so it is not served"
            )
