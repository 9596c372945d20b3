"""What a rotation is but for its tensors, and how it is cut into programs."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rope_mm_kernels.angles import ANGLES
from rope_mm_kernels.checks import check_rotation
from rope_mm_kernels.pairs import block_sizes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the kernels
# a program has this many lanes, twice as many where a lane has few heads, and at most this many heads
LANES, HEADS = 128, 8


class KernelSpec(NamedTuple):
    """What a kernel is compiled for; all is plain data, so that an op can be given it.

    Attributes:
        n: rows of Omega.
        a: axes.
        r: rotated pairs.
        blocks: block sizes as in `pairs`.
        front: the first rotated channel.
        mode: a key of ANGLES.
        factor: what cosine and sine are multiplied by.
        inverse: whether the sine is negated.
    """

    n: int
    a: int
    r: int
    blocks: tuple[int, ...]
    front: int
    mode: str
    factor: float = 1.0
    inverse: bool = False

    def back(self) -> "KernelSpec":
        """The transpose."""
        return self._replace(inverse=not self.inverse)


def make_spec(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str,
    blocks: tuple[int, ...], tail: bool, factor: float, mode: str,
) -> KernelSpec:  # fmt: skip
    """The spec of a rotation by positions @ Omega.

    Raises:
        ValueError: what does not fit together, by `check_rotation`.
    """
    check_rotation(q, k, positions, omega, pairing, blocks, factor, mode, tail)
    n, a, r = omega.shape if omega.dim() == 3 else (1, *omega.shape)
    front = q.shape[3] - 2 * r if tail else 0
    return KernelSpec(n, a, r, block_sizes(pairing, r, tuple(blocks)), front, mode, float(factor))


def heads_per_program(heads: int, n: int, most: int) -> int:
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
    q: Tensor, k: Tensor, sources: tuple[Tensor, Tensor], spec: KernelSpec,
    big: tuple[Tensor, ...], whole: bool, most: int = HEADS, piece: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """How a launch on tensors `big` is cut; with `whole`, no token is shared by two programs.

    `piece` is the first lane of a token, and how many from it on, where a launch has not all of them.
    """
    (b, s, h, d), g = q.shape, k.shape[2]
    v = pairs_of_a_lane(q, spec)
    first, chunks = 0, spec.r // v
    width = triton.next_power_of_2(math.ceil((d - 2 * spec.r) / chunks)) if d > 2 * spec.r else 0
    if piece:
        first, chunks = piece
    elif whole:
        chunks = triton.next_power_of_2(chunks)
    heads = tuple(max(1, heads_per_program(count, spec.n, most)) for count in (h, g))
    lanes = LANES if 4 * max(heads) > most else 2 * LANES
    if whole:
        lanes = max(lanes, chunks)
    # triton distinguishes only multiples of 16, and heads of 72 channels are aligned, too: counted in eights
    strided = (*big, *sources) if spec.mode == "table" else big
    unit = math.gcd(8, *(stride for x in strided for stride in x.stride()[:3]))
    parts = math.ceil(b * s * chunks / lanes)
    return Plan(parts, (math.ceil(h / heads[0]), math.ceil(g / heads[1])), {
        "ANGLES": ANGLES[spec.mode], "FACTOR": spec.factor, "INVERSE": spec.inverse, "BLOCKS": spec.blocks,
        "A": spec.a, "r": spec.r, "FRONT": spec.front, "REST": d - 2 * spec.r, "W": width,
        "UNIT": unit, "V": v, "FIRST": first, "CHUNKS": chunks, "L": lanes, "HEADS": heads,
        "WIDE": parts * lanes >= 2**31, "num_warps": LANES // lanes_of_a_warp(q), "enable_fp_fusion": True,
    })  # fmt: skip


def pairs_of_a_lane(q: Tensor, spec: KernelSpec) -> int:
    """16 bytes of every lane, or as much as divides all blocks."""
    wide = 16 // q.element_size()
    return math.gcd(wide // 2, spec.r) if spec.blocks == (1,) else math.gcd(wide, *spec.blocks)


def pieces(chunks: int) -> list[tuple[int, int]]:
    """The lanes of a token in one or two powers of two, (first, number): 9 are 8 and 1, 7 are 8.

    The sums of a program run over powers of two, and padding 9 to 16 would waste nearly half of its work.
    """
    most = 1 << (chunks.bit_length() - 1)
    rest = triton.next_power_of_2(chunks - most) if chunks > most else 0
    return [(0, 2 * most)] if rest == most else [(0, most), (most, rest)][: 1 + bool(rest)]


def plan_launches(
    q: Tensor, k: Tensor, sources: tuple[Tensor, Tensor], spec: KernelSpec,
    big: tuple[Tensor, ...], whole: bool,
) -> list[Plan]:  # fmt: skip
    """The launches of a rotation: one, or with `whole` one for each of the `pieces` of a token."""
    cut = pieces(spec.r // pairs_of_a_lane(q, spec)) if whole else [None]
    return [plan(q, k, sources, spec, big, whole, piece=piece) for piece in cut]


def view(x: Tensor, unit: int) -> tuple[Tensor, int, int, int, int]:
    """Data and strides of x (b, s, h, d), those of b, s, h in units."""
    b, s, h, d = x.stride()
    return x, b // unit, s // unit, h // unit, d


def source(x: Tensor, spec: KernelSpec, unit: int) -> tuple:
    """Data and strides of positions, Omega or angles, or the `view` of a table (b, s, 1, 2r)."""
    return view(x, unit) if spec.mode == "table" else (x, *x.stride())
