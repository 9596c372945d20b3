"""The one door to rotation: the Triton kernel where it runs, the definition elsewhere; same arguments.

`explain_dispatch` says which it is and why. Under torch.compile the graph holds the kernel's op or, on a
CPU, the definition, of which the compiler makes one pass over memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from rope_mm.rotary import cpu
from rope_mm.rotary import definition as rotation

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the kernel


@dataclass(frozen=True)
class RotarySpec:
    """How angles meet channels: pairing, its blocks, whether the last channels are rotated, and a factor."""

    pairing: str = "half"
    blocks: tuple[int, ...] = ()
    tail: bool = False
    factor: float = 1.0

    def __post_init__(self):
        rotation.PAIRINGS[self.pairing]  # an unknown one is refused here, not at the first forward


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


def explain_dispatch(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor) -> str:
    """Which way `rotate` takes with these tensors, and why, in a line.

    Raises:
        ValueError: what `rotate` refuses.
    """
    check(q, k, positions, omega)
    recorded = torch.compiler.is_compiling()
    if not (why := unsupported_reason(q.device, q.dtype)):
        way = "Triton's kernel, as an op of the graph" if recorded else "Triton's kernel"
        why = f"q is {q.dtype} on {q.device}"
    elif recorded:
        way = "the definition, for the compiler to fuse"
    elif uses_cpu_path(q):
        way = "the definition in parts that fit the CPU's cache (torch.compile makes one pass of it)"
    else:
        way = "the definition, a dozen passes over memory (torch.compile makes one of them)"
    copied = [name for name, x in (("positions", positions), ("Omega", omega)) if x.device != q.device]
    return f"{way}: {why}" + (f"; copied to it at every call: {', '.join(copied)}" if copied else "")


def uses_cpu_path(x: Tensor) -> bool:
    """Whether heads are rotated part by part; a compiler fuses the definition."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse q and k that differ in more than their heads, or are spread over processes."""
    # a DTensor is known by this method: to import the class would cost a second
    if any(hasattr(x, "full_tensor") for x in (q, k)):
        raise ValueError(
            "q or k is a DTensor, but every process rotates its own heads; give `to_local()` of both and, "
            "of an Omega per head, the rows of these heads"
        )
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be (b, s, heads, d), alike but for the heads, not {shapes}")


def check(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor) -> None:
    """Refuse what does not fit together, before anything is computed."""
    check_heads(q, k)
    check_positions(positions, omega)
    if positions.shape[-2] != q.shape[1] or (positions.dim() == 3 and len(positions) not in (1, len(q))):
        shapes = f"positions {tuple(positions.shape)} do not fit q {tuple(q.shape)}"
        raise ValueError(f"{shapes}; give one position for each token, (s, a) or (b, s, a)")


def check_positions(positions: Tensor, omega: Tensor) -> None:
    """Refuse positions that are not finite, too coarse to count or lack the axes of Omega."""
    if omega.dim() not in (2, 3) or not omega.numel():
        raise ValueError(
            f"Omega must be (a, r) or (heads, a, r) and hold something, not {tuple(omega.shape)}"
        )
    if positions.dim() not in (2, 3) or positions.shape[-1] != omega.shape[-2]:
        raise ValueError(
            f"positions {tuple(positions.shape)} must be (s, a) or (b, s, a), "
            f"with the a = {omega.shape[-2]} axes of Omega"
        )
    if positions.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"positions in {positions.dtype} cannot count past 256 or 2048; give whole numbers, float32 or "
            "float64 (FSDP casts a module's inputs unless cast_forward_inputs=False)"
        )
    # an accelerator would make the host wait for the answer, and a traced graph cannot ask
    if positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not positions.isfinite().all():
        raise ValueError("positions hold NaN or infinity; every token needs a finite place")


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, spec: RotarySpec) -> Tensor:
    """Heads x (b, s, h, d) rotated by tables: on a CPU in place by parts, the definition elsewhere."""
    rotate = cpu.apply_rotary if uses_cpu_path(x) else rotation.apply_rotary
    return rotate(x, cos, sin, spec.pairing, spec.blocks, spec.tail)


@dataclass(frozen=True, eq=False)
class RotaryAngles:
    """The work of one forward, done once for every layer.

    That is cos and sin (..., s, n, r) where the definition runs; the kernel makes its angles itself.
    """

    positions: Tensor
    omega: Tensor
    spec: RotarySpec
    cos: Tensor | None
    sin: Tensor | None

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (b, s, h, d) and k (b, s, g, d), rotated."""
        if self.cos is None or self.sin is None:
            return rotate(q, k, self.positions, self.omega, **vars(self.spec))
        check_heads(q, k)
        return self.rotate_one(q), self.rotate_one(k)

    def rotate_one(self, x: Tensor) -> Tensor:
        """Heads x (b, s, h, d) of one kind, rotated: keys of other tokens than the queries, or outputs."""
        if self.cos is None or self.sin is None:
            return rotate(x, x[:, :, :0], self.positions, self.omega, **vars(self.spec))[0]
        check_heads(x, x)
        if self.cos.shape[-3] != x.shape[1]:
            raise ValueError(
                f"these angles were made for {self.cos.shape[-3]} tokens, but heads are {(*x.shape,)}"
            )
        return apply_rotary(x, self.cos, self.sin, self.spec)

    @property
    def inverse(self) -> "RotaryAngles":
        """The angles that rotate back, their factor included."""
        spec = replace(self.spec, factor=1 / self.spec.factor)
        back = None if self.cos is None else self.cos / self.spec.factor**2
        sine = None if self.sin is None else -self.sin / self.spec.factor**2
        return RotaryAngles(self.positions, -self.omega, spec, back, sine)


def make_angles(
    positions: Tensor, omega: Tensor, spec: RotarySpec | str = "half", dtype: torch.dtype = torch.float32
) -> RotaryAngles:
    """What rotating by positions @ Omega needs, on the device of the positions, for heads of this dtype."""
    check_positions(positions, omega)
    spec = RotarySpec(spec) if isinstance(spec, str) else spec
    if kernel_supports(positions.device, dtype):
        return RotaryAngles(positions, omega.to(positions.device), spec, None, None)
    cos, sin = rotation.cos_sin(positions, omega, torch.promote_types(dtype, torch.float32), spec.factor)
    if torch.compiler.is_compiling():
        # what is stacked is stored; otherwise the compiler would make the same angles anew for every head
        cos, sin = torch.stack((cos, sin)).unbind()
    return RotaryAngles(positions, omega, spec, cos, sin)


def rotate(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    omega: Tensor,
    pairing: str = "half",
    *,
    blocks: Sequence[int] = (),
    tail: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    Args:
        q: queries.
        k: keys; they may have fewer heads.
        positions: (s, a) or (b, s, a), real numbers.
        omega: radians per step (a, r), or (n, a, r) with n dividing g; head j follows row j * n // heads.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.

    Raises:
        ValueError: shapes that do not fit, positions that are not finite, an unknown pairing.
    """
    check(q, k, positions, omega)
    spec = RotarySpec(pairing, tuple(blocks), tail, factor)
    if kernel_supports(q.device, q.dtype):
        from rope_mm_kernels.rotary import rotate as triton_rotate  # triton is optional

        return triton_rotate(q, k, positions, omega, **vars(spec))
    return make_angles(positions.to(q.device), omega, spec, q.dtype).rotate(q, k)
