"""What the kernels compute, in plain torch: the CPU's ops, and gradients that are open to autograd."""

import torch
from torch import Tensor

from rope_mm_kernels.form import Form
from rope_mm_kernels.pairs import channels


def cos_sin(positions: Tensor, omega: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Cosine and sine (b, s, n, r), float32; of tables (b, s, 1, 2r), the entries of first channels."""
    if form.mode == "table":
        first, _ = channels(form.r, form.blocks, positions.device)
        tables = (x[..., first].float() for x in (positions, omega))
    else:
        if form.mode == "hf":
            products = positions.float()[..., None, :, None] * omega.float()
            angle = sum(products.unbind(-2), products.new_zeros(())).double()
        else:
            angle = torch.einsum("bsa,nar->bsnr", positions.double(), omega.double())
        tables = angle.cos().float(), angle.sin().float()
    cos, sin = (form.factor * x for x in tables)
    return cos, -sin if form.inverse else sin


def turn(x: Tensor, cos: Tensor, sin: Tensor, form: Form) -> Tensor:
    """Heads x (b, s, h, d) in float32, rotated."""
    x = x.float()
    first, second = (form.front + index for index in channels(form.r, form.blocks, x.device))
    cos, sin = (y.repeat_interleave(x.shape[2] // form.n, 2) for y in (cos, sin))
    x1, x2 = x[..., first], x[..., second]
    turned = x.index_copy(-1, first, x1 * cos - x2 * sin)
    return turned.index_copy(-1, second, x1 * sin + x2 * cos)


def rotate(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, form: Form) -> tuple[Tensor, ...]:
    """q' and k' with the strides of q and k."""
    tables = cos_sin(positions, omega, form)
    return tuple(torch.empty_like(x).copy_(turn(x, *tables, form)) for x in (q, k))


def rotate_(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, form: Form) -> None:
    """`rotate` in place."""
    for x, turned in zip((q, k), rotate(q, k, positions, omega, form), strict=True):
        x.copy_(turned)


def rotate_backward(dq, dk, positions, omega, rotated, needs, form: Form) -> tuple[Tensor, ...]:
    """The gradients of q, k, positions and omega, empty where not needed; the form is that of forward."""
    angles = needed(rotated, (dq, dk), positions, omega, needs, form)
    return *rotate(dq, dk, positions, omega, form.back()), *angles


def of_rows(x: Tensor, dim: int, n: int) -> Tensor:
    """Sums over the heads of each of n rows of Omega."""
    return x.unflatten(dim, (n, x.shape[dim] // n)).sum(dim + 1)


def angle_gradients(rotated, grads, positions, omega, form: Form) -> tuple[Tensor, Tensor]:
    """The gradients of positions and omega, of y1 dy2 - y2 dy1 as in the kernel, but open to autograd."""
    first, second = (form.front + x for x in channels(form.r, form.blocks, omega.device))

    def angle(y, grad):
        y, grad = y.float(), grad.float()
        return of_rows(y[..., first] * grad[..., second] - y[..., second] * grad[..., first], 2, form.n)

    of_q, of_k = (angle(y, grad) for y, grad in zip(rotated, grads, strict=True))
    both = (of_q + of_k).double() * (-1 if form.inverse else 1)
    dpositions = torch.einsum("bsnr,nar->bsa", both, omega.double())
    domega = torch.einsum("bsnr,bsa->nar", both, positions.double())
    return dpositions.to(positions.dtype), domega.to(omega.dtype)


def needed(rotated, grads, positions, omega, needs, form: Form) -> tuple[Tensor, ...]:
    """Those of `angle_gradients` that are needed, empty tensors for the others."""
    made = angle_gradients(rotated, grads, positions, omega, form) if any(needs) else (positions, omega)
    return tuple(x.contiguous() if need else x.new_empty(0) for x, need in zip(made, needs, strict=True))


def unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Heads in float32 over their root mean square, and what they were multiplied by."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def norm_rotate(q, k, positions, omega, q_weight, k_weight, eps: float, form: Form) -> tuple[Tensor, ...]:
    """`rotate` of q and k, normalised and weighed first."""
    tables = cos_sin(positions, omega, form)
    return tuple(
        torch.empty_like(x).copy_(turn(unit(x, eps)[0] * weight.float(), *tables, form))
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def norm_rotate_backward(
    q, k, positions, omega, q_weight, k_weight, dq, dk, needs, eps: float, form: Form
):  # fmt: skip
    """The gradients of q, k, positions and omega (empty where not needed) and of the weights."""
    back, heads, rotated, weighed = form.back(), [], [], []
    tables, tables_back = cos_sin(positions, omega, form), cos_sin(positions, omega, form.back())
    for x, weight, grad in ((q, q_weight, dq), (k, k_weight, dk)):
        x1, scale = unit(x, eps)
        slope = turn(grad, *tables_back, back)
        weighed.append((x1 * slope).sum((0, 1, 2)).to(weight.dtype))
        slope = slope * weight.float()
        heads.append(torch.empty_like(x).copy_(scale * (slope - x1 * (x1 * slope).mean(-1, keepdim=True))))
        rotated.append(turn(x1 * weight.float(), *tables, form))
    angles = needed(rotated, (dq, dk), positions, omega, needs, form)
    return *heads, *angles, *weighed
