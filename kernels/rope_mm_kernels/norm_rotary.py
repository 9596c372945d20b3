"""RMSNorm of every head of q and k, then their rotation, in one launch each way.

    n = x rsqrt(mean(x^2) + eps) weight        y = R n        in float32 throughout, rounded once at the end

as torch.nn.RMSNorm over the channels of a head. Qwen3 (modeling_qwen3.py, q_norm and k_norm) also rounds n to
the dtype of x before the rotation. A model with 1 + weight (Gemma) hands that over.
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
from rope_mm_kernels.checks import is_factor
from rope_mm_kernels.ops import differentiate, register
from rope_mm_kernels.pairs import address, load_pairs, locate, pair_channels, pick, reach, store_pairs
from rope_mm_kernels.plan import DTYPES, KernelSpec, make_spec, plan, source, view
from rope_mm_kernels.rotary import (
    ROTATE,
    Rotate,
    empty_gradients,
    empty_parts,
    expand_inputs,
    launchable,
    refuse_tangents,
    sum_parts,
)


@triton.jit
def token_mean(x, d: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums over the lanes of a token, x (L,), divided by d; every lane gets its token's."""
    sums = tl.sum(tl.reshape(x, (x.shape[0] // CHUNKS, CHUNKS)), 1, keep_dims=True) / d
    return tl.reshape(tl.broadcast_to(sums, (x.shape[0] // CHUNKS, CHUNKS)), (x.shape[0], 1))


@triton.jit
def load_rest(start, channel, stride, inside, REST: tl.constexpr, W: tl.constexpr, first: tl.constexpr):
    """W of the channels that are not rotated, (L, W), in float32."""
    present = inside[:, None] & (channel[:, None] + tl.arange(0, W)[None, :] < REST)
    return tl.load(reach(start, first + channel, stride, W), present, 0.0).to(tl.float32)


@triton.jit
def store_sum(share, goal, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of share (L, V) over tokens, (WIDTH,) of it."""
    column = tl.arange(0, CHUNKS * share.shape[1])
    rows = tl.reshape(share, (share.shape[0] // CHUNKS, CHUNKS * share.shape[1]))
    tl.store(goal + column, tl.sum(rows, 0), column < WIDTH)


@triton.jit
def norm_rotate_kernel(
    q, k, q_out, k_out, q_back, k_back, q_weight, k_weight, positions, omega,
    weight_grad, omega_grad, position_grad, tokens, s, q_heads, k_heads, n, eps,
    ANGLES: tl.constexpr, FACTOR: tl.constexpr, INVERSE: tl.constexpr, BLOCKS: tl.constexpr,
    A: tl.constexpr, r: tl.constexpr, FRONT: tl.constexpr, REST: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr, L: tl.constexpr,
    HEADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `rotate_kernel`; given the gradients of its results, those of its inputs instead."""
    H: tl.constexpr = max(HEADS[0], HEADS[1])
    d: tl.constexpr = 2 * r + REST
    PAST: tl.constexpr = 2 * r * (FRONT == 0)
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
    loaded = ()
    for i in tl.static_range(H):
        inside = tl.where(head + i < end, known, False)
        loaded += (load_pairs(start + i * x[3] * UNIT + FRONT * x[4], x[4], inside, pair, BLOCKS, V),)
    weight = tl.where(of_q, q_weight, k_weight) + step * 0
    w1, w2 = load_pairs(weight + FRONT, 1, None, pair, BLOCKS, V)
    cos, sin = ANGLES(positions, omega, batch, step, row, pair, A, r, BLOCKS, UNIT, V)
    cos, sin = cos * FACTOR, sin * FACTOR
    grad, dw1, dw2 = tl.zeros((L, V), tl.float32), tl.zeros((L, V), tl.float32), tl.zeros((L, V), tl.float32)
    if W:
        channel = pair // V * W
        w = load_rest(weight, channel, 1, known, REST, W, PAST)
        dw = tl.zeros((L, W), tl.float32)
    for i in tl.static_range(H):
        inside = tl.where(head + i < end, known, False)
        here, there = start + i * x[3] * UNIT, goal + i * out[3] * UNIT
        x1, x2 = loaded[i]
        square = tl.sum(x1 * x1 + x2 * x2, 1)
        if W:
            rest = load_rest(here, channel, x[4], inside, REST, W, PAST)
            square += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(token_mean(square, d, CHUNKS) + eps)
        x1, x2 = x1 * scale, x2 * scale
        if q_back is None:
            n1, n2 = x1 * w1, x2 * w2
            y1, y2 = n1 * cos - n2 * sin, n1 * sin + n2 * cos
            if W:
                rest = rest * scale * w
        else:
            y = pick(of_q, q_back, k_back)
            back = address(y, batch, step, head, UNIT) + i * y[3] * UNIT
            y1, y2 = load_pairs(back + FRONT * y[4], y[4], inside, pair, BLOCKS, V)
            d1, d2 = y1 * cos + y2 * sin, y2 * cos - y1 * sin
            # the gradient of an angle is that of y1 dy2 - y2 dy1, and turning both back leaves it
            grad += x1 * w1 * d2 - x2 * w2 * d1
            dw1 += x1 * d1
            dw2 += x2 * d2
            d1, d2 = d1 * w1, d2 * w2
            along_x = tl.sum(x1 * d1 + x2 * d2, 1)
            if W:
                rest, drest = rest * scale, load_rest(back, channel, y[4], inside, REST, W, PAST)
                dw += rest * drest
                drest *= w
                along_x += tl.sum(rest * drest, 1)
            along_x = token_mean(along_x, d, CHUNKS)
            y1, y2 = scale * (d1 - x1 * along_x), scale * (d2 - x2 * along_x)
            if W:
                rest = scale * (drest - rest * along_x)
        store_pairs(y1, y2, there + FRONT * out[4], out[4], inside, pair, BLOCKS, V)
        if W:
            present = inside[:, None] & (channel[:, None] + tl.arange(0, W)[None, :] < REST)
            tl.store(reach(there, PAST + channel, out[4], W), rest, present)
    if q_back is not None:
        store_angle_gradients(
            grad, positions, omega, omega_grad, position_grad,
            program, block, part, tokens, batch, step, row, pair, A, r, V, FIRST, CHUNKS, L,
        )  # fmt: skip
        weight_grad += program.to(tl.int64) * d
        store_sum(dw1, weight_grad, CHUNKS, r)
        store_sum(dw2, weight_grad + r, CHUNKS, r)
        if W:
            store_sum(dw, weight_grad + 2 * r, CHUNKS, REST)


def launch(q, k, positions, omega, weights, eps: float, spec: KernelSpec, grads=(), needs=(False, False)):
    """q' and k'; or, given their gradients, those of q, k, positions, omega and the weights."""
    (b, s, h, _), g = q.shape, k.shape[2]
    made = torch.empty_like(q), torch.empty_like(k)
    big = (q, k, *made, *grads)
    sources = positions, omega
    parts, blocks, constants = plan(q, k, sources, spec, big, whole=True, most=4 if grads else 8)
    dpositions, domega = empty_parts(q, spec, parts, blocks, needs)
    dweights = torch.empty((parts, sum(blocks), q.shape[3]), device=q.device) if grads else None
    with torch.cuda.device_of(q):
        norm_rotate_kernel[(parts * sum(blocks),)](
            *[view(x, constants["UNIT"]) for x in big], *[None] * (6 - len(big)), *weights,
            *[source(x, spec, constants["UNIT"]) for x in sources], dweights, domega, dpositions,
            b * s, s, h, g, spec.n, eps, **constants,
        )  # fmt: skip
    if dweights is None:
        return made
    first, second = (spec.front + x for x in pair_channels(spec.r, spec.blocks, q.device))
    past = torch.arange(q.shape[3] - 2 * spec.r, device=q.device) + (0 if spec.front else 2 * spec.r)
    order = torch.cat((first, second, past))
    of_q, of_k = dweights.sum(0, dtype=torch.float64).split(blocks)
    found = (
        torch.empty_like(w).index_copy_(0, order, x.sum(0).to(w.dtype))
        for x, w in zip((of_q, of_k), weights, strict=True)
    )
    domega = None if domega is None else domega.sum(0, dtype=torch.float64)
    return *made, *sum_parts(dpositions, domega, blocks, positions, omega), *found


def launch_forward(q, k, positions, omega, q_weight, k_weight, eps: float, spec: KernelSpec):
    """q' and k'."""
    return launch(q, k, positions, omega, (q_weight, k_weight), eps, spec)


def launch_backward(q, k, positions, omega, q_weight, k_weight, dq, dk, needs, eps: float, spec: KernelSpec):
    """The gradients of all six tensors, those of positions and omega empty where not needed."""
    return launch(q, k, positions, omega, (q_weight, k_weight), eps, spec, (dq, dk), needs)


TENSORS = "Tensor q, Tensor k, Tensor positions, Tensor omega, Tensor q_weight, Tensor k_weight"
NORM_ROTATE = register(
    "norm_rotate",
    f"{TENSORS}, float eps",
    "(Tensor, Tensor)",
    launch_forward,
    definition.norm_rotate,
    lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
)
NORM_ROTATE_BACKWARD = register(
    "norm_rotate_backward",
    f"{TENSORS}, Tensor dq, Tensor dk, bool[] needs, float eps",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch_backward,
    definition.norm_rotate_backward,
    lambda q, k, positions, omega, q_weight, k_weight, dq, dk, needs, eps, spec: (
        *(torch.empty_like(q), torch.empty_like(k)),
        *empty_gradients(positions, omega, needs),
        *(torch.empty_like(q_weight), torch.empty_like(k_weight)),
    ),
)


def in_two_steps(rotate: Callable, q, k, positions, omega, q_weight, k_weight, eps: float, spec: KernelSpec):
    """RMSNorm, then `rotate`, which can be differentiated twice."""
    q1, k1 = (definition.rms_normalize(x, eps)[0] * w.float() for x, w in ((q, q_weight), (k, k_weight)))
    rotated = rotate(q1, k1, positions, omega, spec)
    return tuple(x.to(given.dtype) for x, given in zip(rotated, (q, k), strict=True))


def save_for_backward(ctx: Any, inputs, output) -> None:
    """Keep the inputs: what lies between is made again."""
    *tensors, ctx.eps, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def gradients(forward: Callable, backward: Callable, ctx: Any, *grads):
    """Those of all six tensors: by `backward`, or open to autograd by `forward` of what is normalised."""
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
    if torch.is_grad_enabled():
        # someone will differentiate the gradient, as penalties of a critic do
        wanted = [x for x, need in zip(saved, needs, strict=True) if need]
        out = in_two_steps(forward, *saved, ctx.eps, ctx.spec)
        found = iter(torch.autograd.grad(out, wanted, grads, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None
    made = backward(*saved, *grads, needs[2:4], ctx.eps, ctx.spec)
    return *(x if need else None for x, need in zip(made, needs, strict=True)), None, None


class NormRotate(torch.autograd.Function):
    """q and k normalised, weighed and rotated by positions (b, s, a) @ Omega (n, a, r)."""

    forward, setup_context = staticmethod(launch_forward), staticmethod(save_for_backward)
    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def backward(ctx: Any, *grads):
        """The gradients of all six tensors."""
        return gradients(Rotate.apply, launch_backward, ctx, *grads)


differentiate("norm_rotate", save_for_backward, partial(gradients, ROTATE, NORM_ROTATE_BACKWARD))


def apply(q, k, positions, omega, q_weight: Tensor, k_weight: Tensor, eps: float, spec: KernelSpec):
    """q' and k', by a launch, or by the op where a graph is recorded; refuses unfit weights and eps."""
    if q_weight.shape != q.shape[3:] or k_weight.shape != q.shape[3:] or q_weight.dtype != k_weight.dtype:
        got = f"{q_weight.dtype} {(*q_weight.shape,)} and {k_weight.dtype} {(*k_weight.shape,)}"
        raise ValueError(f"the weights must be ({q.shape[3]},) and of one dtype, not {got}")
    if not is_factor(eps):
        raise ValueError(f"eps is {eps!r}, but heads of zeros need a positive finite number")
    weights = q_weight.contiguous(), k_weight.contiguous()
    inputs = (q, k, positions, omega, *weights, float(eps), spec)
    if torch.compiler.is_compiling() and q.dtype in DTYPES:
        return NORM_ROTATE(*inputs)
    return NormRotate.apply(*inputs) if launchable(q) else in_two_steps(definition.rotate_plain, *inputs)


def norm_rotate(
    q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float = 1e-6, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False, factor: float = 1.0, mode: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rotate` of q and k whose heads are divided by their root mean square and weighed first.

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
        q_weight: (d,), for all heads of q; it gets a gradient.
        k_weight: (d,), for all heads of k; it gets a gradient.
        eps: added to the mean square, positive.

    Raises:
        ValueError: as `rotate`, weights of another shape, an eps that is not positive.
    """
    spec = make_spec(q, k, positions, omega, pairing, blocks, tail, factor, mode)
    return apply(q, k, *expand_inputs(q, positions, omega), q_weight, k_weight, eps, spec)
