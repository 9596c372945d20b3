"""Attention: text tokens look back; the patches of one image or frame see each other and all before them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.segments import Segment, Text

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_block_ids(segments: Sequence[Segment], full_video: bool = False) -> Tensor:
    """The block of each token: a text token has its own, an image or a frame shares one; ids rise by one.

    Args:
        segments: the sequence.
        full_video: whether all frames of a video share one block.

    Returns:
        (s,) whole numbers from 1; a token sees the blocks with a lower or the same id.
    """
    blocks = [torch.zeros(0, dtype=torch.long)]
    for segment in segments:
        t, y, x = segment.grid
        shared = (1, t * y * x) if full_video else (t, y * x)
        count, size = (x, 1) if isinstance(segment, Text) else shared
        start = blocks[-1][-1:].sum() + 1  # one past the last block; 1 where nothing came before
        blocks.append((start + torch.arange(count)).repeat_interleave(size))
    return torch.cat(blocks)


def make_mask_fn(
    block_ids: Tensor, document_ids: Tensor | None = None, past: int | Tensor = 0
) -> MaskFunction:
    """A function (b, h, q, k) -> bool: whether query q of row b sees key k, counted from the row's start.

    Args:
        block_ids: (b, s): a token sees the blocks with a lower or the same id. A noisy copy of block i has
            the id -i: it sees what block i sees and itself in the place of block i; no other token sees it.
        document_ids: (b, s): tokens of other documents are not seen.
        past: number of tokens before these s; all of them are seen.
    """
    last = block_ids.shape[1] - 1

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = (q - past).clamp(0, last), (k - past).clamp(0, last)
        query_block, key_block = block_ids[b, query], block_ids[b, key]
        earlier = (key_block >= 0) & (key_block < query_block.abs())
        seen = ((key_block == query_block) | earlier) & (k - past <= last)
        if document_ids is not None:
            seen = seen & (document_ids[b, query] == document_ids[b, key])
        return seen | (k < past)

    return sees


class Attention(nn.Module):
    """Grouped-query attention (b, s, c) -> (b, s, c): q and k are normalised, then rotated by angles.

    Args:
        width: c, channels of the stream.
        heads: number of query heads.
        kv_heads: number of key and value heads; it divides `heads`.
        head_dim: channels of a head.
        eps: of the RMS norms of q and k.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps), nn.RMSNorm(head_dim, eps)

    def forward(
        self, x: Tensor, angles: RotaryAngles, mask: Any, **context: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: the stream (b, s, c).
            angles: of the tokens' positions; every layer uses the same.
            mask: what `attend` takes.
            context: more arguments of `attend`.

        Returns:
            The stream (b, s, c), and the attention weights where `attend` gives them.
        """
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = angles.rotate(self.norm_q(q), self.norm_k(k))  # (b, s, h, d), (b, s, g, d)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y, weights = self.attend(q, k, v, mask, **context)
        return self.out(y.flatten(-2)), weights

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        """Values (b, s, h, d) that queries (b, h, s, d) find at keys and values (b, g, s, d); no weights.

        Args:
            q: queries (b, h, s, d).
            k: keys (b, g, s, d).
            v: values (b, g, s, d).
            mask: (b, 1, s, s), true where a query sees a key; None: every query sees every key.
        """
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2), None


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out, for callers that ask for its weights; an attention function of transformers.

    Args:
        module: not used.
        q: queries (b, h, s, d).
        k: keys (b, g, s, d).
        v: values (b, g, s, d).
        mask: added to the scores, (b, 1, s, s).
        scaling: factor of the scores.
        kwargs: not used.

    Returns:
        Values (b, s, h, d) and weights (b, h, s, s).
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scaling * q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    weights = torch.softmax(scores, -1, torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
