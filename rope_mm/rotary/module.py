"""Rotary, the module that people import: a scheme made ready for heads of one size."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rope_mm_kernels import checks
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from rope_mm.positions.cursor import Cursor
from rope_mm.rotary import definition
from rope_mm.rotary.dispatch import (
    RotaryAngles,
    RotarySpec,
    check_heads,
    check_positions,
    make_angles,
    make_angles_for,
)
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme
from rope_mm.segments import Segment


class Rotary(nn.Module):
    """Rotates queries and keys by a scheme.

        rope = Rotary(head_dim=64, scheme="rope-tv")
        p, cursor = rope.place([Text(5), Image(2, 3)])
        q, k = rope(q, k, p)

    A model with several layers makes the angles once: `angles = rope.angles(p, q.dtype)`, then in every layer
    `q, k = angles.rotate(q, k)`. `torch.compile(rope, fullgraph=True)` serves all positions and lengths with
    one graph. Where Omega depends on the length, which a graph cannot read, make `rope.angles(p)` outside of
    the graph and pass it instead of p. What does not fit is a ValueError in compiled code, too, but for
    `fullgraph=True`: there torch raises its own `Unsupported`, whose cause has the sentence.

    Args:
        head_dim: channels of a head.
        scheme: a key of SCHEMES, or a Scheme.
        heads: number of rows of a per-head Omega; it must divide the heads of k. None: one Omega for all.
        mode: "exact", or "hf" for angles rounded to float32 as in transformers.
        changes: fields of the scheme to replace, such as theta=, learnable=, fraction=, pairing=.

    Attributes:
        spec: how angles meet channels.
        static_omega: Omega (a, r) or (heads, a, r) of the scheme, float64; neither saved nor cast.
        omega_param: the learned Omega, a float32 parameter; None where the scheme is not learnable.

    Raises:
        ValueError: an unknown scheme or field, one without effect, a head_dim without whole pairs.

    Warns:
        UserWarning: an axis along which no pair rotates, as heads are too small or too few.

    Examples:
        >>> rope = Rotary(64, "rope-tv")
        >>> positions, cursor = rope.place("text:2 image:2x3")
        >>> q, k = torch.ones(1, 8, 4, 64), torch.ones(1, 8, 2, 64)
        >>> q, k = rope(q, k, positions)
        >>> q.shape, k.shape
        (torch.Size([1, 8, 4, 64]), torch.Size([1, 8, 2, 64]))
    """

    def __init__(
        self,
        head_dim: int,
        scheme: str | Scheme = "rope-tv",
        *,
        heads: int | None = None,
        mode: str = "exact",
        **changes: Any,
    ):
        super().__init__()
        self.head_dim, self.heads = head_dim, heads
        self.scheme = read_scheme(scheme, **changes)
        scheme = self.scheme
        if scheme.ladder_over_heads and heads is None and not scheme.per_head:
            raise ValueError(
                "ladder_over_heads has no effect without heads; give heads=, or leave it at False"
            )
        blocks, tail = scheme.blocks(head_dim), scheme.channel_offset == "end"
        self.spec = RotarySpec(scheme.pairing, blocks, tail, scheme.attention_scaling, mode)
        # no buffer: those are cast with a model, averaged over processes, and lost on the meta device
        self.static_omega = scheme.omega(head_dim, heads)
        if unseen := scheme.unseen_axes(self.static_omega):
            cure = f"take more channels than {head_dim}" + " or more heads" * (heads is not None)
            if heads is None and scheme.per_head:
                cure = "give heads=, the number of key heads"
            warnings.warn(
                f"no pair rotates along {', '.join(unseen)}, so attention cannot distinguish tokens that "
                f"differ there alone; {cure}, or leave the axis out of axis_order",
                stacklevel=2,
            )
        # meta, where a model is built without its weights; torch 2.6's get_default_device misses that
        device = torch.empty(0).device
        fake = detect_fake_mode()
        initial = fake.from_tensor(self.static_omega) if fake else self.static_omega
        initial = initial.to(device, torch.float32)
        self.omega_param = nn.Parameter(initial) if scheme.learnable else None

    @property
    def omega(self) -> Tensor:
        """Omega (a, r) or (heads, a, r): the learned one, float32, or the scheme's, float64."""
        return self.omega_at(0.0)

    def omega_at(self, length: float | Sequence[float]) -> Tensor:
        """Omega for positions below `length`, one number or one per axis; a learned one has no other.

        Raises:
            ValueError: a learned Omega that something has cast below float32.
        """
        if self.omega_param is None:
            return self.scheme.omega(self.head_dim, self.heads, length) if length else self.static_omega
        if self.omega_param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the learned Omega arrives in {self.omega_param.dtype}, which loses angles; under FSDP's "
                "mixed precision shard this module by itself, without a policy, before its parents"
            )
        gather = getattr(self.omega_param, "full_tensor", None)  # a DTensor, whose import would cost a second
        return gather() if gather else self.omega_param

    def reset_parameters(self) -> None:
        """Set a learned Omega back to the scheme's; needed after `to_empty` on a meta-device model."""
        if self.omega_param is not None:
            with torch.no_grad():
                self.omega_param.copy_(self.scheme.omega(self.head_dim, self.heads))

    def place(self, segments: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of segments and the cursor after them, in this scheme's layout."""
        return self.scheme.place(segments, cursor)

    def omega_for(self, positions: Tensor, length: float | Sequence[float] | None = None) -> Tensor:
        """Omega for these positions, of `length` or else of one past the furthest position on each axis.

        Args:
            positions: (..., s, a).
            length: of the whole sequence, one number or one per axis.

        Raises:
            ValueError: an Omega that depends on the length in a recorded graph, which cannot read positions.
        """
        if not self.scheme.needs_length:
            return self.omega_at(0.0)
        if torch.compiler.is_compiling():
            raise ValueError(
                "Omega of this scheme depends on the length, which a compiled graph cannot know; "
                "call `rope.angles(positions)` outside of it and pass the angles instead of positions"
            )
        if length is None and positions.numel():
            length = (positions.detach().flatten(0, -2).amax(0) + 1).clamp(min=0).tolist()
        return self.omega_at(length or 0.0)

    def angles(
        self,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
        length: float | Sequence[float] | None = None,
    ) -> RotaryAngles:
        """The work of one forward, done once for all layers.

        Args:
            positions: (s, a) or (b, s, a).
            dtype: of the heads that will be rotated.
            length: of the whole sequence where these positions are a part of it; used by schemes whose Omega
                depends on the length.
        """
        return make_angles(positions, self.omega_for(positions, length), self.spec, dtype)

    def cos_sin(
        self,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
        length: float | Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tables (..., s, 2r) as Hugging Face models expect them, each angle on both channels of its pair.

        Args:
            positions: (s, a) or (b, s, a).
            dtype: of the tables.
            length: as in `angles`.

        Raises:
            ValueError: a per-head Omega, which has no such table.
        """
        omega = self.omega_for(positions, length)
        check_positions(positions, omega)
        checks.check_head_dtype(dtype)
        cos, sin = definition.cos_sin(positions, omega, dtype, self.spec.factor, self.spec.mode)
        if cos.shape[-2] != 1:
            raise ValueError(
                f"a table is shared by all heads, but this Omega has {cos.shape[-2]}; call the module"
            )
        _, join = definition.PAIRINGS[self.spec.pairing]
        blocks = self.spec.blocks
        return join(cos, cos, blocks).squeeze(-2), join(sin, sin, blocks).squeeze(-2)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        positions: Tensor | RotaryAngles,
        k_positions: Tensor | RotaryAngles | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rotated queries and keys.

        Args:
            q: queries (b, s, h, d).
            k: keys (b, s, g, d), or None, which is returned as it is.
            positions: (s, a) or (b, s, a), or the angles made of them.
            k_positions: those of the keys where they are other tokens than the queries, as in
                cross-attention; the number of keys may differ, too.
        """
        self.check_width(q)
        if k is None:
            return self.rotate_one(q, positions), None
        if k_positions is not None:
            return self.rotate_one(q, positions), self.rotate_one(k, k_positions)
        if isinstance(positions, RotaryAngles):
            return positions.rotate(q, k)
        check_heads(q, k)
        return self.angles_for(q, positions).rotate(q, k)

    def rotate_one(self, x: Tensor, positions: Tensor | RotaryAngles) -> Tensor:
        """Rotated heads of one kind; `rope.angles(p).inverse.rotate_one(x)` rotates them back.

        Args:
            x: heads (b, s, h, d).
            positions: (s, a) or (b, s, a), or the angles made of them.
        """
        self.check_width(x)
        angles = positions if isinstance(positions, RotaryAngles) else self.angles_for(x, positions)
        return angles.rotate_one(x)

    def check_width(self, x: Tensor) -> None:
        """Refuse heads x (b, s, h, d) of another width than `head_dim`."""
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[-1] != self.head_dim:
            raise ValueError(
                f"heads have {x.shape[-1]} channels, but this Rotary is for head_dim {self.head_dim}; make "
                f"one of head_dim {x.shape[-1]}, or give it the channels that it shall rotate"
            )

    def angles_for(self, x: Tensor, positions: Tensor) -> RotaryAngles:
        """The angles that rotate heads x (b, s, h, d) at positions (s, a) or (b, s, a), checked."""
        omega = self.omega_for(positions)
        checks.check_rotation(x, x, positions, omega, self.spec.pairing, self.spec.blocks)
        return make_angles_for(x, positions, omega, self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # `.to(bfloat16)` would cost a learned Omega 0.7 rad at position 4095, so it moves but is never cast
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        device = fn(torch.empty(0)).device
        if device.type not in ("meta", "mps"):  # the one holds no numbers, the other none of float64
            self.static_omega = self.static_omega.to(device)
        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, {self.scheme}"
