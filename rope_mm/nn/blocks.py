"""Blocks: pre-norm attention and a gated MLP, each added to the stream; and the heads that read it."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from rope_mm.nn.attention import Attention
from rope_mm.nn.patches import image_index
from rope_mm.rotary.dispatch import RotaryAngles


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The stream (b, s, c) -> (b, s, c)."""
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer (b, s, c) -> (b, s, c) around an attention.

    Args:
        width: c, channels of the stream.
        inner: channels inside the MLP.
        attention: the attention.
        eps: of the RMS norms.
    """

    def __init__(self, width: int, inner: int, attention: Attention, eps: float):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attention = attention
        self.mlp = GatedMLP(width, inner)

    def forward(self, x: Tensor, angles: RotaryAngles, mask: Any, **context: Any) -> Tensor:
        """The stream x (b, s, c) -> (b, s, c); see `Attention.forward` for the other arguments.

        Args:
            x: the stream (b, s, c).
            angles: of q and k, for all layers.
            mask: what sees what, in the form of the attention backend.
            **context: passed on to the attention, such as a cache.
        """
        x = x + self.attention(self.norm_attention(x), angles, mask, **context)[0]
        return x + self.mlp(self.norm_mlp(x))


class PatchHead(nn.Module):
    """Patches (n, p) read from the stream at the n image tokens, in order.

    Args:
        width: c, channels of the stream.
        patch_width: p, numbers of a patch.
        bounded: whether patches end in tanh, within (-1, 1).
    """

    def __init__(self, width: int, patch_width: int, bounded: bool = False):
        super().__init__()
        self.out, self.bounded = nn.Linear(width, patch_width), bounded

    def forward(self, x: Tensor, image_mask: Tensor, count: int) -> Tensor:
        """Read patches.

        Args:
            x: the stream (b, s, c).
            image_mask: (b, s), where image tokens are.
            count: n, number of image tokens.

        Returns:
            Patches (n, p), in the order of their tokens.
        """
        patches = self.out(x.flatten(0, 1)[image_index(image_mask, count)])
        return patches.tanh() if self.bounded else patches


class ScoreHead(nn.Module):
    """One score (b,) for each row: the mean of what is read at its image tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, image_mask: Tensor) -> Tensor:
        """The stream x (b, s, c) and where image tokens are (b, s) -> scores (b,)."""
        mean = (x * image_mask[..., None]).sum(1) / image_mask.sum(1, keepdim=True)
        return self.out(mean).squeeze(-1)
