"""Blocks: pre-norm attention and a gated MLP, each added to the stream."""

from torch import Tensor, nn
from torch.nn.functional import silu

from rope_mm.nn.attention import Attention
from rope_mm.rotary.dispatch import RotaryAngles


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer (b, s, c) -> (b, s, c) around an attention."""

    def __init__(self, width: int, inner: int, attention: Attention, eps: float):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attention = attention
        self.mlp = GatedMLP(width, inner)

    def forward(self, x: Tensor, angles: RotaryAngles, mask: Tensor | None, **context) -> Tensor:
        x = x + self.attention(self.norm_attention(x), angles, mask, **context)[0]
        return x + self.mlp(self.norm_mlp(x))
