"""Attention: words look back, the patches of one image or frame see each other and all before them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rope_mm.kernels import Turn
from rope_mm.segments import Segment, Text


def ranks(segments: Sequence[Segment]) -> Tensor:
    """Rank (s,) of each token: a word has its own, an image or a frame shares one; lower ranks are seen."""
    blocks = [torch.zeros(0, dtype=torch.long)]
    for segment in segments:
        t, y, x = segment.grid
        ranked, size = (x, 1) if isinstance(segment, Text) else (t, y * x)
        start = blocks[-1][-1:].sum() + 1  # one past the last rank; 1 where nothing came before
        blocks.append((start + torch.arange(ranked)).repeat_interleave(size))
    return torch.cat(blocks)


def visible(rank: Tensor) -> Tensor:
    """Mask (b, 1, s, s), true where the query of a row may see the key of a column, from ranks (b, s)."""
    return (rank[:, None, :] <= rank[:, :, None])[:, None]


class Attention(nn.Module):
    """Grouped-query attention (b, s, c) -> (b, s, c), queries and keys normalised, then rotated by a turn."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps), nn.RMSNorm(head_dim, eps)

    def forward(self, x: Tensor, turn: Turn, mask: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = turn(self.norm_q(q), self.norm_k(k))  # (b, s, h, d), (b, s, g, d)
        heads = (z.transpose(1, 2) for z in (q, k, v))
        y = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
        return self.out(y.transpose(1, 2).flatten(-2))
