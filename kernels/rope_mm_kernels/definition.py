"""What the kernels compute, in plain torch: the CPU's ops, and gradients that are open to autograd."""

import torch
from torch import Tensor

from rope_mm_kernels.pairs import pair_channels
from rope_mm_kernels.plan import KernelSpec


def cos_sin(positions: Tensor, omega: Tensor, spec: KernelSpec) -> tuple[Tensor, Tensor]:
    """Cosine and sine (b, s, n, r), float64; of tables (b, s, 1, 2r), the entries of first channels."""
    if spec.mode == "table":
        first, _ = pair_channels(spec.r, spec.blocks, positions.device)
        tables = positions[..., first], omega[..., first]
    else:
        if spec.mode == "given":
            angle = positions.double()
        elif spec.mode == "hf":
            products = positions.float()[..., None, :, None] * omega.float()
            angle = sum(products.unbind(-2), products.new_zeros(())).double()
        else:
            angle = torch.einsum("bsa,nar->bsnr", positions.double(), omega.double())
        tables = angle.cos(), angle.sin()
    cos, sin = (spec.factor * x for x in tables)
    return cos, -sin if spec.inverse else sin


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, spec: KernelSpec) -> Tensor:
    """Heads x (b, s, h, d), rotated, in float32 or float64."""
    x = widened(x)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = (spec.front + index for index in pair_channels(spec.r, spec.blocks, x.device))
    cos, sin = (y.repeat_interleave(x.shape[2] // spec.n, 2) for y in (cos, sin))
    x1, x2 = x[..., first], x[..., second]
    turned = x.index_copy(-1, first, x1 * cos - x2 * sin)
    return turned.index_copy(-1, second, x1 * sin + x2 * cos)


def rotate_plain(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, spec: KernelSpec):
    """q' and k' by functions that autograd and torch.func can look into."""
    tables = cos_sin(positions, omega, spec)
    return rotate_heads(q, *tables, spec).to(q.dtype), rotate_heads(k, *tables, spec).to(k.dtype)


def rotate(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, spec: KernelSpec) -> tuple[Tensor, ...]:
    """q' and k' with the strides of q and k."""
    both = zip((q, k), rotate_plain(q, k, positions, omega, spec), strict=True)
    return tuple(torch.empty_like(x).copy_(y) for x, y in both)


def rotate_(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, spec: KernelSpec) -> None:
    """`rotate` in place."""
    for x, turned in zip((q, k), rotate(q, k, positions, omega, spec), strict=True):
        x.copy_(turned)


def rotate_backward(dq, dk, positions, omega, rotated, needs, spec: KernelSpec) -> tuple[Tensor, ...]:
    """The gradients of q, k, positions and omega, empty where not needed; the spec is that of forward."""
    angles = needed_gradients(rotated, (dq, dk), positions, omega, needs, spec)
    return *rotate(dq, dk, positions, omega, spec.back()), *angles


def sum_heads(x: Tensor, dim: int, n: int) -> Tensor:
    """Sums over the heads of each of n rows of Omega."""
    return x.unflatten(dim, (n, x.shape[dim] // n)).sum(dim + 1)


def angle_gradients(rotated, grads, positions, omega, spec: KernelSpec) -> tuple[Tensor, Tensor]:
    """The gradients of positions and omega, of y1 dy2 - y2 dy1 as in the kernel, but open to autograd."""
    first, second = (spec.front + x for x in pair_channels(spec.r, spec.blocks, omega.device))

    def angle(y, grad):
        y, grad = y.float(), grad.float()
        return sum_heads(y[..., first] * grad[..., second] - y[..., second] * grad[..., first], 2, spec.n)

    of_q, of_k = (angle(y, grad) for y, grad in zip(rotated, grads, strict=True))
    both = (of_q + of_k).double() * (-1 if spec.inverse else 1)
    if spec.mode == "given":
        return both.to(positions.dtype), torch.zeros_like(omega)
    dpositions = torch.einsum("bsnr,nar->bsa", both, omega.double())
    domega = torch.einsum("bsnr,bsa->nar", both, positions.double())
    return dpositions.to(positions.dtype), domega.to(omega.dtype)


def needed_gradients(rotated, grads, positions, omega, needs, spec: KernelSpec) -> tuple[Tensor, ...]:
    """Those of `angle_gradients` that are needed, empty tensors for the others."""
    made = angle_gradients(rotated, grads, positions, omega, spec) if any(needs) else (positions, omega)
    return tuple(x.contiguous() if need else x.new_empty(0) for x, need in zip(made, needs, strict=True))


def rms_normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Heads in float32 over their root mean square, and what they were multiplied by."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def norm_rotate(
    q, k, positions, omega, q_weight, k_weight, eps: float, spec: KernelSpec
) -> tuple[Tensor, ...]:
    """`rotate` of q and k, normalised and weighed first."""
    tables = cos_sin(positions, omega, spec)
    return tuple(
        torch.empty_like(x).copy_(rotate_heads(rms_normalize(x, eps)[0] * weight.float(), *tables, spec))
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def norm_rotate_backward(
    q, k, positions, omega, q_weight, k_weight, dq, dk, needs, eps: float, spec: KernelSpec
):  # fmt: skip
    """The gradients of q, k, positions and omega (empty where not needed) and of the weights."""
    back, heads, rotated, weighed = spec.back(), [], [], []
    tables, tables_back = cos_sin(positions, omega, spec), cos_sin(positions, omega, spec.back())
    for x, weight, grad in ((q, q_weight, dq), (k, k_weight, dk)):
        x1, scale = rms_normalize(x, eps)
        slope = rotate_heads(grad, *tables_back, back)
        weighed.append((x1 * slope).sum((0, 1, 2)).to(weight.dtype))
        slope = slope * weight.float()
        heads.append(torch.empty_like(x).copy_(scale * (slope - x1 * (x1 * slope).mean(-1, keepdim=True))))
        rotated.append(rotate_heads(x1 * weight.float(), *tables, spec))
    angles = needed_gradients(rotated, (dq, dk), positions, omega, needs, spec)
    return *heads, *angles, *weighed
