"""Two-sided adversarial losses on raw critic scores: real and fake (b,), paired by row, scalar out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from rope_mm.choice import Choice


@dataclass(frozen=True)
class GanLoss:
    """What the critic minimises and what the generator minimises.

    Both take scores `(real, fake)`; where `needs_distance`, the critic takes the distance (b,) of each pair
    as its third. Where not `relativistic`, the generator does not look at `real`.
    """

    critic: Callable[..., Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    source: str
    relativistic: bool = False
    needs_distance: bool = False


def separable(on_real: Callable, on_fake: Callable, generator: Callable, source: str) -> GanLoss:
    """E on_real(real) + E on_fake(fake) against E generator(fake)."""
    return GanLoss(
        lambda real, fake: (on_real(real) + on_fake(fake)).mean(),
        lambda real, fake: generator(fake).mean(),
        source,
    )


def paired(f: Callable[[Tensor], Tensor], source: str) -> GanLoss:
    """RpGAN: E f(real - fake) against E f(fake - real), f falling where its argument should grow."""
    return GanLoss(
        lambda real, fake: f(real - fake).mean(),
        lambda real, fake: f(fake - real).mean(),
        source,
        relativistic=True,
    )


def averaged(f: Callable[[Tensor], Tensor], source: str) -> GanLoss:
    """RaGAN: each score against the mean of the other side in this process's batch, half of both terms."""

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        return (f(real - fake.mean()) + f(real.mean() - fake)).mean() / 2

    return GanLoss(critic, lambda real, fake: critic(fake, real), source, relativistic=True)


def gan_qp_critic(real: Tensor, fake: Tensor, distance: Tensor, strength: float = 10.0) -> Tensor:
    """-delta + delta^2 / (2 strength d) with delta = real - fake and d the distance of the pair.

    The square makes steepness costly only relative to how far apart the pair lies; its optimum for two points
    is delta = strength * d, so a far fake keeps a gradient. Coinciding pairs count as 1e-6 apart.
    """
    delta = real - fake
    return (delta.square() / (2 * strength * distance.clamp_min(1e-6)) - delta).mean()


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
RSGAN = paired(logistic, f"{RA}; {RP}")

GAN_LOSSES = Choice(
    "GAN loss",
    {
        "ns": separable(logistic, softplus, logistic, "arXiv 1406.2661, non-saturating"),
        "saturating": separable(
            logistic, softplus, lambda fake: -softplus(fake), "arXiv 1406.2661, equation 1"
        ),
        "lsgan": separable(
            lambda z: square(z) / 2, lambda z: z.square() / 2, lambda z: square(z) / 2, "arXiv 1611.04076"
        ),
        "hinge": separable(hinge, lambda z: relu(1 + z), lambda z: -z, "arXiv 1705.02894"),
        "wgan": separable(lambda z: -z, lambda z: z, lambda z: -z, "arXiv 1701.07875"),
        "rsgan": RSGAN,
        "rpgan": RSGAN,
        "rp-ls": paired(square, RP),
        "rp-hinge": paired(hinge, RP),
        "rasgan": averaged(logistic, RA),
        "ralsgan": averaged(square, RA),
        "rahinge": averaged(hinge, RA),
        "gan-qp": GanLoss(
            gan_qp_critic,
            lambda real, fake: (real - fake).mean(),
            "arXiv 1811.07296",
            relativistic=True,
            needs_distance=True,
        ),
    },
)


def l1(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference (b,) of images (b, ...): free of the resolution."""
    return (real - fake).abs().flatten(1).mean(1)


def l2(real: Tensor, fake: Tensor) -> Tensor:
    """Root mean square difference (b,) of images (b, ...)."""
    return torch.linalg.vector_norm((real - fake).flatten(1), dim=1) / (real[0].numel() ** 0.5)


DISTANCES = Choice("distance", {"l1": l1, "l2": l2})
