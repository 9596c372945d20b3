"""Rotary, the module that people import: a scheme made ready for heads of one size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.positions.grids import Cursor
from rope_mm.rotary import definition as rotation
from rope_mm.rotary.dispatch import RotaryAngles, RotarySpec, check, check_heads, check_positions, make_angles
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme
from rope_mm.segments import Segment


class Rotary(nn.Module):
    """Rotates queries and keys by a scheme.

        rope = Rotary(head_dim=64, scheme="rope-tv")
        p, cursor = rope.place([Text(5), Image(2, 3)])
        q, k = rope(q, k, p)

    `torch.compile(rope, fullgraph=True)` takes other positions and lengths as they come. Where Omega depends
    on the length, which a graph cannot read, give it `rope.turn(p)`, made outside of the graph, instead of p.

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
        scheme = self.scheme
        self.form = RotarySpec(scheme.pairing, scheme.blocks(head_dim), scheme.slot == "tail", scheme.factor)
        # no buffer: those are cast with a model, averaged over processes, and lost on the meta device
        self.fixed = scheme.omega(head_dim, heads)
        device = torch.get_default_device()  # the meta device, where a model is built without its weights
        self.learned = nn.Parameter(self.fixed.to(device, torch.float32)) if scheme.learnable else None

    @property
    def omega(self) -> Tensor:
        """Omega (a, r) or (h, a, r): the learned one, float32, or the scheme's, float64."""
        return self.omega_at(0.0)

    def omega_at(self, length: float | Sequence[float]) -> Tensor:
        """Omega for positions below `length`, one number or one per axis; a learned one has no other.

        Raises:
            ValueError: a learned Omega that something has cast below float32.
        """
        if self.learned is None:
            return self.scheme.omega(self.head_dim, self.heads, length) if length else self.fixed
        if self.learned.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the learned Omega arrives in {self.learned.dtype}, which loses angles; under FSDP's mixed "
                "precision shard this module by itself, without a policy, before its parents"
            )
        whole = getattr(self.learned, "full_tensor", None)  # a DTensor, whose import would cost a second
        return whole() if whole else self.learned

    def reset_parameters(self) -> None:
        """Set a learned Omega back to the scheme's; needed after `to_empty` on a meta-device model."""
        if self.learned is not None:
            with torch.no_grad():
                self.learned.copy_(self.scheme.omega(self.head_dim, self.heads))

    def place(self, story: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of a story and the cursor after it, in this scheme's layout."""
        return self.scheme.place(story, cursor)

    def lengthened(self, positions: Tensor, length: float | Sequence[float] | None) -> Tensor:
        """Omega for these positions: `length`, or one past the furthest on each axis where it matters.

        Raises:
            ValueError: such a scheme in a graph that is being recorded, which cannot read positions.
        """
        if not self.scheme.needs_length:
            return self.omega_at(0.0)
        if torch.compiler.is_compiling():
            raise ValueError(
                "Omega of this scheme depends on the length, which a compiled graph cannot know; "
                "call `rope.turn(positions)` outside of it and hand the turn over instead of positions"
            )
        if length is None and positions.numel():
            length = (positions.detach().flatten(0, -2).amax(0) + 1).tolist()
        return self.omega_at(length or 0.0)

    def turn(
        self,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
        length: float | Sequence[float] | None = None,
    ) -> RotaryAngles:
        """The work of one forward for positions (s, a) or (b, s, a), done once; every layer is given it.

        `length` is for schemes whose Omega depends on it, where these positions are not the whole sequence.
        """
        return make_angles(positions, self.lengthened(positions, length), self.form, dtype)

    def cos_sin(
        self,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
        length: float | Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tables (..., s, 2r) as Hugging Face models expect them, each angle on both channels of its pair.

        Raises:
            ValueError: a per-head Omega, which has no such table.
        """
        omega = self.lengthened(positions, length)
        check_positions(positions, omega)
        cos, sin = rotation.cos_sin(positions, omega, dtype, self.form.factor)
        if cos.shape[-2] != 1:
            raise ValueError(
                f"a table is shared by all heads, but this Omega has {cos.shape[-2]}; call the module"
            )
        _, join = rotation.PAIRINGS[self.form.pairing]
        blocks = self.form.blocks
        return join(cos, cos, blocks).squeeze(-2), join(sin, sin, blocks).squeeze(-2)

    def forward(
        self, q: Tensor, k: Tensor, where: Tensor | RotaryAngles, k_where: Tensor | RotaryAngles | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated q (b, s, h, d) and k (b, s, g, d); `where` is positions (s, a) or (b, s, a), or a turn.

        With `k_where` the keys stand elsewhere and may be other in number, as in cross-attention.
        """
        if k_where is not None:
            return self.one(q, where), self.one(k, k_where)
        if isinstance(where, RotaryAngles):
            return where(q, k)
        check_heads(q, k)
        return self.prepare(q, where)(q, k)

    def one(self, x: Tensor, where: Tensor | RotaryAngles) -> Tensor:
        """Rotated heads x (b, s, h, d) of one kind; `rope.turn(p).inverse.one(x)` takes them back."""
        return (where if isinstance(where, RotaryAngles) else self.prepare(x, where)).one(x)

    def prepare(self, x: Tensor, positions: Tensor) -> RotaryAngles:
        """A turn for the heads x at these positions, checked."""
        omega = self.lengthened(positions, None)
        check(x, x, positions, omega)
        return make_angles(positions.to(x.device), omega, self.form, x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # `.to(bfloat16)` would cost a learned Omega 0.7 rad at position 4095, so it moves but is never cast
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        device = fn(torch.empty(0)).device
        if device.type not in ("meta", "mps"):  # the one holds no numbers, the other none of float64
            self.fixed = self.fixed.to(device)
        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, {self.scheme}"
