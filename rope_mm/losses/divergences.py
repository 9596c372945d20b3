"""What a generator can descend: f-divergences with their variational critics, and increasing h of log p/q."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from rope_mm.registry import Registry

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FDivergence:
    """D_f(p‖q) = E_q f(p/q) = max over v of E_p activation(v) - E_q conjugate(v), v any real score.

    At the best v the activation is f'(p/q) (f-GAN, arXiv 1606.00709, equation 4 and table 6).

    Attributes:
        f: convex, f(1) = 0.
        activation: any real score v -> the domain of f*; it increases.
        conjugate: f* ∘ activation; it increases.
    """

    f: Curve
    activation: Curve
    conjugate: Curve


F_DIVERGENCES = Registry(
    "f-divergence",
    {
        "kl": FDivergence(lambda u: torch.xlogy(u, u), lambda v: v, lambda v: (v - 1).exp()),
        "reverse-kl": FDivergence(lambda u: -u.log(), lambda v: -(-v).exp(), lambda v: v - 1),
        # u < 0 is no density ratio, so f* stays at -f(0) = -1 below v = -2
        "pearson": FDivergence(
            lambda u: (u - 1).square(), lambda v: v, lambda v: relu(v / 2 + 1).square() - 1
        ),
        "neyman": FDivergence(
            lambda u: (1 - u).square() / u, lambda v: 1 - (-v).exp(), lambda v: 2 - 2 * (-v / 2).exp()
        ),
        "hellinger": FDivergence(
            lambda u: (u.sqrt() - 1).square(), lambda v: 1 - (-v).exp(), lambda v: v.exp() - 1
        ),
        "js": FDivergence(
            lambda u: torch.xlogy(u, u) - (u + 1) * ((u + 1) / 2).log(),
            lambda v: math.log(2) - softplus(-v),
            lambda v: softplus(v) - math.log(2),
        ),
        "gan": FDivergence(
            lambda u: torch.xlogy(u, u) - (u + 1) * (u + 1).log(),
            lambda v: -softplus(-v),
            lambda v: softplus(v),
        ),
        "tv": FDivergence(lambda u: (u - 1).abs() / 2, lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    },
)


@dataclass(frozen=True)
class Monotone:
    """An increasing h of the score d = log p/q: minimising -E h(d) moves samples along h'(d) ∇d.

    The flow descends the D_f with f''(r) = h'(log r) / r² (MonoFlow, arXiv 2302.01075): convex, as h
    increases.

    Attributes:
        h: the curve, of scores of any shape.
        divergence: D_f in words.
    """

    h: Curve
    divergence: str

    def __call__(self, score: Tensor) -> Tensor:
        return self.h(score)


MONOTONE = Registry(
    "increasing h",
    {
        "logit": Monotone(lambda d: d, "KL(q‖p)"),
        "ns": Monotone(lambda d: -softplus(-d), "KL(q‖p) - 2 JS(p, q)"),
        "vanilla": Monotone(softplus, "2 JS(p, q)"),
        "shifted": Monotone(lambda d: softplus(d + 5), "D_f with f'' = 1 / (r (r + e^-5))"),
        "arcsinh": Monotone(torch.arcsinh, "D_f with f'' = 1 / (r² sqrt(1 + log² r))"),
        "exp": Monotone(lambda d: (1.5 * d).exp(), "D_f with f = 2 r^1.5, an alpha-divergence"),
        "kl": Monotone(torch.exp, "KL(p‖q)"),
        "pearson": Monotone(lambda d: (2 * d).exp(), "Pearson's E_q (r - 1)²"),
        "hellinger": Monotone(lambda d: (d / 2).exp(), "squared Hellinger E_q (sqrt r - 1)²"),
    },
)
