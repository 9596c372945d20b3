"""What a rotation is but for its tensors, what it refuses, and how it is cut into programs."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rope_mm_kernels.angles import ANGLES, MODES
from rope_mm_kernels.pairs import PAIRINGS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a program has this many lanes, twice as many where a lane has few heads, and at most this many heads
LANES, HEADS = 128, 8


class Form(NamedTuple):
    """n rows of Omega, a axes, r pairs in `blocks` as in `pairs`, which begin at channel `front`.

    `mode` is a key of ANGLES; all is plain data, so that an op can be given it.
    """

    n: int
    a: int
    r: int
    blocks: tuple[int, ...]
    front: int
    mode: str
    factor: float = 1.0
    inverse: bool = False

    def back(self) -> "Form":
        """The transpose."""
        return self._replace(inverse=not self.inverse)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse q and k that no kernel takes."""
    if any(hasattr(x, "full_tensor") for x in (q, k)):
        raise ValueError(
            "q or k is a DTensor, but a kernel reads its own process's memory; give `to_local()`"
        )
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}"
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(
            f"q is {q.dtype} and k {k.dtype}, but the kernel rotates one of {DTYPES}; use plain torch"
        )
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must be (b, s, heads, d) and differ in heads only: {shapes}")


def blocks_of(pairing: str, r: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The block sizes of a pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {(*PAIRINGS,)}, not {pairing!r}")
    blocks = tuple(blocks)
    if pairing != "block" and blocks:
        raise ValueError(f"blocks {blocks} are of pairing 'block'; leave them out of {pairing!r}")
    if pairing == "block" and (sum(blocks) != r or min(blocks) < 1):
        raise ValueError(f"blocks must be numbers of pairs that add up to {r}, not {blocks}")
    return PAIRINGS[pairing](r, blocks)


def form_of(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str,
    blocks: tuple[int, ...], tail: bool, factor: float, mode: str,
) -> Form:  # fmt: skip
    """The form of a rotation by positions @ Omega; refuses what does not fit together."""
    check_heads(q, k)
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, positions {(*positions.shape,)}, omega {(*omega.shape,)}"
    if mode not in MODES:
        raise ValueError(f"mode must be one of {(*MODES,)}, not {mode!r}")
    if omega.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"omega is {omega.dtype}; keep it in float32 or float64, or the angles are lost")
    if omega.dim() not in (2, 3) or not omega.numel():
        raise ValueError(f"omega must be (a, r) or (n, a, r): {shapes}")
    n, a, r = omega.shape if omega.dim() == 3 else (1, *omega.shape)
    if 2 * r > q.shape[3]:
        raise ValueError(f"{r} pairs need {2 * r} channels of each head; take a smaller omega: {shapes}")
    if q.shape[2] % n or k.shape[2] % n:
        raise ValueError(f"the {n} heads of omega must divide those of q and of k: {shapes}")
    if tuple(positions.shape) not in ((q.shape[1], a), (1, q.shape[1], a), (*q.shape[:2], a)):
        raise ValueError(f"positions must be (s, a) or (b, s, a): {shapes}")
    front = q.shape[3] - 2 * r if tail else 0
    return Form(n, a, r, blocks_of(pairing, r, blocks), front, mode, float(factor))


def heads_of(heads: int, n: int, most: int) -> int:
    """How many of these a program has: blocks alike, or all of one row of Omega."""
    if n == 1:
        return math.ceil(heads / max(1, math.ceil(heads / most)))
    return max(count for count in range(1, most + 1) if heads // n % count == 0)


def lanes_of_a_warp(x: Tensor) -> int:
    """32, or 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32


class Plan(NamedTuple):
    """Programs along tokens, blocks of heads of q and of k, and the constants of the kernel."""

    parts: int
    blocks: tuple[int, int]
    constants: dict[str, Any]


def plan(
    q: Tensor, k: Tensor, sources: tuple[Tensor, Tensor], form: Form,
    big: tuple[Tensor, ...], whole: bool, most: int = HEADS,
) -> Plan:  # fmt: skip
    """How a launch on tensors `big` is cut; with `whole`, no token is shared by two programs."""
    (b, s, h, d), g = q.shape, k.shape[2]
    wide = 16 // q.element_size()
    # 16 bytes of every lane, or as much as divides all blocks
    v = math.gcd(wide // 2, form.r) if form.blocks == (1,) else math.gcd(wide, *form.blocks)
    chunks = form.r // v
    width = triton.next_power_of_2(math.ceil((d - 2 * form.r) / chunks)) if d > 2 * form.r else 0
    if whole:
        chunks = triton.next_power_of_2(chunks)
    heads = tuple(max(1, heads_of(count, form.n, most)) for count in (h, g))
    lanes = LANES if 4 * max(heads) > most else 2 * LANES
    if whole:
        lanes = max(lanes, chunks)
    # triton tells only multiples of 16 apart, and heads of 72 channels are aligned, too: counted in eights
    strided = (*big, *sources) if form.mode == "table" else big
    unit = math.gcd(8, *(stride for x in strided for stride in x.stride()[:3]))
    parts = math.ceil(b * s * chunks / lanes)
    return Plan(parts, (math.ceil(h / heads[0]), math.ceil(g / heads[1])), {
        "ANGLES": ANGLES[form.mode], "FACTOR": form.factor, "INVERSE": form.inverse, "BLOCKS": form.blocks,
        "A": form.a, "r": form.r, "FRONT": form.front, "REST": d - 2 * form.r, "W": width,
        "UNIT": unit, "V": v, "CHUNKS": chunks, "L": lanes, "HEADS": heads, "WIDE": parts * lanes >= 2**31,
        "num_warps": LANES // lanes_of_a_warp(q), "enable_fp_fusion": True,
    })  # fmt: skip


def view(x: Tensor, unit: int) -> tuple[Tensor, int, int, int, int]:
    """Data and strides of x (b, s, h, d), those of b, s, h in units."""
    b, s, h, d = x.stride()
    return x, b // unit, s // unit, h // unit, d


def source(x: Tensor, form: Form, unit: int) -> tuple:
    """Data and strides of positions or Omega, or the `view` of a table (b, s, 1, 2r)."""
    return view(x, unit) if form.mode == "table" else (x, *x.stride())
