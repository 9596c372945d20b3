"""Rotary, the module that people import: a scheme made ready for heads of one size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm import rotation
from rope_mm.kernels import Turn, check, check_positions, make_turn
from rope_mm.positions import Cursor
from rope_mm.schemes import Scheme, read_scheme
from rope_mm.segments import Segment


class Rotary(nn.Module):
    """Rotates queries and keys by a scheme.

        rope = Rotary(head_dim=64, scheme="rope-tv")
        p, cursor = rope.place([Text(5), Image(2, 3)])
        q, k = rope(q, k, p)

    Args:
        head_dim: channels of a head.
        scheme: a key of SCHEMES, or a Scheme.
        heads: number of rows of a per-head Omega; it must divide the heads of k. None: one Omega for all.
        changes: fields of the scheme to replace, such as theta=, learnable=, fraction=, pairing=.

    Raises:
        ValueError: an unknown scheme or field, a head_dim without whole pairs.
    """

    def __init__(
        self, head_dim: int, scheme: str | Scheme = "rope-tv", *, heads: int | None = None, **changes: Any
    ):
        super().__init__()
        self.head_dim, self.heads = head_dim, heads
        self.scheme = read_scheme(scheme, **changes)
        rotation.PAIRINGS[self.scheme.pairing]  # an unknown one is refused here, not at the first forward
        omega = self.scheme.omega(head_dim, heads)
        self.learned = nn.Parameter(omega.float()) if self.scheme.learnable else None

    @property
    def omega(self) -> Tensor:
        """Omega (a, r) or (h, a, r): the learned one, float32, or the scheme's, rebuilt in float64."""
        return self.scheme.omega(self.head_dim, self.heads) if self.learned is None else self.learned

    def reset_parameters(self) -> None:
        """Set a learned Omega back to the scheme's; needed after `to_empty` on a meta-device model."""
        if self.learned is not None:
            with torch.no_grad():
                self.learned.copy_(self.scheme.omega(self.head_dim, self.heads))

    def place(self, story: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of a story and the cursor after it, in this scheme's layout."""
        return self.scheme.place(story, cursor)

    def turn(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Turn:
        """The work of one forward for positions (s, a) or (b, s, a), done once; every layer is given it."""
        return make_turn(positions, self.omega, self.scheme.pairing, dtype)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Tables (..., s, 2r) as Hugging Face models expect them, each angle on both channels of its pair.

        Raises:
            ValueError: a per-head Omega, which has no such table.
        """
        check_positions(positions, self.omega)
        cos, sin = rotation.cos_sin(positions, self.omega, dtype)
        if cos.shape[-2] != 1:
            raise ValueError(
                f"a table is shared by all heads, but this Omega has {cos.shape[-2]}; call the module"
            )
        _, join = rotation.PAIRINGS[self.scheme.pairing]
        return join(cos, cos).squeeze(-2), join(sin, sin).squeeze(-2)

    def forward(self, q: Tensor, k: Tensor, where: Tensor | Turn) -> tuple[Tensor, Tensor]:
        """Rotated q (b, s, h, d) and k (b, s, g, d); `where` is positions (s, a) or (b, s, a), or a turn."""
        if isinstance(where, Turn):
            return where(q, k)
        check(q, k, where, self.omega)
        return self.turn(where.to(q.device), q.dtype)(q, k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # `.to(bfloat16)` would cost a learned Omega 0.7 rad at position 4095, so it moves but is never cast
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, {self.scheme}"
