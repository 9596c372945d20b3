"""Attention: words look back, the patches of one image or frame see each other and all before them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.segments import Segment, Text

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_ids(segments: Sequence[Segment], full: bool = False) -> Tensor:
    """Rank (s,) of each token: a word has its own, an image or a frame shares one; lower ranks are seen.

    Where `full`, all frames of a video share one.
    """
    blocks = [torch.zeros(0, dtype=torch.long)]
    for segment in segments:
        t, y, x = segment.grid
        shared = (1, t * y * x) if full else (t, y * x)
        ranked, size = (x, 1) if isinstance(segment, Text) else shared
        start = blocks[-1][-1:].sum() + 1  # one past the last rank; 1 where nothing came before
        blocks.append((start + torch.arange(ranked)).repeat_interleave(size))
    return torch.cat(blocks)


def make_mask_fn(rank: Tensor, document: Tensor | None = None, past: int | Tensor = 0) -> Rule:
    """The rule (b, h, q, k) -> bool by which queries of row b see keys, both counted from the row's start.

    Args:
        rank: (b, s): a token sees those of its own and of lower rank. A draft, which is to become what has
            rank r, has rank -r: it sees what they see, and itself in their place; others do not see it.
        document: (b, s): and none of another document.
        past: how many tokens came before these s; all of them are seen.
    """
    last = rank.shape[1] - 1

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine, its = (q - past).clamp(0, last), (k - past).clamp(0, last)
        theirs, own = rank[b, its], rank[b, mine]
        seen = ((theirs == own) | (theirs >= 0) & (theirs < own.abs())) & (k - past <= last)
        if document is not None:
            seen = seen & (document[b, its] == document[b, mine])
        return seen | (k < past)

    return rule


class Attention(nn.Module):
    """Grouped-query attention (b, s, c) -> (b, s, c), queries and keys normalised, then rotated by angles."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps), nn.RMSNorm(head_dim, eps)

    def forward(
        self, x: Tensor, angles: RotaryAngles, mask: Tensor | None, **context
    ) -> tuple[Tensor, Tensor | None]:
        """The stream, and what `attend` tells of its weights; `context` is for `attend`."""
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = angles.rotate(self.norm_q(q), self.norm_k(k))  # (b, s, h, d), (b, s, g, d)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y, weights = self.attend(q, k, v, mask, **context)
        return self.out(y.flatten(-2)), weights

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What queries (b, h, s, d) find at keys and values (b, g, s, d): (b, s, h, d), and the weights."""
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2), None
