"""q (b, s, h, d), k (b, s, g, d), positions (s, a), Omega (a, r) -> q and k rotated, in one launch each way.

The angles are made where they are used, so no table is read. The inverse of a rotation is its transpose:
backward is the same kernel with the sine negated, and makes the angles' gradient from the saved results.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rope_mm_kernels import definition
from rope_mm_kernels.angles import store_angle_gradients
from rope_mm_kernels.form import Form, form_of, plan, source, view
from rope_mm_kernels.ops import differentiate, register
from rope_mm_kernels.pairs import address, copy_rest, load_pairs, locate, pick, store_pairs


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, q_rotated, k_rotated, positions, omega, omega_grad, position_grad,
    tokens, s, q_heads, k_heads, n,
    ANGLES: tl.constexpr, FACTOR: tl.constexpr, INVERSE: tl.constexpr, BLOCKS: tl.constexpr,
    A: tl.constexpr, r: tl.constexpr, FRONT: tl.constexpr, REST: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """L lanes, each of them V pairs of a token, and some heads of q or of k, in all of which they turn alike.

    Blocks of heads come first in the grid, so that positions are read from memory once.
    """
    H: tl.constexpr = max(HEADS[0], HEADS[1])
    q_blocks = tl.cdiv(q_heads, HEADS[0])
    blocks = q_blocks + tl.cdiv(k_heads, HEADS[1])
    program = tl.program_id(0)
    block, part = program % blocks, program // blocks
    batch, step, pair, known = locate(part, tokens, s, r, V, CHUNKS, L, WIDE)
    of_q = block < q_blocks
    heads = tl.where(of_q, q_heads, k_heads)
    head = tl.where(of_q, block * HEADS[0], (block - q_blocks) * HEADS[1])
    end = tl.minimum(heads, head + tl.where(of_q, HEADS[0], HEADS[1]))
    row = (head * n // heads).to(tl.int64)
    x, out = pick(of_q, q, k), pick(of_q, q_out, k_out)
    start, goal = address(x, batch, step, head, UNIT), address(out, batch, step, head, UNIT)
    # all heads are asked for first, so that the angles are made while they come
    pairs = ()
    for i in tl.static_range(H):
        here = start + tl.minimum(i, end - head - 1) * x[3] * UNIT
        pairs += (load_pairs(here + FRONT * x[4], x[4], None, pair, BLOCKS, V),)
    cos, sin = ANGLES(positions, omega, batch, step, row, pair, A, r, BLOCKS, UNIT, V)
    if FACTOR != 1:
        cos, sin = cos * FACTOR, sin * FACTOR
    if INVERSE:
        sin = -sin
    grad = tl.zeros((L, V), tl.float32)
    for i in tl.static_range(H):
        inside = known & (head + i < end)
        x1, x2 = pairs[i]
        if q_rotated is not None:
            y = pick(of_q, q_rotated, k_rotated)
            back = address(y, batch, step, head, UNIT) + i * y[3] * UNIT + FRONT * y[4]
            y1, y2 = load_pairs(back, y[4], inside, pair, BLOCKS, V)
            # here x is the gradient of y, and back is where y came from
            grad += y1 * x2 - y2 * x1 if INVERSE else y2 * x1 - y1 * x2
        there, here = goal + i * out[3] * UNIT, start + i * x[3] * UNIT
        y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
        store_pairs(y1, y2, there + FRONT * out[4], out[4], inside, pair, BLOCKS, V)
        if W:
            copy_rest(here, x[4], there, out[4], inside, pair // V, 0 if FRONT else 2 * r, REST, W)
    if q_rotated is not None:
        store_angle_gradients(
            grad, positions, omega, omega_grad, position_grad,
            program, block, part, tokens, batch, step, row, pair, A, r, V, CHUNKS, L,
        )  # fmt: skip


def launch(q, k, positions, omega, form, rotated=(), needs=(False, False), out=None):
    """q and k rotated; with `rotated`, what forward made, also the gradients of positions and omega needed.

    Shapes: positions (b, s, a), omega (n, a, r); or tables, both (b, s, 1, 2r).
    """
    (b, s, h, _), g = q.shape, k.shape[2]
    made = (torch.empty_like(q), torch.empty_like(k)) if out is None else out
    big = (q, k, *made, *rotated)
    sources = positions, omega
    parts, blocks, constants = plan(q, k, sources, form, big, whole=bool(rotated))
    if out is not None:
        constants["W"] = 0  # what is not rotated is there already
    dpositions, domega = empty_parts(q, form, parts, blocks, needs)
    with torch.cuda.device_of(q):
        rotate_kernel[(parts * sum(blocks),)](
            *[view(x, constants["UNIT"]) for x in big], *[None] * (6 - len(big)),
            *[source(x, form, constants["UNIT"]) for x in sources], domega, dpositions,
            b * s, s, h, g, form.n, **constants,
        )  # fmt: skip
    return *made, *(total(dpositions, domega, blocks, positions, omega) if rotated else ())


def empty_parts(q: Tensor, form: Form, parts: int, blocks: tuple[int, int], needs):
    """Room for the programs' parts of the gradients of positions and of omega, of those needed."""
    shapes = (sum(blocks), *q.shape[:2], form.a), (parts, sum(blocks), form.a, form.r)
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=q.device) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    )


def total(dpositions, domega, blocks: tuple[int, int], positions: Tensor, omega: Tensor):
    """The programs' parts of the gradients of positions and of omega, added in one order, always the same."""
    made = like(positions, omega, (dpositions is not None, domega is not None))
    if dpositions is not None:
        made[0].copy_(dpositions.sum(0, dtype=torch.float64))
    if domega is not None:
        of_q, of_k = domega.sum(0, dtype=torch.float64).split(blocks)
        made[1].copy_(definition.of_rows(of_q, 0, len(omega)) + definition.of_rows(of_k, 0, len(omega)))
    return made


def rotated(q, k, positions, omega, form: Form):
    """q' and k'."""
    return launch(q, k, positions, omega, form)


def rotated_in_place(q, k, positions, omega, form: Form) -> None:
    """Write q' and k' into q and k."""
    launch(q, k, positions, omega, form, out=(q, k))
    torch.autograd.graph.increment_version((q, k))


def rotated_back(dq, dk, positions, omega, rotated, needs, form: Form):
    """The gradients of q, k, positions and omega, empty where not needed; the form is that of forward."""
    made = launch(dq, dk, positions, omega, form.back(), rotated, needs)
    return made if rotated else (*made, *like(positions, omega, needs))


def like(positions: Tensor, omega: Tensor, needs) -> tuple[Tensor, ...]:
    """Room for the gradients of positions and omega, none where they are not needed."""
    both = zip((positions, omega), needs, strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in both)


ROTATE = register(
    "rotate",
    "Tensor q, Tensor k, Tensor positions, Tensor omega",
    "(Tensor, Tensor)",
    rotated,
    definition.rotate,
    lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
)
ROTATE_IN_PLACE = register(
    "rotate_",
    "Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor omega",
    "()",
    rotated_in_place,
    definition.rotate_,
    lambda *_: None,
)
ROTATE_BACKWARD = register(
    "rotate_backward",
    "Tensor dq, Tensor dk, Tensor positions, Tensor omega, Tensor[] rotated, bool[] needs",
    "(Tensor, Tensor, Tensor, Tensor)",
    rotated_back,
    definition.rotate_backward,
    lambda dq, dk, positions, omega, rotated, needs, form: (
        *(torch.empty_like(dq), torch.empty_like(dk)),
        *like(positions, omega, needs),
    ),
)


def keep(ctx: Any, inputs, output) -> None:
    """Keep what gradients need."""
    _, _, positions, omega, ctx.form = inputs
    # attention keeps the rotated q and k anyway, so keeping them here costs nothing
    ctx.save_for_backward(positions, omega, *(output if any(ctx.needs_input_grad[2:4]) else ()))


def gradients(turn: Callable, turn_back: Callable, ctx: Any, *grads):
    """Those of q, k, positions and omega: by `turn_back`, or open to autograd by `turn`."""
    positions, omega, *rotated = ctx.saved_tensors
    form, needs = ctx.form, ctx.needs_input_grad[2:4]
    if torch.is_grad_enabled():
        # someone will differentiate the gradient, as penalties of a critic do
        back = turn(*grads, positions, omega, form.back())
        angles = definition.angle_gradients(rotated, grads, positions, omega, form) if rotated else needs
    else:
        *back, dpositions, domega = turn_back(*grads, positions, omega, rotated, needs, form)
        angles = dpositions, domega
    return *back, *(x if need else None for x, need in zip(angles, needs, strict=True)), None


class Rotate(torch.autograd.Function):
    """q and k rotated, or back, by positions (b, s, a) @ Omega (n, a, r), or by tables without gradients."""

    forward, setup_context = staticmethod(rotated), staticmethod(keep)

    @staticmethod
    def backward(ctx: Any, *grads):
        """The gradients of q, k, positions and omega."""
        return gradients(Rotate.apply, rotated_back, ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents):
        """Refuse: without this, tangents would be lost in silence."""
        raise NotImplementedError("the rotary kernel has no forward-mode derivative; use plain torch there")


differentiate("rotate", keep, partial(gradients, ROTATE, ROTATE_BACKWARD))


def turn(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """q' and k', by a launch, or by the op where a graph is recorded."""
    return (ROTATE if torch.compiler.is_compiling() else Rotate.apply)(q, k, positions, omega, form)


def along(q: Tensor, positions: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (b, s, a) and contiguous Omega (n, a, r) on the device of q."""
    positions = positions.to(q.device).expand(*q.shape[:2], -1)
    return positions, omega.to(q.device).reshape(-1, *omega.shape[-2:]).contiguous()


def rotate(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0, mode: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    Args:
        q: queries in bfloat16, float16 or float32, of any strides.
        k: keys of the same dtype; they may have fewer heads, or none.
        positions: (s, a) or (b, s, a), float or int.
        omega: radians per step (a, r), or (n, a, r) with n dividing g; head j follows row j * n // heads.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block", half within each of `blocks`.
        blocks: numbers of pairs that add up to r.
        tail: rotate the last 2r channels of a head, not the first; the others are copied.
        factor: of the rotated channels (YaRN's attention factor).
        mode: "exact", or "hf" for the angles of transformers, rounded to float32.

    Raises:
        ValueError: what does not fit together, an unknown pairing or mode.
    """
    form = form_of(q, k, positions, omega, pairing, blocks, tail, factor, mode)
    return turn(q, k, *along(q, positions, omega), form)


def rotate_(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0, mode: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rotate` in place and without gradients; returns q and k.

    Raises:
        ValueError: as `rotate`, and where something requires grad, or elements of q or k share memory.
    """
    form = form_of(q, k, positions, omega, pairing, blocks, tail, factor, mode)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, positions, omega)):
        raise ValueError("rotate_ makes no gradients, and one of its tensors requires them; call rotate")
    if any(size > 1 and not stride for x in (q, k) for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("q or k is expanded, so that one element stands for many; call rotate")
    turn_ = ROTATE_IN_PLACE if torch.compiler.is_compiling() else rotated_in_place
    turn_(q, k, *along(q, positions, omega), form)
    return q, k
