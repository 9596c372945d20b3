"""The one door to rotation: the Triton kernel where it runs, the definition elsewhere; same arguments.

Every function here refuses by the one list in `rope_mm_kernels.checks`. `explain_dispatch` says which way is
taken and why. Under torch.compile the graph holds the kernel's op or, on a CPU, the definition, of which the
compiler makes one pass over memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec

import torch
from rope_mm_kernels import checks
from rope_mm_kernels.checks import check_heads as check_heads
from rope_mm_kernels.checks import check_positions as check_positions
from rope_mm_kernels.in_place import check_in_place
from torch import Tensor

from rope_mm.rotary import cpu, definition
from rope_mm.rotary.cpu import Slot, WideTables

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the kernel


@dataclass(frozen=True)
class RotarySpec:
    """How angles are made and how they meet channels.

    Attributes:
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels of a head are rotated, not the first.
        factor: what cosine and sine are multiplied by.
        mode: "exact", or "hf" for angles rounded to float32 as in transformers.

    Raises:
        ValueError: an unknown pairing or mode, blocks of another pairing, a factor or tail that is none.
    """

    pairing: str = "half"
    blocks: tuple[int, ...] = ()
    tail: bool = False
    factor: float = 1.0
    mode: str = "exact"

    def __post_init__(self):
        checks.check_spec(self.pairing, self.blocks, self.factor, self.mode, self.tail)

    @cached_property
    def slot(self) -> Slot:
        """The channels alone."""
        return Slot(self.pairing, self.blocks, self.tail)


def unsupported_reason(device: torch.device | str, dtype: torch.dtype) -> str:
    """Why the Triton kernel does not rotate tensors of this device and dtype; empty where it does."""
    if torch.device(device).type != "cuda":
        return f"Triton's kernel runs on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"Triton's kernel rotates bfloat16, float16 and float32, not {dtype}"
    return "" if TRITON else "triton is not installed (pip install triton)"


def kernel_supports(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel rotates tensors of this device and dtype."""
    return not unsupported_reason(device, dtype)


def uses_parts(x: Tensor) -> bool:
    """Whether heads are rotated part by part: many of them, on a CPU, in eager mode and first derivatives."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.numel() > cpu.FEW
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def explain_dispatch(q: Tensor, k: Tensor | None, positions: Tensor, omega: Tensor) -> str:
    """Which way `rotate` takes with these tensors, and why, in a line.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d), or None.
        positions: (s, a) or (b, s, a), whole numbers, float32 or float64.
        omega: radians per step (a, r), or (n, a, r).

    Raises:
        ValueError: what `rotate` refuses.
    """
    checks.check_rotation(q, keys_or_empty(q, k), positions, omega)
    recorded = torch.compiler.is_compiling()
    if not (why := unsupported_reason(q.device, q.dtype)):
        way = "Triton's kernel, as an op of the graph" if recorded else "Triton's kernel"
        why = f"q is {q.dtype} on {q.device}"
    elif recorded:
        way = "the definition, for the compiler to fuse"
    elif uses_parts(q):
        way = "the definition in parts that fit the CPU's cache (torch.compile makes one pass of it)"
    else:
        way = "the definition in three passes over memory (torch.compile makes one of them)"
        why += f"; few heads, {q.numel()} numbers" * (q.device.type == "cpu" and q.numel() <= cpu.FEW)
    copied = [name for name, x in (("positions", positions), ("Omega", omega)) if x.device != q.device]
    return f"{way}: {why}" + (f"; copied to it at every call: {', '.join(copied)}" if copied else "")


@dataclass(frozen=True, eq=False)
class RotaryAngles:
    """The work of one forward, done once for all layers.

    The kernel makes its angles itself, of positions and Omega; for the definition there are tables.

    Attributes:
        positions: (s, a) or (b, s, a); None where angles or tables were given.
        omega: (a, r) or (n, a, r); None with the positions.
        spec: how angles meet channels.
        angle: radians (..., s, n, r), where they were given or a gradient reaches them.
        cos: cosines (..., s, n, r); None for the kernel.
        sin: sines (..., s, n, r); None for the kernel.
        wide: both tables on every channel, for eager mode.
    """

    positions: Tensor | None
    omega: Tensor | None
    spec: RotarySpec
    angle: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    wide: WideTables | None = None

    @property
    def tokens(self) -> int:
        """How many tokens s the angles are made for."""
        for x, dim in ((self.cos, -3), (self.positions, -2), (self.angle, -3)):
            if x is not None:
                return x.shape[dim]
        raise ValueError("angles without positions and tables are of no tokens")

    def check_fit(self, x: Tensor) -> None:
        """Refuse heads x (b, s, h, d) of other tokens or sizes."""
        if self.cos is None:
            return
        (b, s, h, d), (n, r) = x.shape, self.cos.shape[-2:]
        rows = self.cos.shape[0] if self.cos.dim() == 4 else 1
        if s == self.cos.shape[-3] and rows in (1, b) and 2 * r <= d and not h % n:
            return  # as a rule; what follows says why not
        if self.tokens != x.shape[1]:
            raise ValueError(f"these angles were made for {self.tokens} tokens, but heads are {(*x.shape,)}")
        definition.check_fit(x, self.cos, self.spec.pairing, self.spec.blocks)

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys.

        Args:
            q: queries (b, s, h, d).
            k: keys (b, s, g, d).

        Raises:
            ValueError: heads that do not fit the angles.
        """
        check_heads(q, k)
        if self.cos is None:
            return self.launch(q, k)
        # one pass over few heads; its results are views, so it is for where nothing needs a gradient
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, self.cos))
        apart = graded or torch.jit.is_tracing()  # a trace serves where gradients are needed, too
        if apart or self.wide is None or self.cos.shape[-2] > 1 or q.numel() > cpu.TINY:
            return self.rotate_checked(q), self.rotate_checked(k)
        self.check_fit(q)
        both = cpu.rotate_plain(torch.cat((q, k), 2), self.wide, self.spec.slot)
        q_rotated, k_rotated = torch.split_with_sizes(both, (q.shape[2], k.shape[2]), 2)
        return q_rotated, k_rotated

    def rotate_one(self, x: Tensor) -> Tensor:
        """Rotated heads of one kind: keys of other tokens than the queries, or outputs.

        Args:
            x: heads (b, s, h, d).

        Raises:
            ValueError: heads that do not fit the angles.
        """
        check_heads(x, x)
        return self.launch(x, x[:, :, :0])[0] if self.cos is None else self.rotate_checked(x)

    def rotate_(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`rotate` that overwrites q and k, with the same gradients, and returns them.

        Raises:
            ValueError: as `rotate`, and leaves that require grad, expanded tensors, q and k that overlap.
        """
        check_heads(q, k)
        check_in_place(q, k)
        if self.cos is None:
            return self.launch(q, k, in_place=True)
        for x in (q, k):
            self.check_fit(x)
            self.overwrite(x)
        return q, k

    def launch(self, q: Tensor, k: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """q and k rotated by the Triton kernel."""
        from rope_mm_kernels import rotary  # triton is optional

        spec = self.spec
        how = {"pairing": spec.pairing, "blocks": spec.blocks, "tail": spec.tail, "factor": spec.factor}
        if self.angle is not None:
            rotated = rotary.rotate_by_angles(q, k, self.angle, **how)
            return (q.copy_(rotated[0]), k.copy_(rotated[1])) if in_place else rotated
        assert self.positions is not None and self.omega is not None
        function = rotary.rotate_ if in_place else rotary.rotate
        return function(q, k, self.positions, self.omega, mode=self.spec.mode, **how)

    def rotate_checked(self, x: Tensor) -> Tensor:
        """Heads x (b, s, h, d) rotated by tables, the way that `explain_dispatch` names."""
        self.check_fit(x)
        if self.wide is None:
            assert self.cos is not None and self.sin is not None
            spec = self.spec
            return definition.apply_rotary(x, self.cos, self.sin, spec.pairing, spec.blocks, spec.tail)
        slot = self.spec.slot
        if not uses_parts(x):
            return cpu.rotate_plain(x, self.wide, slot)
        cos, sin = self.wide
        learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
        if learned and self.angle is None:
            return cpu.rotate_plain(x, self.wide, slot)  # tables with a gradient of their own
        if learned or (torch.is_grad_enabled() and x.requires_grad):
            inputs = (self.angle if learned else None, cos.detach(), sin.detach(), self.spec.factor, slot)
            return cpu.RotateInParts.apply(x, *inputs)
        return cpu.rotate_in_parts(x, self.wide, slot)

    def overwrite(self, x: Tensor) -> None:
        """Write rotated heads over x (b, s, h, d)."""
        if self.wide is None or torch._C._are_functorch_transforms_active():
            x.copy_(self.rotate_checked(x.clone()))
            return
        cos, sin = self.wide
        learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
        if learned and self.angle is None:
            x.copy_(self.rotate_checked(x.clone()))
            return
        angle = self.angle if learned else None
        cpu.RotateInPlace.apply(x, angle, cos.detach(), sin.detach(), self.spec.factor, self.spec.slot)

    def select_rows(self, index: Tensor) -> "RotaryAngles":
        """The angles of rows of the batch, in any order and number; angles that all rows share stay.

        Args:
            index: (rows,), numbers of rows.
        """

        def select(x: Tensor | None, dims: int) -> Tensor | None:
            return x if x is None or x.dim() < dims or len(x) == 1 else x[index]

        tables = {name: select(getattr(self, name), 4) for name in ("angle", "cos", "sin")}
        wide = self.wide and WideTables(*(x if x.dim() < 4 or len(x) == 1 else x[index] for x in self.wide))
        return replace(self, positions=select(self.positions, 3), wide=wide, **tables)

    @property
    def inverse(self) -> "RotaryAngles":
        """The angles that rotate back, their factor included."""
        spec, scale = replace(self.spec, factor=1 / self.spec.factor), 1 / self.spec.factor**2
        return RotaryAngles(
            self.positions,
            None if self.omega is None else -self.omega,
            spec,
            None if self.angle is None else -self.angle,
            None if self.cos is None else self.cos * scale,
            None if self.sin is None else self.sin * -scale,
            None if self.wide is None else self.wide.inverse(scale),
        )


def tables_of(
    angle: Tensor, spec: RotarySpec, dtype: torch.dtype, positions: Tensor | None, omega: Tensor | None
) -> RotaryAngles:
    """Angles (..., s, n, r) with tables for heads of this dtype."""
    cos, sin = definition.cos_sin_of(angle, torch.promote_types(dtype, torch.float32), spec.factor)
    if torch.compiler.is_compiling():
        # what is stacked is stored; otherwise the compiler would make the same angles anew for every head
        cos, sin = torch.stack((cos, sin)).unbind()
        return RotaryAngles(positions, omega, spec, angle, cos, sin)
    wide = cpu.widen(cos, sin, spec.slot)
    return RotaryAngles(positions, omega, spec, angle if angle.requires_grad else None, cos, sin, wide)


def make_angles(
    positions: Tensor, omega: Tensor, spec: RotarySpec | str = "half", dtype: torch.dtype = torch.float32
) -> RotaryAngles:
    """What rotating by positions @ Omega needs, on the device of the positions.

    Args:
        positions: (s, a) or (b, s, a).
        omega: (a, r) or (n, a, r).
        spec: how angles meet channels, or a pairing.
        dtype: of the heads that will be rotated.

    Raises:
        ValueError: positions, an Omega or a dtype that are refused.
    """
    check_positions(positions, omega)
    checks.check_head_dtype(dtype)
    spec = spec if isinstance(spec, RotarySpec) else RotarySpec(spec)  # which refuses all but a pairing
    if kernel_supports(positions.device, dtype):
        return RotaryAngles(positions, omega.to(positions.device), spec)
    angle = definition.angles(positions, omega, spec.mode)
    return tables_of(angle, spec, dtype, positions, omega)


def keys_or_empty(q: Tensor, k: Tensor | None) -> Tensor:
    """The keys, or where there are none, keys of no heads."""
    if k is not None:
        return k
    return q[:, :, :0] if isinstance(q, Tensor) and q.dim() == 4 else q


def rotate(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    omega: Tensor,
    pairing: str = "half",
    *,
    blocks: Sequence[int] = (),
    tail: bool = False,
    factor: float = 1.0,
    mode: str = "exact",
) -> tuple[Tensor, Tensor | None]:
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    Args:
        q: queries, floating point.
        k: keys of the same dtype; they may have fewer heads. None: there are none, and None is returned.
        positions: (s, a) or (b, s, a), whole numbers, float32 or float64.
        omega: radians per step (a, r), or (n, a, r) with n dividing g; head j follows row j * n // heads.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.
        mode: "exact", or "hf" for the angles of transformers, rounded to float32.

    Raises:
        ValueError: what does not fit together, by `rope_mm_kernels.checks.check_rotation`.

    Examples:
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> quarter = torch.tensor([[torch.pi / 2]], dtype=torch.float64)
        >>> q, k = rotate(x, x, torch.ones(1, 1), quarter)
        >>> [round(value, 6) + 0.0 for value in q.flatten().tolist()]
        [0.0, 1.0]
    """
    keys = keys_or_empty(q, k)
    checks.check_rotation(q, keys, positions, omega, pairing, blocks, factor, mode, tail)
    angles = make_angles_for(q, positions, omega, RotarySpec(pairing, tuple(blocks), tail, factor, mode))
    return (angles.rotate_one(q), None) if k is None else angles.rotate(q, k)


def rotate_(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    omega: Tensor,
    pairing: str = "half",
    *,
    blocks: Sequence[int] = (),
    tail: bool = False,
    factor: float = 1.0,
    mode: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`rotate` that overwrites q and k, with the same gradients, and returns them.

    Args:
        q: queries (b, s, h, d), overwritten.
        k: keys (b, s, g, d), overwritten.
        positions: (s, a) or (b, s, a), whole numbers, float32 or float64.
        omega: radians per step (a, r), or (n, a, r) with n dividing g.
        pairing: "half", "interleaved" or "block".
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.
        mode: "exact", or "hf" for the angles of transformers, rounded to float32.

    Raises:
        ValueError: as `rotate`, and a q or k that is a leaf that requires grad, or expanded, or shares
            elements with the other; torch.export with strict=True cannot refuse the last.
    """
    checks.check_rotation(q, k, positions, omega, pairing, blocks, factor, mode, tail)
    spec = RotarySpec(pairing, tuple(blocks), tail, factor, mode)
    return make_angles_for(q, positions, omega, spec).rotate_(q, k)


def make_angles_for(q: Tensor, positions: Tensor, omega: Tensor, spec: RotarySpec) -> RotaryAngles:
    """The angles for heads q (b, s, h, d) and what was checked with them, on the device of q."""
    positions = positions.to(q.device)
    if kernel_supports(q.device, q.dtype):
        return RotaryAngles(positions, omega.to(q.device), spec)
    return tables_of(definition.angles(positions, omega, spec.mode), spec, q.dtype, positions, omega)


def angles_from(q: Tensor, angles: Tensor, spec: RotarySpec) -> RotaryAngles:
    """Given angles (s, r), (b, s, r) or (b, s, n, r), ready for heads q (b, s, h, d)."""
    angle = (angles if angles.dim() == 4 else angles.unsqueeze(-2)).to(q.device)
    if kernel_supports(q.device, q.dtype):
        return RotaryAngles(None, None, spec, angle if angle.dim() == 4 else angle[None])
    return tables_of(angle, spec, q.dtype, None, None)


def rotate_by_angles(
    q: Tensor,
    k: Tensor | None,
    angles: Tensor,
    pairing: str = "half",
    *,
    blocks: Sequence[int] = (),
    tail: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """q and k rotated by given angles, with gradients to all three.

    For angles that depend on the content, such as those of Selective RoPE (arXiv 2511.17388) and Mamba-3.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d), or None.
        angles: radians (s, r), (b, s, r), or (b, s, n, r) with n dividing g, in float32 or float64.
        pairing: "half", "interleaved" or "block".
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.

    Raises:
        ValueError: what does not fit together.

    Examples:
        >>> q, k = torch.ones(1, 6, 4, 16), torch.ones(1, 6, 2, 16)
        >>> steps = torch.rand(1, 6, 2, 8)  # of each token, key head and pair, from a layer of the model
        >>> q, k = rotate_by_angles(q, k, steps.cumsum(1))
        >>> q.shape, k.shape
        (torch.Size([1, 6, 4, 16]), torch.Size([1, 6, 2, 16]))
    """
    keys = keys_or_empty(q, k)
    checks.check_angle_rotation(q, keys, angles, pairing, blocks, factor, tail)
    made = angles_from(q, angles, RotarySpec(pairing, tuple(blocks), tail, factor))
    return (made.rotate_one(q), None) if k is None else made.rotate(q, k)


def rotate_by_table(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str = "half",
    *,
    blocks: Sequence[int] = (),
    tail: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q and k rotated by given cosines and sines, with gradients to q and k and, without the kernel, to both.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d), or None.
        cos: (1, s, 2r) or (b, s, 2r) as in transformers; of a pair, the first channel's entry is read.
        sin: as cos.
        pairing: "half", "interleaved" or "block".
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.

    Raises:
        ValueError: what does not fit together.
    """
    keys = keys_or_empty(q, k)
    checks.check_table_rotation(q, keys, cos, sin, pairing, blocks, tail)
    spec = RotarySpec(pairing, tuple(blocks), tail)
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if kernel_supports(q.device, q.dtype) and not learned:
        from rope_mm_kernels.table import rotate_by_table as launch  # triton is optional

        rotated, rotated_keys = launch(q, keys, cos, sin, pairing, blocks=spec.blocks, tail=tail)
        return rotated, None if k is None else rotated_keys
    made = angles_from_tables(q, cos, sin, spec)
    return (made.rotate_one(q), None) if k is None else made.rotate(q, k)


def angles_from_tables(q: Tensor, cos: Tensor, sin: Tensor, spec: RotarySpec) -> RotaryAngles:
    """Given tables (1 or b, s, 2r), ready for heads q (b, s, h, d)."""
    split, _ = definition.PAIRINGS[spec.pairing]
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (split(x.to(q.device, wide), spec.blocks)[0].unsqueeze(-2) for x in (cos, sin))
    tables = None if torch.compiler.is_compiling() else cpu.widen(cos, sin, spec.slot)
    return RotaryAngles(None, None, spec, None, cos, sin, tables)
