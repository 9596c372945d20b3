"""The definition in fewer passes over memory: y = x cos + swap(x) sin.

`swap` exchanges the two channels of each pair. Tables are wide here, (..., s, n, 2r): cosines on both
channels of a pair, sines negated on the first. Few heads are rotated by three functions of torch
(`rotate_plain`), which autograd and torch.func can look into. Many heads on a CPU are rotated in parts that
fit the cache, written in place (`rotate_in_parts`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]

from rope_mm.rotary.definition import PAIRINGS, cos_sin_of

TINY = 1 << 14  # numbers, as of one token, whose queries and keys are rotated together
FEW = 1 << 17  # numbers that three functions of torch rotate faster than a loop over parts
PART = 1 << 19  # numbers that a thread rotates at a time: a cache holds them, and few calls of torch are made


class Slot(NamedTuple):
    """Which channels are rotated, and which two make a pair."""

    pairing: str
    blocks: Sequence[int] = ()
    tail: bool = False


class WideTables(NamedTuple):
    """Tables (..., s, n, 2r) of one rotation."""

    cos: Tensor
    sin: Tensor

    def inverse(self, scale: float = 1.0) -> "WideTables":
        """Those of the rotation back, times `scale`."""
        if scale == 1:
            return WideTables(self.cos, -self.sin)
        return WideTables(self.cos * scale, self.sin * -scale)


def widen(cos: Tensor, sin: Tensor, slot: Slot) -> WideTables:
    """The wide tables of cosines and sines (..., s, n, r)."""
    _, join = PAIRINGS[slot.pairing]
    return WideTables(join(cos, cos, slot.blocks), join(-sin, sin, slot.blocks))


def swap(x: Tensor, slot: Slot) -> Tensor:
    """The channels (..., 2r) of x with the two of each pair exchanged."""
    if slot.pairing == "half":
        return x.roll(x.shape[-1] // 2, -1)
    split, join = PAIRINGS[slot.pairing]
    first, second = split(x, slot.blocks)
    return join(second, first, slot.blocks)


def rotate_plain(x: Tensor, tables: WideTables, slot: Slot) -> Tensor:
    """Heads x (b, s, h, d), rotated, by functions that can be differentiated in every way."""
    d, (n, width), (cos, sin) = x.shape[-1], tables.cos.shape[-2:], tables
    if (
        width == d and n == 1 and x.dtype == cos.dtype
    ):  # as a rule; the rest of this function costs half as much again
        return torch.addcmul(x * cos, swap(x, slot), sin)
    rotated = x if width == d else x.narrow(-1, d - width if slot.tail else 0, width)
    rotated = rotated if x.dtype == cos.dtype else rotated.to(torch.promote_types(x.dtype, cos.dtype))
    if n > 1:
        rotated, cos, sin = by_rows(rotated, n), cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = torch.addcmul(rotated * cos, swap(rotated, slot), sin)
    y = (y.flatten(-3, -2) if n > 1 else y).to(x.dtype)
    if width == d:
        return y
    return torch.cat((x[..., : d - width], y) if slot.tail else (y, x[..., width:]), -1)


def pair_views(x: Tensor, slot: Slot) -> list[tuple[Tensor, ...]]:
    """First and second channels of the pairs, as views, of every block."""
    if slot.pairing == "block":
        return [part.chunk(2, -1) for part in x.split([2 * n for n in slot.blocks], -1)]
    return [PAIRINGS[slot.pairing][0](x)]


def add_swapped(views: Sequence[list[tuple[Tensor, ...]]], value: float) -> None:
    """Add value * swap(x) * sin to out, given the `pair_views` of out, x and sin."""
    for (y1, y2), (x1, x2), (s1, s2) in zip(*views, strict=True):
        y1.addcmul_(x2, s1, value=value)
        y2.addcmul_(x1, s2, value=value)


def by_rows(x: Tensor, n: int) -> Tensor:
    """Heads (b, s, h, c) grouped by the row of Omega that they follow: (b, s, n, h // n, c)."""
    return x.reshape(*x.shape[:-2], n, x.shape[-2] // n, x.shape[-1])


def part_size() -> int:
    """How many numbers are rotated at a time: PART for each thread, which has a cache of its own."""
    return PART * torch.get_num_threads()


def part_length(x: Tensor) -> int:
    """How many tokens of heads (b, s, h, d) are rotated at a time."""
    return max(1, part_size() // max(1, x.shape[0] * x.shape[2] * x.shape[3]))


def parts_of(x: Tensor, tables: WideTables, slot: Slot, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the rotated channels of x and others, by rows, and of the cosines and sines."""
    (n, width), step = tables.cos.shape[-2:], part_length(x)
    start = x.shape[-1] - width if slot.tail else 0
    heads = (by_rows(y.narrow(-1, start, width), n).split(step, 1) for y in (x, *others))
    return zip(*heads, *(y.unsqueeze(-2).split(step, -4) for y in tables), strict=True)


def rotate_one_part(x: Tensor, tables: WideTables, slot: Slot, value: float) -> Tensor:
    """Heads x (b, s, h, 2r) rotated at once."""
    n = tables.cos.shape[-2]
    source = by_rows(x.to(tables.cos.dtype), n)
    cos, sin = (y.unsqueeze(-2) for y in tables)
    goal = source * cos
    add_swapped([pair_views(y, slot) for y in (goal, source, sin)], value)
    return goal.flatten(-3, -2).to(x.dtype)


def rotate_in_parts(
    x: Tensor, tables: WideTables, slot: Slot, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Heads x (b, s, h, d) rotated, or rotated back by the transpose, part by part; out may be x itself."""
    in_place, value = out is x, -1.0 if inverse else 1.0
    whole = tables.cos.shape[-1] == x.shape[-1]
    if out is None and whole and 0 < x.numel() <= part_size():
        return rotate_one_part(x, tables, slot, value)
    if out is None:
        out = torch.empty_like(x)
    if not x.numel():
        return out
    if not whole and not in_place:
        out.copy_(x)
    parts = parts_of(x, tables, slot, out)
    for _ in rotate_each(parts, slot, value, in_place or x.dtype != tables.cos.dtype):
        pass
    return out


def rotate_each(
    parts: Iterator[tuple[Tensor, ...]], slot: Slot, value: float, buffered: bool
) -> Iterator[tuple[list[tuple[Tensor, ...]], Tensor]]:
    """Rotate parts (from, to, cosines, sines); after each, views of its pairs, and free memory like it."""
    source = goal = torch.empty(0)
    views = of_source = []
    for here, there, cos, sin in parts:
        if not buffered:
            torch.mul(here, cos, out=there)
            of_source = pair_views(here, slot)
            add_swapped([pair_views(there, slot), of_source, pair_views(sin, slot)], value)
            yield of_source, goal
            continue
        if source.shape != here.shape:  # at the first part, and at the last where it is shorter
            source, goal = torch.empty(2, *here.shape, dtype=cos.dtype)
            views, of_source = pair_views(goal, slot), pair_views(source, slot)
        torch.mul(source.copy_(here), cos, out=goal)
        add_swapped([views, of_source, pair_views(sin, slot)], value)
        there.copy_(goal)
        yield of_source, goal


def rotate_back(y: Tensor, grad: Tensor, tables: WideTables, slot: Slot) -> tuple[Tensor, Tensor]:
    """The gradient of rotated heads y (b, s, h, d) rotated back, and `cross` of both (b, s, n, r), summed.

    Each part of the gradient is read and converted once for both.
    """
    wide, (n, width) = tables.cos.dtype, tables.cos.shape[-2:]
    back = torch.empty_like(grad)
    if width != grad.shape[-1]:
        back.copy_(grad)
    total = torch.empty(*y.shape[:2], n, width // 2, dtype=wide)
    step, start = part_length(y), y.shape[-1] - width if slot.tail else 0
    ours = by_rows(y.narrow(-1, start, width), n).split(step, 1)
    buffered, product = y.dtype != wide, y[:0]
    done = rotate_each(parts_of(grad, tables, slot, back), slot, -1.0, buffered)
    for here, out, (slopes, free) in zip(ours, total.split(step, 1), done, strict=True):
        if product.shape[:-1] != here.shape[:-1]:
            product = torch.empty(*here.shape[:-1], width // 2, dtype=wide)
        here = free.copy_(here) if buffered else here
        goals = product.split(list(slot.blocks) or width // 2, -1)
        for (y1, y2), (g1, g2), goal in zip(pair_views(here, slot), slopes, goals, strict=True):
            torch.mul(y1, g2, out=goal).addcmul_(y2, g1, value=-1)
        torch.sum(product, -2, out=out)
    return back, total


def rotate_values(x: Tensor, tables: WideTables, slot: Slot, out: Tensor | None = None) -> Tensor:
    """Heads x (b, s, h, d) rotated the faster way, without a graph, into out where it is given."""
    if x.device.type == "cpu" and x.numel() > FEW:
        return rotate_in_parts(x, tables, slot, out=out)
    rotated = rotate_plain(x, tables, slot)
    return rotated if out is None else out.copy_(rotated)


def cross(y: Tensor, grad: Tensor, slot: Slot, dtype: torch.dtype) -> Tensor:
    """y1 grad2 - y2 grad1 (..., r) of pairs: what the gradient of an angle sums over heads."""
    split = PAIRINGS[slot.pairing][0]
    (y1, y2), (g1, g2) = (split(z.to(dtype), slot.blocks) for z in (y, grad))
    return torch.addcmul(y1 * g2, y2, g1, value=-1)


def angle_cross(y: Tensor, grad: Tensor, angle: Tensor, slot: Slot) -> Tensor:
    """`cross` of rotated heads y (b, s, h, d) and their gradient (b, s, n, r), summed, open to autograd."""
    n, r = angle.shape[-2:]
    start = y.shape[-1] - 2 * r if slot.tail else 0
    y, grad = (by_rows(z.narrow(-1, start, 2 * r), n) for z in (y, grad))
    return cross(y, grad, slot, torch.promote_types(y.dtype, torch.float32)).sum(-2)


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many, as in torch.vmap and `is_grads_batched`: nothing can be written into it."""
    batched = torch._C._are_functorch_transforms_active()
    return batched or is_legacy_batchedtensor(x)


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of heads and of angles, open to autograd where it records."""
    cos, sin, angle, y = ctx.saved_tensors
    tables, slot = WideTables(cos, sin), ctx.slot
    to_x, to_angle = ctx.needs_input_grad[:2]
    is_open = torch.is_grad_enabled() or is_batched(grad)
    if not to_angle:
        if not to_x:
            return None, None
        back = rotate_plain(grad, tables.inverse(), slot) if is_open else None
        return rotate_in_parts(grad, tables, slot, inverse=True) if back is None else back, None
    if is_open or not y.numel():
        tables = widen(*cos_sin_of(angle, cos.dtype, ctx.factor), slot)
        back, total = rotate_plain(grad, tables.inverse(), slot), angle_cross(y, grad, angle, slot)
    else:
        back, total = rotate_back(y, grad, tables, slot)
    total = total.to(angle.dtype)
    # a sum over one row would be a pass over memory for nothing
    same = total.numel() == angle.numel()
    return back if to_x else None, total.view(angle.shape) if same else total.sum_to_size(angle.shape)


class RotateInParts(torch.autograd.Function):
    """`rotate_in_parts`: the gradient of a rotation is the rotation back."""

    # `setup_context` would bind a signature at every call; what torch.func sees goes to `rotate_plain`
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, angle: Tensor | None, cos: Tensor, sin: Tensor, factor: float, slot: Slot
    ):
        """The rotated heads."""
        y = rotate_in_parts(x, WideTables(cos, sin), slot)
        ctx.factor, ctx.slot = factor, slot
        # attention keeps rotated heads anyway, so keeping them for the gradient of angles costs no memory
        ctx.save_for_backward(cos, sin, angle, y if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads):
        """Gradients of heads and angles."""
        return *gradients(ctx, *grads), None, None, None, None


class RotateInPlace(torch.autograd.Function):
    """Heads overwritten by the rotated ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, angle: Tensor | None, cos: Tensor, sin: Tensor, factor: float, slot: Slot
    ):
        """The same heads, rotated."""
        rotate_values(x, WideTables(cos, sin), slot, out=x)
        ctx.factor, ctx.slot = factor, slot
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, angle, x if ctx.needs_input_grad[1] else None)
        return x

    @staticmethod
    def backward(ctx: Any, *grads):
        """Gradients of heads and angles."""
        return *gradients(ctx, *grads), None, None, None, None
