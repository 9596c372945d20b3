"""Fields that carry generated samples to real ones without a critic, and the loss of a generator on them.

A field gives each sample x of the law q a velocity V, made of real samples of p and of other samples of q;
V = 0 where q = p. A generator descends ‖x - (x + V)‖² with the second x held fixed: its samples move along V.
All samples must be of one condition, in practice of a class with tens of them. Distances are in float32 or
wider, outside autocast, and softmaxes are of logarithms, so no affinity needs a floor: one at 1e-6 keeps a
collapsed cloud collapsed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from rope_mm.checks.fields import Count, Positive, Real, Reals, read_value
from rope_mm.checks.tensors import check_real_tensors
from rope_mm.losses.scores import at_least_float32, is_readable, without_autocast
from rope_mm.registry import Registry

LEAST = 2  # samples of each side: one has no neighbours that tell where its law is


def kernel_field(
    x: Tensor,
    real: Tensor,
    other: Tensor,
    width: float,
    kernel: str = "laplace",
    real_weight: Tensor | None = None,
    other_weight: Tensor | None = None,
) -> Tensor:
    """V(x) = E_p[k(x, y)(y - x)] / E_p[k(x, y)] - the same of q: Drifting, arXiv 2602.04770, eq. 8 to 10.

    With the Gaussian kernel it is width² ∇ log(p / q), both laws blurred by it.

    Args:
        x: samples (n, d) to move.
        real: samples (m, d) of p.
        other: samples (k, d) of q, independent of x; x itself would repel itself.
        width: of the kernel, exp(-‖x - y‖ / width) or exp(-‖x - y‖² / (2 width²)).
        kernel: laplace or gaussian.
        real_weight: positive weights (m,) of the real samples, if they are not alike.
        other_weight: of the others (k,).

    Raises:
        ValueError: shapes that do not fit, less than two samples of a side, a width that is not positive.
    """
    x, real, other = check_samples(x, real, other)
    exponent, width = KERNELS[kernel], read_value("kernel_field", "width", width, Positive)

    def mean_near(samples: Tensor, weight: Tensor | None) -> Tensor:
        """The mean (n, d) of samples, each as much as it is near and as its weight says."""
        return (exponent(distances(x, samples), width) + log_weight(samples, weight)).softmax(1) @ samples

    return mean_near(real, real_weight) - mean_near(other, other_weight)


KERNELS: Registry[Callable[[Tensor, float], Tensor]] = Registry(
    "kernel",
    {
        "laplace": lambda distance, width: -distance / width,
        "gaussian": lambda distance, width: -distance.square() / (2 * width**2),
    },
)


def coupled_field(x: Tensor, real: Tensor, other: Tensor, width: float) -> Tensor:
    """V (n, d) by affinities that are normalised over samples and over x: algorithm 2 of arXiv 2602.04770.

    An affinity is the geometric mean of two softmaxes of -‖x - y‖ / width, over all y, real and other, and
    over all x. Of laws that are far apart the field is tiny and points the right way: use it at unit size.

    Args:
        x: samples (n, d) to move.
        real: samples (m, d) of p.
        other: samples (k, d) of q, independent of x.
        width: of the kernel.

    Raises:
        ValueError: shapes that do not fit, less than two samples of a side, a width that is not positive.
    """
    x, real, other = check_samples(x, real, other)
    logits = -distances(x, torch.cat([real, other])) / read_value("coupled_field", "width", width, Positive)
    affinity = ((logits.log_softmax(0) + logits.log_softmax(1)) / 2).exp()
    to_real, to_other = affinity.split([len(real), len(other)], 1)
    attraction = (to_real * to_other.sum(1, keepdim=True)) @ real
    return attraction - (to_other * to_real.sum(1, keepdim=True)) @ other


def sinkhorn_field(
    x: Tensor,
    real: Tensor,
    other: Tensor,
    width: float,
    iterations: int = 10,
    x_weight: Tensor | None = None,
    real_weight: Tensor | None = None,
    other_weight: Tensor | None = None,
) -> Tensor:
    """V (n, d) = T(x -> real) - T(x -> other), of plans of entropic transport: W-Flow, arXiv 2605.11755.

    T(x) is the mean of the samples to which the plan carries x; the cost is ‖x - y‖² / 2, and `width` the
    weight of the entropy. Where `other` is x and the plans have converged, V = -n times the gradient of the
    Sinkhorn divergence. With few samples take others that are independent of x: then V has no bias.

    Args:
        x: samples (n, d) to move.
        real: samples (m, d) of p.
        other: samples (k, d) of q.
        width: of the entropy, in units of the cost.
        iterations: of Sinkhorn's algorithm; the smaller the width, the more it needs.
        x_weight: positive weights (n,) of x, if they are not alike.
        real_weight: of the real samples (m,).
        other_weight: of the others (k,).

    Raises:
        ValueError: shapes that do not fit, less than two samples of a side, a number that is not positive.
    """
    x, real, other = check_samples(x, real, other)
    width = read_value("sinkhorn_field", "width", width, Positive)
    iterations = read_value("sinkhorn_field", "iterations", iterations, Count)
    rows = log_weight(x, x_weight)[:, None]

    def carry(samples: Tensor, weight: Tensor | None) -> Tensor:
        """The mean (n, d) of the samples to which x is carried."""
        kernel, columns = -distances(x, samples).square() / (2 * width), log_weight(samples, weight)
        of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for _ in range(iterations):
            of_rows = rows - (kernel + of_columns).logsumexp(1, keepdim=True)
            of_columns = columns - (kernel + of_rows).logsumexp(0)
        # after the last step of the columns rows do not add up; a softmax makes them
        return (kernel + of_columns).softmax(1) @ samples

    return carry(real, real_weight) - carry(other, other_weight)


FIELDS: Registry[Callable[..., Tensor]] = Registry(
    "field", {"drift": coupled_field, "mean-shift": kernel_field, "wflow": sinkhorn_field}
)


class Followed(NamedTuple):
    """What a generator minimises to follow a field.

    Attributes:
        loss: its gradient moves the samples along V; its value is constant, as V has unit size.
        size: the root mean square of V before it got that size. It is no measure of how far laws are: that of
            drift is largest for laws that nearly agree. `energy_distance` is one.
        scale: the mean distance by which lengths were divided; the gradient of loss * scale does not depend
            on it.
    """

    loss: Tensor
    size: Tensor
    scale: Tensor


def follow_field(
    x: Tensor,
    real: Tensor,
    other: Tensor,
    field: str,
    widths: Sequence[float],
    allow_zero: bool = False,
    **options: Any,
) -> Followed:
    """The loss of a generator whose samples follow a field, summed over widths, each of unit size.

    Lengths are divided by the mean distance of x from the other samples, so that widths mean the same for all
    data.

    Args:
        x: generated samples (n, d), with a gradient.
        real: samples (m, d) of the same condition.
        other: further generated samples (k, d), independent of x; without a gradient.
        field: a key of FIELDS.
        widths: of its kernels.
        allow_zero: whether a field that is zero or no number has its way, as in a training, where generated
            samples may become equal to real ones.
        options: further arguments of the field.

    Raises:
        ValueError: no widths, or one that is not positive; else a width at which the field vanishes, and
            samples that are not finite; as the field.
    """
    widths = read_value("follow_field", "widths", widths, Annotated[Sequence[float], Reals(Real(above=0))])
    if not widths:
        raise ValueError("widths must have at least one number; give for instance [0.02, 0.05, 0.2]")
    check_real_tensors(x=x)
    with torch.no_grad(), without_autocast(x):
        here, real, other = check_samples(x, real, other)
        scale = distances(here, torch.cat([real, other])).mean().clamp_min(torch.finfo(here.dtype).tiny)
        parts = (here / scale, real / scale, other / scale)
        fields = [FIELDS[field](*parts, width, **options) for width in widths]
        sizes = torch.stack([each.square().mean().sqrt() for each in fields])
        if not allow_zero:
            check_sizes(field, widths, sizes)
        least = torch.finfo(here.dtype).tiny
        moved = parts[0] + sum(each / size.clamp_min(least) for each, size in zip(fields, sizes, strict=True))
    return Followed(projection(at_least_float32(x) / scale, moved), sizes.mean(), scale)


def check_sizes(field: str, widths: Sequence[float], sizes: Tensor) -> None:
    """Refuse a field that is zero, as of affinities that underflow, or no number; on a CPU only."""
    if is_readable(sizes) and not (sizes > 0).all():
        wrong = [width for width, size in zip(widths, sizes.tolist(), strict=True) if not size > 0]
        raise ValueError(
            f"the {field} field is zero or no number at widths {wrong}; give wider ones where samples are "
            "far apart, and samples that are finite"
        )


def projection(x: Tensor, moved: Tensor) -> Tensor:
    """E‖x - moved‖² (n, d): how a generator follows particles, moved = x_t + V (kexue.fm/archives/9662)."""
    return (x - moved).square().sum(1).mean()


def distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x - y‖ (n, m), as exact for points close together as for others."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def log_weight(samples: Tensor, weight: Tensor | None) -> Tensor:
    """The logarithms (n,) of weights that add up to one; of samples (n, d) that are alike without weights.

    Raises:
        ValueError: another shape, a weight that is not positive.
    """
    if weight is None:
        return samples.new_full((len(samples),), -math.log(len(samples)))
    check_real_tensors(weight=weight)
    if weight.shape != samples.shape[:1] or not (weight > 0).all():
        raise ValueError(
            f"weights must be positive and {tuple(samples.shape[:1])}, one for each sample, not "
            f"{tuple(weight.shape)}"
        )
    return (weight / weight.sum()).log().to(samples)


def check_samples(x: Tensor, real: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three groups of samples in float32 at least, of one type.

    Raises:
        ValueError: no tensors, shapes that do not fit, a group of fewer than two.
    """
    check_real_tensors(x=x, real=real, other=other)
    shapes = {"x": x.shape, "real": real.shape, "other": other.shape}
    if any(len(shape) != 2 or shape[1:] != x.shape[1:] for shape in shapes.values()):
        named = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"a field takes samples (n, d) of one d, not {named}; flatten images")
    if not x.shape[1]:
        raise ValueError("samples of no features, (n, 0), have no field; give at least one feature")
    if few := [f"{shape[0]} of {name}" for name, shape in shapes.items() if shape[0] < LEAST]:
        raise ValueError(
            f"a field compares samples of one condition, {LEAST} or more of each kind, not {', '.join(few)}; "
            "give larger groups, or take energy_score, which needs one real sample"
        )
    kind = torch.promote_types(torch.promote_types(x.dtype, real.dtype), other.dtype)
    x, real, other = (at_least_float32(samples.to(kind)) for samples in (x, real, other))
    return x, real, other
