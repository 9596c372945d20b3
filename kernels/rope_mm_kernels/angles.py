"""Cosine and sine (L, V) of V pairs of L lanes: made of positions and Omega, of angles, or read from tables.

All take the same arguments: positions, Omega and angles are (data, *strides), tables views as those of q.
"""

import triton
import triton.language as tl

from rope_mm_kernels.pairs import address, load_pairs
from rope_mm_kernels.trig import cos_sin, turns


@triton.jit
def load_position(positions, axis: tl.constexpr, batch, step):
    """Positions (L, 1) on one axis."""
    data, b, s, a = positions
    return tl.load(data + batch * b + step * s + tl.full((), axis, tl.int64) * a)[:, None]


@triton.jit
def load_omega(omega, axis: tl.constexpr, row, pair, A: tl.constexpr, r: tl.constexpr, V: tl.constexpr):
    """One row of a contiguous Omega on one axis, (L, V)."""
    column = axis * r + pair[:, None] + tl.arange(0, V)[None, :]
    return tl.load(omega[0] + row * (A * r) + column)


@triton.jit
def exact(
    positions, omega, batch, step, row, pair,
    A: tl.constexpr, r: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Of positions @ Omega as if it were not rounded."""
    position = load_position(positions, 0, batch, step)
    turn, low = turns(position, load_omega(omega, 0, row, pair, A, r, V))
    for axis in tl.static_range(1, A):
        position = load_position(positions, axis, batch, step)
        more, lower = turns(position, load_omega(omega, axis, row, pair, A, r, V))
        turn, low = turn + more, low + lower
    return cos_sin(turn, low)


@triton.jit
def hf(
    positions, omega, batch, step, row, pair,
    A: tl.constexpr, r: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Of positions @ Omega rounded to float32, product by product, as the tables of transformers are."""
    angle = tl.zeros((pair.shape[0], V), tl.float32)
    for axis in tl.static_range(A):
        position = load_position(positions, axis, batch, step).to(tl.float32)
        w = load_omega(omega, axis, row, pair, A, r, V).to(tl.float32)
        position, w = tl.broadcast(position, w)
        # an fma that adds nothing keeps the compiler from fusing the product with the sum
        angle += tl.fma(position, w, tl.zeros_like(w))
    turn, low = turns(angle, tl.full(angle.shape, 1.0, tl.float32))
    return cos_sin(turn, low)


@triton.jit
def table(
    cos, sin, batch, step, row, pair,
    A: tl.constexpr, r: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Read at the first channel of every pair."""
    c, _ = load_pairs(address(cos, batch, step, 0, UNIT), cos[4], None, pair, BLOCKS, V)
    s, _ = load_pairs(address(sin, batch, step, 0, UNIT), sin[4], None, pair, BLOCKS, V)
    return c, s


@triton.jit
def given(
    angles, omega, batch, step, row, pair,
    A: tl.constexpr, r: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Of angles (b, s, n, r) in radians."""
    data, b, s, n, stride = angles
    column = pair[:, None] + tl.arange(0, V)[None, :]
    angle = tl.load(data + (batch * b + step * s + row * n)[:, None] + column.to(tl.int64) * stride)
    turn, low = turns(angle, tl.full(angle.shape, 1.0, tl.float32))
    return cos_sin(turn, low)


@triton.jit
def store_angle_gradients(
    grad, positions, omega, omega_grad, position_grad,
    program, block, part, tokens, batch, step, row, pair,
    A: tl.constexpr, r: tl.constexpr, V: tl.constexpr,
    FIRST: tl.constexpr, CHUNKS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A program's part of the gradients of omega (A, r) and of positions (T, A), or angles (T, r)."""
    T: tl.constexpr = L // CHUNKS
    column, place = FIRST * V + tl.arange(0, CHUNKS * V), part.to(tl.int64) * T + tl.arange(0, T)
    if A == 0 and position_grad is not None:
        goal = position_grad + (block.to(tl.int64) * tokens + place[:, None]) * r + column[None, :]
        share = tl.reshape(grad, (T, CHUNKS * V))
        tl.store(goal, share, (place[:, None] < tokens) & (column[None, :] < r))
    for axis in tl.static_range(A):
        if omega_grad is not None:
            share = grad * load_position(positions, axis, batch, step).to(tl.float32)
            share = tl.sum(tl.reshape(share, (T, CHUNKS * V)), 0)
            tl.store(omega_grad + (program.to(tl.int64) * A + axis) * r + column, share, column < r)
        if position_grad is not None:
            share = grad * load_omega(omega, axis, row, pair, A, r, V).to(tl.float32)
            share = tl.sum(tl.reshape(share, (T, CHUNKS * V)), 1)
            tl.store(position_grad + (block.to(tl.int64) * tokens + place) * A + axis, share, place < tokens)


# "exact" and "hf" make angles of positions and Omega
ANGLES = {"exact": exact, "hf": hf, "given": given, "table": table}
