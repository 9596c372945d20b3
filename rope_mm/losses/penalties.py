"""Penalties on a critic, in one convention: (gamma / 2) E‖gradient of the score by the image‖².

Each entry is the ½ E, and gamma its weight outside; `gamma` translates the weights of other code. The norm
is each sample's own, over all its entries; then comes the mean over samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated

import torch
from torch import Tensor

from rope_mm.checks.fields import NotNegative, Number, Positive, Real, read_value
from rope_mm.checks.tensors import check_generator, check_real_tensors
from rope_mm.losses.divergences import Curve
from rope_mm.losses.gradients import METHODS, Critic, squared_norms
from rope_mm.losses.scores import at_least_float32, check_rows, is_readable
from rope_mm.registry import Registry

POINTS = {
    "real": lambda real, fake, mix: real,
    "fake": lambda real, fake, mix: fake,
    "between": lambda real, fake, mix: mix * real + (1 - mix) * fake,
}


Fraction = Annotated[float, Real(above=0, at_most=1)]


def check_pairs(real: Tensor, fake: Tensor) -> None:
    """Refuse images that are not (b, ...) of one shape, with b >= 1: broadcast, they would pair otherwise."""
    check_real_tensors(real=real, fake=fake)
    if real.shape != fake.shape or real.dim() < 2 or not len(real):
        raise ValueError(
            "a gradient penalty pairs real images (b, ...) with as many fakes of the same shape, b at least "
            f"1, not {tuple(real.shape)} with {tuple(fake.shape)}"
        )
    check_floating(real=real, fake=fake)


def check_floating(**tensors: Tensor) -> None:
    """Refuse whole numbers where there are gradients."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype}, which has no gradient; give images as floating point numbers"
            )


def check_mean(name: str, mean: Tensor | float) -> None:
    """Refuse a mean score that is no finite number, as a tensor (); elsewhere than on a CPU nobody looks."""
    if isinstance(mean, Tensor):
        check_real_tensors(**{name: mean})
        if mean.dim():
            raise ValueError(
                f"{name} must be one mean score, a number or a tensor (), not {tuple(mean.shape)}"
            )
    if not isinstance(mean, Tensor) or is_readable(mean):
        read_value("a penalty of scores", name, mean, Number)


@dataclass(frozen=True)
class GradientPenalty:
    """½ E value(‖∇D‖²) at the real or fake images, or between a pair at a uniform mix of the two.

    Call it with the gradients (b, ...) at both where they are at hand; `of` computes them.

    Attributes:
        at: "real", "fake" or "between", where the gradient is taken.
        source: paper and equation.
        value: a curve of ‖∇D‖² (b,); None for ‖∇D‖² itself, which one probe estimates without bias.
    """

    at: str
    source: str
    value: Curve | None = None

    def of_squares(self, norms: Tensor) -> Tensor:
        """The penalty of squared norms (b,)."""
        return (norms if self.value is None else self.value(norms)).mean() / 2

    def __call__(self, real_gradient: Tensor, fake_gradient: Tensor) -> Tensor:
        """The penalty of the gradients (b, ...) at real and fake images; see `input_gradients`.

        Raises:
            ValueError: a penalty that needs them somewhere else, no gradients (b, ...).
        """
        if self.at == "between":
            raise ValueError(
                "this penalty is taken between real and fake images, where no gradient was made; "
                "call its .of(critic, real, fake)"
            )
        gradient = real_gradient if self.at == "real" else fake_gradient
        check_pairs(gradient, gradient)
        return self.of_squares(squared_norms(gradient))

    def check(self, method: str, fraction: float, sigma: float) -> None:
        """Refuse what `of` refuses of these.

        Args:
            method: a key of METHODS.
            fraction: of the pairs.
            sigma: the step of "fd".

        Raises:
            ValueError: a fraction outside (0, 1], a sigma that is no positive number, a method that estimates
                only ‖∇D‖² for a penalty that is a curve of it.
        """
        read_value("a gradient penalty", "fraction", fraction, Fraction)
        read_value("a gradient penalty", "sigma", sigma, Positive)
        if self.value is not None and method in ("fd", "jvp"):
            raise ValueError(
                f"method {method!r} estimates ‖∇D‖² alone, and this penalty is a curve of it; take 'autograd'"
            )

    def of(
        self,
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        *,
        method: str = "auto",
        fraction: float = 1.0,
        sigma: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty of a critic at real and fake images.

        Args:
            critic: images (b, ...) -> scores (b,). One that reads captions is a closure that takes as many of
                them as it gets images; it should apply the same augmentation at every call.
            real: images (b, ...).
            fake: images (b, ...), paired with the reals by row.
            method: a key of METHODS; "auto" takes the exact gradient where the critic has second derivatives.
            fraction: of the pairs, the first ones, that the penalty is taken on.
            sigma: the step of "fd"; 0.01 is for images of unit spread.
            generator: of the mix between real and fake, and of random probes.

        Raises:
            ValueError: an unknown method, one that the critic or this penalty does not allow, a fraction or
                sigma out of range, images of other shapes than (b, ...) of both, or none, scores that are not
                one for each image.
        """
        self.check(method, fraction, sigma)
        check_generator(generator)
        check_pairs(real, fake)
        rows = max(1, round(fraction * len(real)))
        real, fake = real[:rows], fake[:rows]
        mix = torch.rand(len(real), generator=generator, dtype=real.dtype, device=real.device)
        images = POINTS[self.at](real, fake, mix.view(-1, *[1] * (real.dim() - 1)))
        estimate = METHODS["autograd" if self.value is not None and method == "auto" else method]
        return self.of_squares(estimate(critic, images, sigma, generator))


@dataclass(frozen=True)
class ScorePenalty:
    """A penalty of scores (b,), not of gradients, computed in float32 at least.

    Attributes:
        value: the equation.
        source: paper and equation.
    """

    value: Callable[..., Tensor]
    source: str

    def __call__(self, *scores: Tensor | float) -> Tensor:
        """The penalty of two sets of scores (b,), and for "lecam" of two mean scores, numbers or ().

        Raises:
            ValueError: another number of arguments, scores that are not (b,) with one b, a mean that is no
                finite number.
        """
        names = tuple(signature(self.value).parameters)
        if len(scores) != len(names):
            raise ValueError(f"this penalty takes ({', '.join(names)}), not {len(scores)} arguments")
        check_rows(**{f"argument {i}": s for i, s in enumerate(scores[:2], 1)})
        for name, mean in zip(names[2:], scores[2:], strict=True):
            check_mean(name, mean)
        return self.value(*(at_least_float32(s) if isinstance(s, Tensor) else s for s in scores))


def consistency(scores: Tensor, augmented: Tensor) -> Tensor:
    """½ E (D(x) - D(T x))² for an augmentation T that keeps what x is."""
    return (scores - augmented).square().mean() / 2


def centring(real: Tensor, fake: Tensor) -> Tensor:
    """½ E (D(real) + D(fake))²: a relativistic loss leaves the common level of the scores free to drift."""
    return (real + fake).square().mean() / 2


def lecam(real: Tensor, fake: Tensor, real_anchor: Tensor | float, fake_anchor: Tensor | float) -> Tensor:
    """½ [E relu(D(real) - fake_anchor)² + E relu(real_anchor - D(fake))²].

    Args:
        real: scores (b,).
        fake: scores (b,).
        real_anchor: a running mean of the scores of reals.
        fake_anchor: a running mean of the scores of fakes.
    """
    return ((real - fake_anchor).relu().square() + (real_anchor - fake).relu().square()).mean() / 2


PENALTIES = Registry(
    "penalty",
    {
        "r1": GradientPenalty("real", "Mescheder et al., arXiv 1801.04406, equation 9"),
        "r2": GradientPenalty("fake", "arXiv 1801.04406, equation 10"),
        "zero-centred": GradientPenalty("between", "Thanh-Tung et al., arXiv 1902.03984"),
        "one-centred": GradientPenalty(
            "between", "WGAN-GP, arXiv 1704.00028", lambda norms: (norms.clamp_min(1e-12).sqrt() - 1).square()
        ),
        "wgan-div": GradientPenalty("between", "arXiv 1712.01026, p = 6", lambda norms: norms**3),
        "consistency": ScorePenalty(consistency, "arXiv 1910.12027"),
        "centring": ScorePenalty(centring, "adversarial flow models, ByteDance-Seed"),
        "lecam": ScorePenalty(lecam, "arXiv 2104.03310, with the relu of StudioGAN"),
    },
)

# gamma of a weight w in other code; APT leaves the difference of step sigma undivided
CONVENTIONS = Registry(
    "convention",
    {
        "half": lambda w, sigma: w,  # (w / 2) ‖∇D‖²: R3GAN, StyleGAN2, StudioGAN, GAT, Self-Forcing
        "whole": lambda w, sigma: 2 * w,  # w ‖∇D‖²: GAN_stability, GigaGAN, WGAN-GP, AFM's gp_scale
        "apt": lambda w, sigma: 2 * w * sigma**2,  # w (D(x + sigma e) - D(x))²: APT, AAPT
    },
)


def gamma(weight: float, convention: str, sigma: float = 1.0) -> float:
    """The gamma of (gamma / 2) E‖∇D‖² that a weight of other code amounts to.

    Args:
        weight: the other code's factor.
        convention: "half" is (w / 2)‖∇D‖², "whole" w‖∇D‖², "apt" w (D(x + sigma e) - D(x))².
        sigma: the step of "apt".

    Raises:
        ValueError: an unknown convention, a weight that is no number >= 0, a sigma that is not positive.

    Examples:
        >>> gamma(10.0, "whole")  # w ‖∇D‖² is (2 w / 2) ‖∇D‖²
        20.0
    """
    weight = read_value("gamma", "weight", weight, NotNegative)
    return CONVENTIONS[convention](weight, read_value("gamma", "sigma", sigma, Positive))
