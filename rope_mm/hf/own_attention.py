"""Methods of attention modules in whose place others stand while a scheme rotates.

They rotate by a table of their own, or read weights past the modules that hold them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def keep_heads(_attention: nn.Module, heads: Tensor, _positions: Any) -> Tensor:
    """V-JEPA 2's rotation of heads by ids: none."""
    return heads


def keep_queries_keys(_attention: nn.Module, _table: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """RoFormer's rotation of queries and keys by its table of sines: none."""
    return q, k


def attend_by_modules(
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """WavLM's attention, which calls its projections; the original gives their weights to torch's function.

    Args:
        attention: the module.
        hidden_states: (b, s, c).
        attention_mask: (b, s), 1 at tokens; None for all.
        position_bias: (b * h, s, s), its gated bias.

    Returns:
        The outputs (b, s, c), and the weights (b, h, s, s), their mean over heads as the original gives them.
    """
    b, s, _ = hidden_states.shape
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (part(hidden_states).view(b, s, -1, attention.head_dim).transpose(1, 2) for part in parts)
    scores = q * attention.scaling @ k.mT + position_bias.view(b, -1, s, s)
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask.ne(1)[:, None, None], -torch.inf)
    weights = nn.functional.dropout(scores.softmax(-1), attention.dropout, attention.training)
    out = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return out, weights.mean(1, keepdim=True).expand_as(weights)


METHODS: dict[str, Callable[..., Any]] = {
    "apply_rotary_embeddings": keep_heads,
    "apply_rotary_position_embeddings": keep_queries_keys,
    "torch_multi_head_self_attention": attend_by_modules,
}
PAIRINGS = {"apply_rotary_position_embeddings": "interleaved"}  # of the weights of such a model


def own_methods(attention: nn.Module) -> dict[str, Callable[..., Any]]:
    """Names of an attention's methods of this kind, and what stands in their place."""
    return {name: function for name, function in METHODS.items() if hasattr(type(attention), name)}


def own_pairing(attentions: list[nn.Module]) -> str | None:
    """The pairing of the weights of a model that rotates by such a method; None where it has none."""
    names = (name for module in attentions for name in own_methods(module))
    return next((PAIRINGS[name] for name in names if name in PAIRINGS), None)
