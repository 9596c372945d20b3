"""The definition on a CPU, in fewer passes over memory: parts that fit the cache, written in place.

`apply_rotary` has the arguments and results of `rotation.apply_rotary`, and its derivatives of every kind.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rope_mm.rotary import definition as rotation

PART = 1 << 18  # numbers that are rotated at a time: a megabyte in float32, and few enough calls of torch


def pair_views(x: Tensor, pairing: str) -> tuple[Tensor, ...]:
    """First and second channels of the pairs, as views; within one block where they come in blocks."""
    return rotation.PAIRINGS["half" if pairing == "block" else pairing][0](x)


def block_views(x: Tensor, out: Tensor, pairing: str, blocks: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Of every block the first and second channels of x, and of out, as views."""
    if not blocks:
        return [(*pair_views(x, pairing), *pair_views(out, pairing))]
    channels = [2 * n for n in blocks]
    both = zip(x.split(channels, -1), out.split(channels, -1), strict=True)
    return [(*pair_views(here, pairing), *pair_views(there, pairing)) for here, there in both]


def rotate_into(
    out: Tensor, x: Tensor, views: list, both: Tensor, sin: Tensor, blocks: Sequence[int]
) -> None:
    """Write the channels x (..., 2r), rotated, into out, given their `block_views` and all cosines."""
    torch.mul(x, both, out=out)
    for (x1, x2, y1, y2), s in zip(views, sin.split(blocks, -1) if blocks else (sin,), strict=True):
        y1.addcmul_(x2, s, value=-1)
        y2.addcmul_(x1, s)


def rotate_chunks(
    x: Tensor, cos: Tensor, sin: Tensor, pairing: str, blocks: Sequence[int], tail: bool
) -> Tensor:
    """Heads x (b, s, h, d) rotated, token by token within a part."""
    (h, d), (n, r) = x.shape[-2:], cos.shape[-2:]
    if n > 1:
        cos, sin = cos.repeat_interleave(h // n, dim=-2), sin.repeat_interleave(h // n, dim=-2)
    both = rotation.PAIRINGS[pairing][1](cos, cos, blocks)
    start = d - 2 * r if tail else 0
    out = torch.empty_like(x)
    if 2 * r < d:
        out.copy_(x)
    step = max(1, PART // max(1, x.shape[0] * h * d))
    rows = x.narrow(-1, start, 2 * r), out.narrow(-1, start, 2 * r)
    parts = *(y.split(step, 1) for y in rows), *(y.split(step, -3) for y in (both, sin))
    source, goal, views = x[:0], x[:0], []
    for here, there, c, s in zip(*parts, strict=True):
        if x.dtype == cos.dtype:
            rotate_into(there, here, block_views(here, there, pairing, blocks), c, s, blocks)
            continue
        if source.shape != here.shape:  # at the first part, and at the last where it is shorter
            source, goal = torch.empty(2, *here.shape, dtype=cos.dtype)
            views = block_views(source, goal, pairing, blocks)
        rotate_into(goal, source.copy_(here), views, c, s, blocks)
        there.copy_(goal)
    return out


def pairs(x: Tensor, cos: Tensor, pairing: str, blocks: Sequence[int], tail: bool) -> tuple[Tensor, ...]:
    """First and second channels (b, s, h, r) of the rotated pairs, in the dtype of the angles."""
    r = cos.shape[-1]
    rotated = x.narrow(-1, x.shape[-1] - 2 * r if tail else 0, 2 * r)
    return rotation.PAIRINGS[pairing][0](rotated.to(cos.dtype), blocks)


def over_heads(x: Tensor, cos: Tensor) -> Tensor:
    """x (b, s, h, r) summed over what shares an angle: heads of a row of (..., s, n, r), and the batch."""
    return x.unflatten(-2, (cos.shape[-2], -1)).sum(-2).sum_to_size(cos.shape)


class ApplyRotary(torch.autograd.Function):
    """`rotate_chunks` with its derivatives: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(x, cos, sin, pairing, blocks, tail):
        """The rotated heads."""
        return rotate_chunks(x, cos, sin, pairing, blocks, tail)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        """Keep the angles, and the heads where a gradient reaches the angles."""
        x, cos, sin, *ctx.form = inputs
        ctx.save_for_backward(cos, sin, x if any(ctx.needs_input_grad[1:3]) else None)
        ctx.save_for_forward(cos, sin, x)

    @staticmethod
    def backward(ctx: Any, *grads):
        """Gradients of x, cos and sin."""
        (grad,) = grads
        cos, sin, x = ctx.saved_tensors
        dx = dcos = dsin = None
        if ctx.needs_input_grad[0]:
            dx = ApplyRotary.apply(grad, cos, -sin, *ctx.form)
        if x is not None:
            (x1, x2), (g1, g2) = (pairs(y, cos, *ctx.form) for y in (x, grad))
            dcos, dsin = (over_heads(y, cos) for y in (g1 * x1 + g2 * x2, g2 * x1 - g1 * x2))
        return dx, dcos, dsin, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents):
        """The tangent: the rotation is linear in the heads, and in cosine and sine."""
        dx, dcos, dsin, *_ = tangents
        cos, sin, x = ctx.saved_tensors
        zero = torch.zeros_like(cos)
        moved = rotation.apply_rotary(torch.zeros_like(x) if dx is None else dx, cos, sin, *ctx.form)
        if dcos is None and dsin is None:
            return moved
        dcos, dsin = (zero if change is None else change for change in (dcos, dsin))
        untouched = rotation.apply_rotary(x, zero, zero, *ctx.form)
        return moved + rotation.apply_rotary(x, dcos, dsin, *ctx.form) - untouched

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any):
        """The definition, which torch.vmap can look into."""

        def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return rotation.apply_rotary(x, cos, sin, *args[3:])

        return torch.vmap(turn, in_dims[:3])(*args[:3]), 0


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str = "half",
    blocks: Sequence[int] = (),
    tail: bool = False,
) -> Tensor:
    """Heads x (b, s, h, d) with their first 2r channels, or last, rotated by cos, sin (..., s, n, r).

    Raises:
        ValueError: what does not fit together, as `rotation.apply_rotary`.
    """
    rotation.check_fit(x, cos, pairing, blocks)
    return ApplyRotary.apply(x, cos, sin, pairing, tuple(blocks), tail)
