"""Particles that carry a distribution q to p, and generators that follow them.

The continuity equation dq/dt = -div(q v) with v = ∇ h(log p/q), h increasing, descends an f-divergence; h the
identity is the Wasserstein gradient flow of KL(q‖p), whose other faces are Langevin's equation and the JKO
scheme. Su, kexue.fm/archives/9660 and 9662; MonoFlow, arXiv 2302.01075.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal
from torch.func import grad, hessian

from rope_mm.checks.fields import Positive, read_value
from rope_mm.checks.tensors import check_real_tensors
from rope_mm.losses import GAN_LOSSES
from rope_mm.losses.divergences import Curve, FDivergence
from rope_mm.losses.drift import projection

LogRatio = Callable[[Tensor], Tensor]  # particles (n, d) -> log p/q (n,)
NEWTON_STEPS, HALVINGS = 200, 60  # of `jko`, at most
Fit = Callable[[Tensor], LogRatio]  # from what q is at the moment, its particles (n, d)


def variational(divergence: FDivergence) -> Curve:
    """h of the generator's loss -E f*(f'(r)) = -E [r f'(r) - f(r)]: h' = r² f''(r) > 0, the flow of D_f."""
    slope = grad(lambda r: divergence.f(r).sum())
    return lambda d: d.exp() * slope(d.exp()) - divergence.f(d.exp())


def raw(divergence: FDivergence) -> Curve:
    """h of the loss E f(r) with r held fixed: h' = -r f'(r), negative where f rises, so no flow of D_f."""
    return lambda d: -divergence.f(d.exp())


def velocity(log_ratio: LogRatio, h: Curve, particles: Tensor) -> Tensor:
    """∇ h(log p/q) (n, d) at the particles.

    Args:
        log_ratio: particles (n, d) -> log p/q (n,).
        h: an increasing curve.
        particles: (n, d).
    """
    return grad(lambda x: h(log_ratio(x)).sum())(particles)


def gaussian(particles: Tensor) -> MultivariateNormal:
    """The normal distribution of the particles' (n, d) own mean and covariance."""
    cov = particles.T.cov(correction=0)
    return MultivariateNormal(particles.mean(0), cov.view(2 * particles.shape[1:]), validate_args=False)


def gaussian_ratio(p: Distribution) -> Fit:
    """Particles -> log p/q, exact as long as they are normal."""

    def fit(particles: Tensor) -> LogRatio:
        q = gaussian(particles)
        return lambda x: p.log_prob(x) - q.log_prob(x)

    return fit


def quadratic(x: Tensor) -> Tensor:
    """1, the entries of x (n, d) and their products: features (n, k) that hold any normal log ratio."""
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1]).unbind()
    return torch.cat([torch.ones_like(x[:, :1]), x, x[:, rows] * x[:, columns]], dim=1)


def learned_ratio(real: Tensor, features: Callable[[Tensor], Tensor] = quadratic) -> Fit:
    """Particles -> log p/q as a critic linear in features learns it from samples of p.

    Args:
        real: samples (n, d) of p.
        features: samples (n, d) -> (n, k).
    """

    def fit(particles: Tensor) -> LogRatio:
        of_real, of_fake = features(real), features(particles)
        weight = torch.zeros(of_real.shape[1], dtype=real.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = GAN_LOSSES["ns"].critic(of_real @ weight, of_fake @ weight)
            value.backward()
            return value

        optimizer.step(loss)
        best = weight.detach()
        return lambda x: features(x) @ best

    return fit


def transport(particles: Tensor, fit: Fit, h: Curve, time: float, steps: int) -> Iterator[Tensor]:
    """Particles (n, d) after each of the steps along dx/dt = ∇ h(log p/q), by Heun's method.

    Args:
        particles: (n, d) at the start.
        fit: how log p/q is found from particles.
        h: an increasing curve; the identity descends KL(q‖p).
        time: from start to end.
        steps: how many.
    """
    rate = time / steps
    for _ in range(steps):
        first = velocity(fit(particles), h, particles)
        ahead = particles + rate * first
        particles = particles + rate / 2 * (first + velocity(fit(ahead), h, ahead))
        yield particles


def langevin(
    particles: Tensor, p: Distribution, time: float, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Particles (n, d) after each of the steps of dx = ∇ log p dt + sqrt 2 dw, by Heun's method.

    Args:
        particles: (n, d) at the start.
        p: the distribution that they come to.
        time: from start to end.
        steps: how many.
        generator: of the noise.
    """
    rate, score = time / steps, grad(lambda x: p.log_prob(x).sum())
    for _ in range(steps):
        noise = torch.randn(particles.shape, generator=generator, dtype=particles.dtype)
        kick, first = (2 * rate) ** 0.5 * noise, score(particles)
        ahead = particles + rate * first + kick
        particles = particles + rate / 2 * (first + score(ahead)) + kick
        yield particles


def jko(particles: Tensor, p: Distribution, rate: float) -> Tensor:
    """argmin over q of W2²(q, q_t) / (2 rate) + KL(q‖p), on the line: one step of the JKO scheme.

    There W2 is the distance of the sorted particles, and the entropy the mean logarithm of their gaps: a
    convex function, minimised by Newton's method with steps halved as long as they do not descend.

    Args:
        particles: (n,), equally likely, in rising order.
        p: a distribution of (1,) vectors.
        rate: the length of the step, positive.

    Raises:
        ValueError: a rate that is no positive number; particles that are not finite and rising, or where p
            has no density; a minimum that Newton's method does not reach.
    """
    rate = read_value("jko", "rate", rate, Positive)
    check_real_tensors(particles=particles)
    if (
        particles.dim() != 1
        or not len(particles)
        or not particles.isfinite().all()
        or not (particles.diff() > 0).all()
    ):
        raise ValueError("jko needs finite particles (n,) in rising order, no two the same; sort them")

    def objective(x: Tensor) -> Tensor:
        move = (x - particles).square().mean() / (2 * rate)
        return move - p.log_prob(x[:, None]).mean() - x.diff().log().sum() / len(x)

    x, value = particles, objective(particles)
    if not value.isfinite():
        raise ValueError("jko needs particles where p has a density, and some have none")
    for _ in range(NEWTON_STEPS):
        step = torch.linalg.solve(hessian(objective)(x), grad(objective)(x))
        if not step.isfinite().all():
            raise ValueError("jko finds no finite step; take a larger rate, or particles further apart")
        for _ in range(HALVINGS):
            lower = objective(x - step)
            if lower <= value:  # a nan, of gaps that close, is not below either
                break
            step = step / 2
        else:
            return x  # no step is left that descends: rounding is all that moves
        x = x - step
        if value - lower < 1e-12:
            return x
        value = lower
    raise ValueError(f"jko has not reached the minimum in {NEWTON_STEPS} steps; take a rate below {rate}")


def follow(
    p: MultivariateNormal,
    h: Curve,
    *,
    rounds: int,
    rate: float,
    inner: int = 1,
    push: float | None = None,
    batch: int = 1000,
    seed: int = 0,
) -> Iterator[MultivariateNormal]:
    """The normal q after each round, made by a generator x = b + A z from (1, 1) and the identity.

    A round holds the exact ratio log p/q fixed and takes `inner` steps of Adam. Without `push` they descend
    the usual loss -E h(log p/q). With it they descend the projection on the particles moved by push · v, over
    2 push; its gradient is at first that of the usual loss: one step is the same, many are not.

    Args:
        p: a normal distribution on the plane.
        h: an increasing curve.
        rounds: how many.
        rate: of Adam.
        inner: steps in a round.
        push: how far particles are moved along their velocity, or None.
        batch: samples of z in a round.
        seed: of z.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.ones(2, requires_grad=True)
    scale = torch.eye(2, requires_grad=True)
    optimizer = torch.optim.Adam([mean, scale], lr=rate)

    def current() -> MultivariateNormal:
        matrix = scale.detach().clone()
        return MultivariateNormal(mean.detach().clone(), matrix @ matrix.T, validate_args=False)

    for _ in range(rounds):
        q, z = current(), torch.randn(batch, 2, generator=generator)
        log_ratio = lambda x, q=q: p.log_prob(x) - q.log_prob(x)  # noqa: E731
        before = (mean + z @ scale.T).detach()
        moved = before + (push or 0.0) * velocity(log_ratio, h, before)
        for _ in range(inner):
            x = mean + z @ scale.T
            loss = projection(x, moved) / (2 * push) if push else -h(log_ratio(x)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield current()
