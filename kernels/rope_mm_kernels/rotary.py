"""q (b, s, h, d), k (b, s, g, d), positions (s, a), Omega (a, r) -> q and k rotated, in one launch each way.

The angles are made where they are used, so no table is read. The inverse of a rotation is its transpose:
backward is the same kernel with the sine negated, and makes the angles' gradient from the saved results.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rope_mm_kernels.trig import cos_sin, less_whole, turns

PAIRINGS = ("half", "interleaved")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def address(x, batch, step, head, UNIT: tl.constexpr):
    """Pointers (T, H, 1) to where the heads of tokens begin; x is (data, strides of b, s, h, d)."""
    data, b, s, h, _ = x
    return data + UNIT * ((batch * b + step * s)[:, None, None] + (head * h)[None, :, None])


@triton.jit
def load_pairs(start, stride, inside, r: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second channel of every pair, (T, H, R) each, in float32."""
    if INTERLEAVED:
        # whole rows, split in registers: loads of every other channel would not be vectorised
        channel = tl.arange(0, 2 * R)
        x = tl.load(start + channel * stride, inside & (channel < 2 * r), 0.0).to(tl.float32)
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], R, 2)))
    else:
        pair = tl.arange(0, R)
        first = tl.load(start + pair * stride, inside & (pair < r), 0.0)
        second = tl.load(start + (pair + r) * stride, inside & (pair < r), 0.0)
        return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(x, y, start, stride, inside, r: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of `load_pairs`, for the pairs (x, y)."""
    if INTERLEAVED:
        channel = tl.arange(0, 2 * R)
        rows = tl.reshape(tl.join(x, y), (x.shape[0], x.shape[1], 2 * R))
        tl.store(start + channel * stride, rows, inside & (channel < 2 * r))
    else:
        pair = tl.arange(0, R)
        tl.store(start + pair * stride, x, inside & (pair < r))
        tl.store(start + (pair + r) * stride, y, inside & (pair < r))


@triton.jit
def load_turns(positions, omega, batch, step, row, known, A: tl.constexpr, r: tl.constexpr, R: tl.constexpr):
    """Angles positions @ Omega (T, rows, R) in turns, at most half of one."""
    data, b, s, a = positions
    place = data + (batch * b + step * s)[:, None, None]
    table, n, axis_stride, pair_stride = omega
    pair = tl.arange(0, R)
    column = table + (row * n)[None, :, None] + pair * pair_stride
    turn = tl.zeros((step.shape[0], row.shape[0], R), tl.float32)
    for axis in tl.static_range(A):
        position = tl.load(place + axis * a, known[:, None, None], 0)
        turn += turns(position, tl.load(column + axis * axis_stride, pair < r, 0.0))
    if A > 1:
        turn = less_whole(turn)
    return turn


@triton.jit
def rotate_block(
    x, out, rotated, angle_grad, positions, omega, batch, step, known, block, heads,
    N: tl.constexpr, A: tl.constexpr, r: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """T tokens of H heads: load, rotate, store; with `rotated`, also the gradient of their angles."""
    head = block * H + tl.arange(0, H)
    inside = known[:, None, None] & (head < heads)[None, :, None]
    head = head.to(tl.int64)
    # the heads are asked for first, so that the angles are made while they come
    start = address(x, batch, step, head, UNIT)
    x1, x2 = load_pairs(start, x[4], inside, r, R, INTERLEAVED)
    row = tl.minimum(head, heads - 1) * N // heads if N > 1 else tl.arange(0, 1)
    cos, sin = cos_sin(load_turns(positions, omega, batch, step, row, known, A, r, R))
    if INVERSE:
        sin = -sin
    goal = address(out, batch, step, head, UNIT)
    store_pairs(x1 * cos - x2 * sin, x1 * sin + x2 * cos, goal, out[4], inside, r, R, INTERLEAVED)
    if REST:
        channel = 2 * r + tl.arange(0, REST)
        rest = tl.load(start + channel * x[4], inside & (channel < D))
        tl.store(goal + channel * out[4], rest, inside & (channel < D))
    if rotated is not None:
        start = address(rotated, batch, step, head, UNIT)
        y1, y2 = load_pairs(start, rotated[4], inside, r, R, INTERLEAVED)
        # here x is the gradient of y, and back is where y came from
        grad = y1 * x2 - y2 * x1 if INVERSE else y2 * x1 - y1 * x2
        pair = tl.arange(0, R)
        if N > 1:
            tl.store(address(angle_grad, batch, step, head, 1) + pair, grad, inside & (pair < r))
        else:
            # heads that share an angle add up to one gradient per block; the host adds the blocks
            slots = address(angle_grad, batch, step, block + tl.zeros((1,), tl.int64), 1)
            tl.store(slots + pair, tl.sum(grad, 1, keep_dims=True), known[:, None, None] & (pair < r))


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, q_rotated, k_rotated, q_grad, k_grad, positions, omega, tokens, s, q_heads, k_heads,
    N: tl.constexpr, A: tl.constexpr, r: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """A program has T tokens and a block of H heads of q or k; blocks come first, to read positions once."""
    q_blocks = tl.cdiv(q_heads, H)
    blocks = q_blocks + tl.cdiv(k_heads, H)
    block = tl.program_id(0) % blocks
    token = tl.program_id(0) // blocks * T + tl.arange(0, T)
    known = token < tokens
    # tensors of more than 2**31 elements need offsets of 64 bits
    batch, step = (token // s).to(tl.int64), (token % s).to(tl.int64)
    if block < q_blocks:
        rotate_block(
            q, q_out, q_rotated, q_grad, positions, omega, batch, step, known, block, q_heads,
            N, A, r, R, REST, D, INTERLEAVED, INVERSE, UNIT, H,
        )  # fmt: skip
    else:
        rotate_block(
            k, k_out, k_rotated, k_grad, positions, omega, batch, step, known, block - q_blocks, k_heads,
            N, A, r, R, REST, D, INTERLEAVED, INVERSE, UNIT, H,
        )  # fmt: skip


def launch(q, k, positions, omega, pairing, inverse, rotated=()):
    """q and k rotated, and, given what the forward made, the gradient of the angles (b, s, n, r) in float32.

    Shapes: positions (b, s, a), omega (n, a, r); angles of n rows of heads.
    """
    (b, s, h, d), g, (n, a, r) = q.shape, k.shape[2], omega.shape
    width, heads = triton.next_power_of_2(r), min(triton.next_power_of_2(max(h, g)), 8)
    # 128 threads load 16 bytes of 16-bit data twice, once where each head has angles or gradients of its own
    tile = max(1, (1024 if rotated or n > 1 else 2048) // (width * heads))
    out = torch.empty_like(q), torch.empty_like(k)
    slots = [count if n > 1 else triton.cdiv(count, heads) for count in (h, g)] if rotated else []
    grads = [torch.empty((b, s, slot, r), dtype=torch.float32, device=q.device) for slot in slots]
    big = (q, k, *out, *rotated)
    # triton tells only multiples of 16 apart, and heads of 72 channels are aligned, too: counted in eights
    unit = math.gcd(8, *(stride for x in big for stride in x.stride()[:3]))
    views = [(x, *(stride // unit for stride in x.stride()[:3]), x.stride(3)) for x in big]
    views += [] if rotated else [None, None]
    views += [(x, *x.stride()) for x in grads] or [None, None]
    blocks = triton.cdiv(h, heads) + triton.cdiv(g, heads)
    with torch.cuda.device_of(q):
        rotate_kernel[(triton.cdiv(b * s, tile) * blocks,)](
            *views, (positions, *positions.stride()), (omega, *omega.stride()), b * s, s, h, g,
            N=n, A=a, r=r, R=width, REST=triton.next_power_of_2(d - 2 * r) if d > 2 * r else 0, D=d,
            INTERLEAVED=pairing == "interleaved", INVERSE=inverse, UNIT=unit, T=tile, H=heads,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return *out, sum_rows(grads, n) if rotated else None


def sum_rows(grads, n: int) -> Tensor:
    """Gradients of the angles of q's and of k's heads, (b, s, slots, r), summed over the slots of a row."""
    of_q, of_k = (grad.unflatten(2, (n, -1)).sum(3) for grad in grads)
    return of_q + of_k


def angle_gradient(rotated, grads, r: int, n: int, pairing: str, inverse: bool) -> Tensor:
    """What the kernel makes of y and dy, y1 dy2 - y2 dy1, in torch: here autograd can go on."""

    def pairs(x):
        x = x[..., : 2 * r].float()
        return x.chunk(2, -1) if pairing == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)

    def turned(y, grad):
        (y1, y2), (g1, g2) = pairs(y), pairs(grad)
        return y2 * g1 - y1 * g2 if inverse else y1 * g2 - y2 * g1

    return sum_rows([turned(y, grad) for y, grad in zip(rotated, grads, strict=True)], n)


class Rotate(torch.autograd.Function):
    """q and k rotated by positions (b, s, a) @ Omega (n, a, r), or back."""

    @staticmethod
    def forward(q, k, positions, omega, pairing, inverse):
        """q', k'."""
        return launch(q, k, positions, omega, pairing, inverse)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        """Keep what gradients need."""
        _, _, positions, omega, ctx.pairing, ctx.inverse = inputs
        # attention keeps the rotated q and k anyway, so keeping them here costs nothing
        ctx.save_for_backward(positions, omega, *(output if any(ctx.needs_input_grad[2:4]) else ()))

    @staticmethod
    def backward(ctx: Any, *grads):
        """The gradients of q, k, positions and omega."""
        positions, omega, *rotated = ctx.saved_tensors
        back = (positions, omega, ctx.pairing, not ctx.inverse)
        if torch.is_grad_enabled():
            # someone will differentiate the gradient, as penalties of a critic do
            dq, dk = Rotate.apply(*grads, *back)
            n, _, r = omega.shape
            angle = angle_gradient(rotated, grads, r, n, ctx.pairing, ctx.inverse) if rotated else None
        else:
            dq, dk, angle = launch(*grads, *back, rotated)
        dpositions = domega = None
        if angle is not None and ctx.needs_input_grad[2]:
            dpositions = torch.einsum("bsnr,nar->bsa", angle.double(), omega.double()).to(positions.dtype)
        if angle is not None and ctx.needs_input_grad[3]:
            domega = torch.einsum("bsnr,bsa->nar", angle.double(), positions.double()).to(omega.dtype)
        return dq, dk, dpositions, domega, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents):
        """Refuse: without this, tangents would be lost in silence."""
        raise NotImplementedError("the rotary kernel has no forward-mode derivative; use plain torch there")


def check(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str) -> None:
    """Refuse what does not fit together."""
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, positions {(*positions.shape,)}, omega {(*omega.shape,)}"
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {PAIRINGS}, not {pairing!r}")
    if q.dtype not in DTYPES or k.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype} and k {k.dtype}, but the kernel rotates {DTYPES}; use plain torch")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must be (b, s, heads, d) and differ in heads only: {shapes}")
    if omega.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"omega is {omega.dtype}; keep it in float32 or float64, or the angles are lost")
    if omega.dim() not in (2, 3) or not omega.numel():
        raise ValueError(f"omega must be (a, r) or (n, a, r): {shapes}")
    n, a, r = omega.shape if omega.dim() == 3 else (1, *omega.shape)
    if 2 * r > q.shape[3]:
        raise ValueError(f"{r} pairs need {2 * r} channels of each head; take a smaller omega: {shapes}")
    if q.shape[2] % n or k.shape[2] % n:
        raise ValueError(f"the {n} heads of omega must divide those of q and of k: {shapes}")
    if tuple(positions.shape) not in {(q.shape[1], a), (1, q.shape[1], a), (*q.shape[:2], a)}:
        raise ValueError(f"positions must be (s, a) or (b, s, a): {shapes}")


def rotate(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half"
) -> tuple[Tensor, Tensor]:
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    Args:
        q: queries in bfloat16, float16 or float32, of any strides.
        k: keys; they may have fewer heads.
        positions: (s, a) or (b, s, a), float or int.
        omega: radians per step (a, r), or (n, a, r) with n dividing g; head j follows row j * n // heads.
        pairing: "half" (i, i + r) or "interleaved" (2i, 2i + 1).

    Raises:
        ValueError: what does not fit together, an unknown pairing.
    """
    check(q, k, positions, omega, pairing)
    positions = positions.to(q.device).expand(*q.shape[:2], -1)
    omega = omega.to(q.device).reshape(-1, *omega.shape[-2:])
    return Rotate.apply(q, k, positions, omega, pairing, False)
