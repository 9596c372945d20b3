"""Attention written out, for those who ask to see its weights."""

from typing import Any

import torch
from torch import Tensor, nn


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Values (b, s, h, d) and weights (b, h, s, s) of queries (b, h, s, d) and keys (b, g, s, d)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scaling * q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    weights = torch.softmax(scores, -1, torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
