"""PoPE: attention whose phases are positions alone, and whose magnitudes are content alone."""

from typing import Any

import torch
from rope_mm_kernels.checks import check_heads
from torch import Tensor, nn
from torch.nn.functional import softplus

from rope_mm.checks.fields import Count, read_value
from rope_mm.rotary.definition import PAIRINGS
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme


class PoPE(nn.Module):
    """Queries and keys in polar coordinates (Polar Coordinate Position Embedding, arXiv 2509.10534).

    A channel of a head has a magnitude, softplus of its value, and a phase, positions @ Omega, so that the
    score of a query and a key is the sum over channels

        softplus(q) softplus(k) cos(phase(k) + bias - phase(q))

    Heads come back with twice their channels, ready for any attention at the scale of the original ones:
    `scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)`. Values stay as they are. Weights that were
    trained with RoPE do not fit: train from scratch.

    Args:
        head_dim: channels of a head, each of which gets a frequency of its own.
        scheme: a key of SCHEMES, or a Scheme, that rotates whole heads.
        heads: number of heads of the keys, for the bias and for a per-head Omega.
        changes: fields of the scheme to change.

    Attributes:
        rope: the Rotary of 2 head_dim channels that turns the magnitudes.
        bias: phases (heads, head_dim) that are added to those of the keys, learned, at first 0. The article
            keeps them from -2 pi to 0, where all angles occur; here they have no bounds.

    Raises:
        ValueError: a scheme that rotates a part of a head.

    Examples:
        >>> pope = PoPE(head_dim=16, heads=2)
        >>> q, k = torch.ones(1, 8, 4, 16), torch.ones(1, 8, 2, 16)
        >>> q, k = pope(q, k, pope.rope.place("text:8")[0])
        >>> q.shape, k.shape
        (torch.Size([1, 8, 4, 32]), torch.Size([1, 8, 2, 32]))
    """

    def __init__(self, head_dim: int, scheme: str | Scheme = "flat", *, heads: int, **changes: Any):
        super().__init__()
        self.head_dim = read_value("PoPE", "head_dim", head_dim, Count)
        self.heads = read_value("PoPE", "heads", heads, Count)
        chosen = read_scheme(scheme, **changes)
        if chosen.fraction != 1:
            raise ValueError(
                f"PoPE turns all channels, but this scheme rotates a part of {chosen.fraction:g}; take "
                "fraction=1 and, for channels that positions do not turn, unrotated_fraction"
            )
        self.rope = Rotary(2 * head_dim, chosen, heads=heads if chosen.per_head else None)
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def reset_parameters(self) -> None:
        """Set the bias back to 0; needed after `to_empty` on a meta-device model."""
        nn.init.zeros_(self.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | RotaryAngles,
        k_positions: Tensor | RotaryAngles | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turned queries (b, s, h, 2 head_dim) and keys (b, s, g, 2 head_dim).

        Args:
            q: queries (b, s, h, head_dim).
            k: keys (b, s, g, head_dim), g the `heads` of this module.
            positions: (s, a) or (b, s, a), or the angles that `rope.angles` made of them.
            k_positions: those of the keys where they are other tokens than the queries.

        Raises:
            ValueError: heads of another number or width, or what `Rotary` refuses.
        """
        check_heads(q, k if k_positions is None else q)
        check_heads(k, k)
        if (found := (k.shape[2], q.shape[3])) != (self.heads, self.head_dim):
            raise ValueError(
                f"this PoPE is for {self.heads} key heads of {self.head_dim} channels, but keys are "
                f"{(*k.shape,)} and queries {(*q.shape,)}: make one for {found[0]} heads of {found[1]} "
                "channels"
            )
        magnitude, bias = softplus(k), self.bias.to(torch.promote_types(k.dtype, torch.float32))
        q = self.join(softplus(q), torch.zeros_like(q))
        k = self.join(magnitude * bias.cos(), magnitude * bias.sin()).to(k.dtype)
        return self.rope(q, k, positions, k_positions)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Heads (..., 2 head_dim) of the first and the second channel of each pair."""
        return PAIRINGS[self.rope.spec.pairing][1](first, second, self.rope.spec.blocks)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}"
