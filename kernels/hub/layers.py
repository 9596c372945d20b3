"""Layers without state, as `kernels.kernelize` puts them in place of others: a forward and nothing else."""

from rope_mm_kernels.rotary import rotate as rotate_heads
from rope_mm_kernels.table import rotate_by_table
from torch import Tensor, nn


class apply_rotary_transformers(nn.Module):
    """`apply_rotary_pos_emb` of transformers: heads (b, h, s, d), or (b, s, h, d) with unsqueeze_dim 2."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q and k, rotated by cos and sin (1 or b, s, 2r)."""
        if unsqueeze_dim == 2:
            return rotate_by_table(q, k, cos, sin)
        q, k = rotate_by_table(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)


class rotate(nn.Module):
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ omega."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, positions: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, rotated, with gradients to all four."""
        return rotate_heads(q, k, positions, omega)


__all__ = ["apply_rotary_transformers", "rotate"]
