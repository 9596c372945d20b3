"""Two-sided adversarial losses on raw critic scores: real and fake (b,), paired by row, scalar out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from rope_mm.checks.fields import Count, Positive, read_value
from rope_mm.checks.tensors import check_real_tensors
from rope_mm.losses.divergences import F_DIVERGENCES, MONOTONE, Curve, FDivergence, Monotone
from rope_mm.losses.scores import at_least_float32, check_rows, is_readable
from rope_mm.registry import Registry


@dataclass(frozen=True)
class GanLoss:
    """What the critic minimises and what the generator minimises.

    Both are computed in float32 at least, and refuse scores that are not (b,) and equally many.

    Attributes:
        critic: (real, fake) -> scalar; where `needs_distance`, (real, fake, distance) with the distance (b,)
            of each pair.
        generator: (real, fake) -> scalar.
        source: paper and equation.
        relativistic: whether each score is compared with one of the other side; else the generator ignores
            `real`.
        of_means: whether scores are compared with means over the batch, which must be the global batch.
        needs_distance: whether the critic takes a third argument.
        divergence: what the best critic measures and the generator then descends; P is p(real) q(fake), swap
            is the same with the two places exchanged.
    """

    critic: Callable[..., Tensor]
    generator: Callable[..., Tensor]
    source: str
    relativistic: bool = False
    of_means: bool = False
    needs_distance: bool = False
    divergence: str = ""

    def __post_init__(self):
        object.__setattr__(self, "critic", checked(self.critic))
        object.__setattr__(self, "generator", checked(self.generator))


def checked(equation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An equation that refuses scores and distances other than (b,), and computes in float32 at least."""

    parameters = signature(equation)
    asked = [name for name, p in parameters.parameters.items() if p.default is Parameter.empty]

    @wraps(equation)
    def on_scores(*args: Any, **options: Any) -> Tensor:
        try:
            given = parameters.bind(*args, **options)
        except TypeError as error:
            raise ValueError(
                f"this side of the loss takes ({', '.join(parameters.parameters)}): {error}"
            ) from None
        tensors = {name: given.arguments[name] for name in asked}
        check_rows(**tensors)
        given.arguments.update({name: at_least_float32(tensor) for name, tensor in tensors.items()})
        return equation(*given.args, **given.kwargs)

    return on_scores


def separable(on_real: Curve, on_fake: Curve, generator: Curve, source: str, divergence: str) -> GanLoss:
    """E on_real(real) + E on_fake(fake) against E generator(fake): each score by itself.

    Args:
        on_real: what the critic loses on a real's score.
        on_fake: what the critic loses on a fake's score.
        generator: what the generator loses on a fake's score.
        source: paper and equation.
        divergence: what the best critic measures.
    """
    return GanLoss(
        lambda real, fake: (on_real(real) + on_fake(fake)).mean(),
        lambda real, fake: generator(fake).mean(),
        source,
        divergence=divergence,
    )


def paired(f: Curve, source: str, divergence: str) -> GanLoss:
    """RpGAN: E f(real - fake) against E f(fake - real).

    Args:
        f: a curve that falls where its argument should grow.
        source: paper and equation.
        divergence: what the best critic measures.
    """
    return GanLoss(
        lambda real, fake: f(real - fake).mean(),
        lambda real, fake: f(fake - real).mean(),
        source,
        relativistic=True,
        divergence=divergence,
    )


def averaged(f: Curve, source: str, divergence: str) -> GanLoss:
    """RaGAN: each score against the mean of the other side in the batch, half of both terms.

    Args:
        f: a curve that falls where its argument should grow.
        source: paper and equation.
        divergence: what the best critic measures.
    """

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        return (f(real - fake.mean()) + f(real.mean() - fake)).mean() / 2

    swapped = lambda real, fake: critic(fake, real)  # noqa: E731
    return GanLoss(critic, swapped, source, relativistic=True, of_means=True, divergence=divergence)


def f_gan(name: str, d: FDivergence) -> GanLoss:
    """The variational bound of D_f in scores, and for the generator its own term, -E f*: always a descent."""
    return separable(
        lambda z: -d.activation(z),
        d.conjugate,
        lambda z: -d.conjugate(z),
        "f-GAN, arXiv 1606.00709, equation 4 and table 6",
        f"D_f(p‖q) of {name}",
    )


def monoflow(h: Monotone) -> GanLoss:
    """A logistic critic, whose score is log p/q, against -E h(score)."""
    return separable(logistic, softplus, lambda z: -h(z), "MonoFlow, arXiv 2302.01075", h.divergence)


def gan_qp_critic(
    real: Tensor, fake: Tensor, distance: Tensor, qp_lambda: float = 10.0, power: int = 2
) -> Tensor:
    """-delta + delta² / (2 λ d) with delta = real - fake and d the distance of the pair (arXiv 1811.07296).

    The square makes steepness costly only relative to how far apart the pair lies; its optimum for two points
    is delta = λ d, so a far fake keeps a gradient. Coinciding pairs count as 1e-6 apart. A critic of
    both samples would measure λ / 4 Σ d (P - swap)² / (P + swap), and keep |delta| <= λ d.

    Args:
        real: scores (b,).
        fake: scores (b,) of the fakes that these reals are paired with.
        distance: how far apart each pair lies (b,), by one of DISTANCES.
        qp_lambda: λ; it scales delta and the value, and moves no optimum of the generator.
        power: m of the term delta^m / (m (λ d)^(m - 1)), even; any has the same optimum for two points.

    Raises:
        ValueError: an odd power, which has no optimum, a λ that is not positive, or a distance that is
            negative or not finite.
    """
    qp_lambda = read_value("gan-qp", "qp_lambda", qp_lambda, Positive)
    power = read_value("gan-qp", "power", power, Count)
    if not 2 <= power <= 100 or power % 2:
        raise ValueError(f"gan-qp wants an even power of 2 to 100, not {power}")
    if is_readable(distance) and not (distance.isfinite() & (distance >= 0)).all():
        raise ValueError(f"a distance must be finite and at least 0, but one is {distance.min().item()}")
    # elsewhere than on a CPU nobody looks, and NaN is seen where a wrong number would not be
    distance = distance.masked_fill(distance < 0, math.nan).clamp_min(1e-6)
    delta, steep = real - fake, qp_lambda * distance
    return (delta**power / (power * steep ** (power - 1)) - delta).mean()


def logistic(z: Tensor) -> Tensor:
    """-log sigmoid(z)."""
    return softplus(-z)


def square(z: Tensor) -> Tensor:
    """(z - 1)^2."""
    return (z - 1).square()


def hinge(z: Tensor) -> Tensor:
    """max(0, 1 - z)."""
    return relu(1 - z)


RP, RA = "arXiv 1901.02474; R3GAN, arXiv 2501.05441", "arXiv 1807.00734"
RSGAN = paired(logistic, f"{RA}; {RP}", "JS(P, swap)")
LOGISTIC, LSGAN, HINGE = "arXiv 1406.2661, non-saturating", "arXiv 1611.04076", "arXiv 1705.02894"
MEAN = "the relativistic average divergence of arXiv 1901.02474"

GAN_LOSSES = Registry(
    "GAN loss",
    {
        "ns": separable(logistic, softplus, logistic, LOGISTIC, MONOTONE["ns"].divergence),
        "saturating": separable(logistic, softplus, lambda z: -softplus(z), "arXiv 1406.2661", "2 JS(p, q)"),
        "lsgan": separable(
            lambda z: square(z) / 2,
            lambda z: z.square() / 2,
            lambda z: square(z) / 2,
            LSGAN,
            "triangular discrimination Σ (p - q)² / (p + q)",
        ),
        "hinge": separable(hinge, lambda z: relu(1 + z), lambda z: -z, HINGE, "total variation"),
        "wgan": separable(
            lambda z: -z, lambda z: z, lambda z: -z, "arXiv 1701.07875", "W1, where the critic is 1-Lipschitz"
        ),
        "rsgan": RSGAN,
        "rpgan": RSGAN,
        "rp-ls": paired(square, RP, "at most half the triangular discrimination of P and swap"),
        "rp-hinge": paired(hinge, RP, "at most the total variation of P and swap"),
        "rasgan": averaged(logistic, RA, MEAN),
        "ralsgan": averaged(square, RA, MEAN),
        "rahinge": averaged(hinge, RA, MEAN),
        "gan-qp": GanLoss(
            gan_qp_critic,
            lambda real, fake: (real - fake).mean(),
            "arXiv 1811.07296",
            relativistic=True,
            needs_distance=True,
            divergence="½ (p - q)ᵀ L⁺ (p - q), L the Laplacian of weights (P + swap) / (λ d)",
        ),
    }
    | {f"f-gan-{name}": f_gan(name, divergence) for name, divergence in F_DIVERGENCES.items()}
    | {f"monoflow-{name}": monoflow(h) for name, h in MONOTONE.items()},
    listing="`sorted(rope_mm.losses.GAN_LOSSES)`",
)


def difference(real: Tensor, fake: Tensor) -> Tensor:
    """real - fake of images (b, ...), as (b, n), in float32 at least.

    Raises:
        ValueError: images of different shapes, or without entries to average over.
    """
    check_real_tensors(**{"the first image tensor": real, "the second image tensor": fake})
    if real.shape != fake.shape or real.dim() < 2 or not real.numel():
        raise ValueError(
            "a distance pairs images (b, ...) with as many of the same shape, not empty, "
            f"not {tuple(real.shape)} with {tuple(fake.shape)}"
        )
    return (at_least_float32(real) - at_least_float32(fake)).flatten(1)


def l1(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference (b,) of images (b, ...): free of the resolution."""
    return difference(real, fake).abs().mean(1)


def l2(real: Tensor, fake: Tensor) -> Tensor:
    """Root mean square difference (b,) of images (b, ...): free of the resolution."""
    gap = difference(real, fake)
    return torch.linalg.vector_norm(gap, dim=1) / gap.shape[1] ** 0.5


DISTANCES = Registry("distance", {"l1": l1, "l2": l2})


def transport_cost(noise: Tensor, generated: Tensor) -> Tensor:
    """E‖G(z) - z‖² per entry: ties each image to its own noise, a term for the generator beside its loss.

    Of all generators with the same law it favours the one that moves the noise least, which steadies plain
    transformers (adversarial flow models, ByteDance-Seed).

    Args:
        noise: z (b, ...), of the images' shape.
        generated: G(z) (b, ...).

    Raises:
        ValueError: different shapes.
    """
    return difference(generated, noise).square().mean()
