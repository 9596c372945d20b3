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
from rope_mm_kernels.checks import check_angle_rotation
from rope_mm_kernels.in_place import check_in_place
from rope_mm_kernels.ops import INTERPRETED, differentiate, register
from rope_mm_kernels.pairs import address, block_sizes, copy_rest, load_pairs, locate, pick, store_pairs
from rope_mm_kernels.plan import DTYPES, KernelSpec, Plan, make_spec, plan_launches, source, view


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, q_rotated, k_rotated, positions, omega, omega_grad, position_grad,
    tokens, s, q_heads, k_heads, n,
    ANGLES: tl.constexpr, FACTOR: tl.constexpr, INVERSE: tl.constexpr, BLOCKS: tl.constexpr,
    A: tl.constexpr, r: tl.constexpr, FRONT: tl.constexpr, REST: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr, L: tl.constexpr,
    HEADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """L lanes, each of them V pairs of a token, and some heads of q or of k, in all of which they turn alike.

    Blocks of heads come first in the grid, so that positions are read from memory once.
    """
    H: tl.constexpr = max(HEADS[0], HEADS[1])
    q_blocks = tl.cdiv(q_heads, HEADS[0])
    blocks = q_blocks + tl.cdiv(k_heads, HEADS[1])
    program = tl.program_id(0)
    block, part = program % blocks, program // blocks
    batch, step, pair, known = locate(part, tokens, s, r, V, FIRST, CHUNKS, L, WIDE)
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
        inside = tl.where(head + i < end, known, False)
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
            program, block, part, tokens, batch, step, row, pair, A, r, V, FIRST, CHUNKS, L,
        )  # fmt: skip


def launch(q, k, positions, omega, spec, rotated=(), needs=(False, False), out=None):
    """q and k rotated; with `rotated`, what forward made, also the gradients of positions and omega needed.

    Shapes: positions (b, s, a), omega (n, a, r); or tables, both (b, s, 1, 2r).
    """
    (b, s, h, _), g = q.shape, k.shape[2]
    made = (torch.empty_like(q), torch.empty_like(k)) if out is None else out
    big = (q, k, *made, *rotated)
    sources = positions, omega
    plans = plan_launches(q, k, sources, spec, big, whole=bool(rotated))
    dpositions, domegas, blocks = [], [], plans[0].blocks
    for parts, _, constants in plans:
        if out is not None:
            constants["W"] = 0  # what is not rotated is there already
        dposition, domega = empty_parts(q, spec, parts, blocks, needs)
        if spec.mode == "given" and dpositions:
            dposition = dpositions.pop()  # angles of other pairs of the same tokens
        dpositions.append(dposition)
        domegas.append(domega)
        with torch.cuda.device_of(q):
            rotate_kernel[(parts * sum(blocks),)](
                *[view(x, constants["UNIT"]) for x in big], *[None] * (6 - len(big)),
                *[source(x, spec, constants["UNIT"]) for x in sources], domega, dposition,
                b * s, s, h, g, spec.n, **constants,
            )  # fmt: skip
    if not rotated:
        return made
    dposition = torch.cat(dpositions) if needs[0] else None
    return *made, *sum_parts(dposition, join_omegas(domegas, plans) if needs[1] else None, blocks, *sources)


def empty_parts(q: Tensor, spec: KernelSpec, parts: int, blocks: tuple[int, int], needs):
    """Room for the programs' parts of the gradients of positions and of omega, of those needed."""
    width = spec.r if spec.mode == "given" else spec.a
    shapes = (sum(blocks), *q.shape[:2], width), (parts, sum(blocks), spec.a, spec.r)
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=q.device) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    )


def join_omegas(domegas: list[Tensor], plans: list[Plan]) -> Tensor:
    """The gradients of omega (blocks, a, r), each pair's by the launch that had it, summed over programs."""
    found = []
    for domega, (_, _, constants) in zip(domegas, plans, strict=True):
        first, width = constants["FIRST"] * constants["V"], constants["CHUNKS"] * constants["V"]
        found.append(domega[..., first : first + width].sum(0, dtype=torch.float64))
    return torch.cat(found, -1)


def sum_parts(dpositions, domega, blocks: tuple[int, int], positions: Tensor, omega: Tensor):
    """The parts of the gradients of positions and of omega, added in one order, always the same.

    Args:
        dpositions: (parts, b, s, a), or None.
        domega: (blocks, a, r), or None.
        blocks: of heads of q and of k.
        positions: (b, s, a), or angles (b, s, n, r).
        omega: (n, a, r).
    """
    made = empty_gradients(positions, omega, (dpositions is not None, domega is not None))
    if dpositions is not None and positions.dim() == 4:  # angles, of each row of heads
        of_q, of_k = dpositions.double().split(blocks)
        n = positions.shape[2]
        made[0].copy_((definition.sum_heads(of_q, 0, n) + definition.sum_heads(of_k, 0, n)).movedim(0, 2))
    elif dpositions is not None:
        made[0].copy_(dpositions.sum(0, dtype=torch.float64))
    if domega is not None:
        of_q, of_k = domega.split(blocks)
        made[1].copy_(definition.sum_heads(of_q, 0, len(omega)) + definition.sum_heads(of_k, 0, len(omega)))
    return made


def launch_forward(q, k, positions, omega, spec: KernelSpec):
    """q' and k'."""
    return launch(q, k, positions, omega, spec)


def launch_in_place(q, k, positions, omega, spec: KernelSpec) -> None:
    """Write q' and k' into q and k."""
    launch(q, k, positions, omega, spec, out=(q, k))
    torch.autograd.graph.increment_version((q, k))


def launch_backward(dq, dk, positions, omega, rotated, needs, spec: KernelSpec):
    """The gradients of q, k, positions and omega, empty where not needed; the spec is that of forward."""
    made = launch(dq, dk, positions, omega, spec.back(), rotated, needs)
    return made if rotated else (*made, *empty_gradients(positions, omega, needs))


def empty_gradients(positions: Tensor, omega: Tensor, needs) -> tuple[Tensor, ...]:
    """Room for the gradients of positions and omega, none where they are not needed."""
    both = zip((positions, omega), needs, strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in both)


ROTATE = register(
    "rotate",
    "Tensor q, Tensor k, Tensor positions, Tensor omega",
    "(Tensor, Tensor)",
    launch_forward,
    definition.rotate,
    lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
)
ROTATE_IN_PLACE = register(
    "rotate_",
    "Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor omega",
    "()",
    launch_in_place,
    definition.rotate_,
    lambda *_: None,
)
ROTATE_BACKWARD = register(
    "rotate_backward",
    "Tensor dq, Tensor dk, Tensor positions, Tensor omega, Tensor[] rotated, bool[] needs",
    "(Tensor, Tensor, Tensor, Tensor)",
    launch_backward,
    definition.rotate_backward,
    lambda dq, dk, positions, omega, rotated, needs, spec: (
        *(torch.empty_like(dq), torch.empty_like(dk)),
        *empty_gradients(positions, omega, needs),
    ),
)


def save_for_backward(ctx: Any, inputs, output) -> None:
    """Keep what gradients need."""
    _, _, positions, omega, ctx.spec = inputs
    # attention keeps the rotated q and k anyway, so keeping them here costs nothing
    ctx.save_for_backward(positions, omega, *(output if any(ctx.needs_input_grad[2:4]) else ()))


def gradients(forward: Callable, backward: Callable, ctx: Any, *grads):
    """Those of q, k, positions and omega: by `backward`, or open to autograd by `forward`."""
    positions, omega, *rotated = ctx.saved_tensors
    spec, needs = ctx.spec, ctx.needs_input_grad[2:4]
    if torch._C._are_functorch_transforms_active():
        # batched gradients, into which no kernel can look
        forward = definition.rotate_plain
    if torch.is_grad_enabled() or forward is definition.rotate_plain:
        # someone will differentiate the gradient, as penalties of a critic do
        back = forward(*grads, positions, omega, spec.back())
        angles = definition.angle_gradients(rotated, grads, positions, omega, spec) if rotated else needs
    else:
        *back, dpositions, domega = backward(*grads, positions, omega, rotated, needs, spec)
        angles = dpositions, domega
    return *back, *(x if need else None for x, need in zip(angles, needs, strict=True)), None


def refuse_tangents(ctx: Any, *tangents):
    """Refuse forward-mode derivatives: without this, tangents would be lost in silence."""
    raise NotImplementedError("the rotary kernel has no forward-mode derivative; use plain torch there")


class Rotate(torch.autograd.Function):
    """q and k rotated, or back, by positions (b, s, a) @ Omega (n, a, r), by angles, or by tables."""

    forward, setup_context = staticmethod(launch_forward), staticmethod(save_for_backward)
    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def backward(ctx: Any, *grads):
        """The gradients of q, k, positions and omega."""
        return gradients(Rotate.apply, launch_backward, ctx, *grads)


class RotateInPlace(torch.autograd.Function):
    """`Rotate` that writes its results into q and k."""

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def forward(q, k, positions, omega, spec):
        """q and k, which hold the results."""
        launch_in_place(q, k, positions, omega, spec)
        return q, k

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        """Keep what gradients need, and say what was written."""
        ctx.mark_dirty(*inputs[:2])
        save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads):
        """The gradients of q, k, positions and omega."""
        return gradients(Rotate.apply, launch_backward, ctx, *grads)


differentiate("rotate", save_for_backward, partial(gradients, ROTATE, ROTATE_BACKWARD))


def launchable(x: Tensor) -> bool:
    """Whether the kernel itself can rotate heads of this device and dtype."""
    return x.dtype in DTYPES and (
        x.device.type in ("cuda", "xpu") or (INTERPRETED and x.device.type == "cpu")
    )


def apply(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, spec: KernelSpec) -> tuple[Tensor, Tensor]:
    """q' and k': by the op where a graph is recorded, by a launch, or by plain torch where neither serves."""
    if torch.compiler.is_compiling() and q.dtype in DTYPES:
        return ROTATE(q, k, positions, omega, spec)
    if launchable(q):
        return Rotate.apply(q, k, positions, omega, spec)
    return definition.rotate_plain(q, k, positions, omega, spec)


def apply_(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, spec: KernelSpec) -> None:
    """`apply` that writes its results into q and k."""
    inputs = (q, k, positions, omega)
    if torch.compiler.is_compiling() and not any(x.requires_grad for x in inputs) and q.dtype in DTYPES:
        ROTATE_IN_PLACE(*inputs, spec)
    elif launchable(q) and not torch.compiler.is_compiling():
        RotateInPlace.apply(*inputs, spec)
    else:
        for x, rotated in zip((q, k), apply(*inputs, spec), strict=True):
            x.copy_(rotated)


def expand_inputs(q: Tensor, positions: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (b, s, a) and contiguous Omega (n, a, r) on the device of q."""
    positions = positions.to(q.device).expand(*q.shape[:2], -1)
    return positions, omega.to(q.device).reshape(-1, *omega.shape[-2:]).contiguous()


def rotate(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0, mode: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, s, h, d) and k (b, s, g, d) rotated by positions @ Omega, with gradients to all four.

    On a CPU, and for float64, plain torch computes the same.

    Args:
        q: queries, floating point, of any strides.
        k: keys of the same dtype; they may have fewer heads, or none.
        positions: (s, a) or (b, s, a), float or int.
        omega: radians per step (a, r), or (n, a, r) with n dividing g; head j follows row j * n // heads.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block", half within each of `blocks`.
        blocks: numbers of pairs that add up to r.
        tail: rotate the last 2r channels of a head, not the first; the others are copied.
        factor: of the rotated channels (YaRN's attention factor).
        mode: "exact", or "hf" for the angles of transformers, rounded to float32.

    Raises:
        ValueError: what does not fit together, by `checks.check_rotation`.
    """
    spec = make_spec(q, k, positions, omega, pairing, blocks, tail, factor, mode)
    return apply(q, k, *expand_inputs(q, positions, omega), spec)


def rotate_(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0, mode: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rotate` that writes its results into q and k, with the same gradients; returns q and k.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        positions: (s, a) or (b, s, a).
        omega: radians per step (a, r), or (n, a, r) with n dividing g.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.
        mode: "exact", or "hf" for the angles of transformers, rounded to float32.

    Raises:
        ValueError: as `rotate`, and by `in_place.check_in_place`.
    """
    spec = make_spec(q, k, positions, omega, pairing, blocks, tail, factor, mode)
    check_in_place(q, k)
    apply_(q, k, *expand_inputs(q, positions, omega), spec)
    return q, k


def rotate_by_angles(
    q: Tensor, k: Tensor, angles: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, s, h, d) and k (b, s, g, d) rotated by given angles, with gradients to all three.

    Angles that depend on the content are made by a model (Selective RoPE, arXiv 2511.17388).

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        factor: what cosine and sine are multiplied by.
        angles: radians (s, r), (b, s, r), or (b, s, n, r) with n dividing g.

    Raises:
        ValueError: what does not fit together, by `checks.check_angle_rotation`.
    """
    check_angle_rotation(q, k, angles, pairing, blocks, factor, tail)
    angles = (angles if angles.dim() == 4 else angles.unsqueeze(-2)).to(q.device)
    n, r = angles.shape[-2:]
    angles = angles.expand(*q.shape[:2], -1, -1)
    front = q.shape[3] - 2 * r if tail else 0
    spec = KernelSpec(n, 0, r, block_sizes(pairing, r, tuple(blocks)), front, "given", float(factor))
    return apply(q, k, angles, angles.new_empty(n, 0, r), spec)
