"""Particles against closed forms (kexue.fm/archives/9660, 9662; MonoFlow, arXiv 2302.01075)."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from rope_mm.losses import F_DIVERGENCES, MONOTONE
from rope_mm.theory.flow import (
    follow,
    gaussian,
    gaussian_ratio,
    jko,
    langevin,
    learned_ratio,
    projection,
    raw,
    transport,
    variational,
    velocity,
)

P = MultivariateNormal(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
TARGET = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 0.89]]))
GRID = torch.linspace(-6, 6, 241, dtype=torch.float64)  # of scores


def normal(count, mean=0.0, spread=1.0):
    """Sorted particles (n,) of exactly this mean and spread."""
    z = Normal(0, 1).icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return mean + spread * z / z.std(correction=0)


def kl(time):
    """KL(q_t‖p) of q_0 = N(2, 0.3²) and p = N(0, 1)."""
    mean, variance = 2 * math.exp(-time), 1 + (0.09 - 1) * math.exp(-2 * time)
    return (variance + mean**2 - 1 - math.log(variance)) / 2


def slopes(h):
    d = GRID.clone().requires_grad_()
    return torch.autograd.grad(h(d).sum(), d)[0]


def test_the_closed_form_is_the_published_one():
    assert [kl(t) for t in (0.5, 1, 2)] == pytest.approx([0.772, 0.275, 0.0367], rel=2e-3)


@pytest.mark.parametrize("ratio", [gaussian_ratio(P), learned_ratio(normal(1000)[:, None])])
def test_the_flow_of_the_reverse_kl_follows_the_closed_form(ratio):
    path = list(transport(normal(1000, 2, 0.3)[:, None], ratio, MONOTONE["logit"], 2.0, 40))
    for time in (0.5, 1, 2):
        particles = path[round(20 * time) - 1]
        assert kl_divergence(gaussian(particles), P).item() == pytest.approx(kl(time), rel=0.02)


def test_langevin_particles_have_the_same_marginals():
    generator = torch.Generator().manual_seed(0)
    start = normal(2**20, 2, 0.3)[:, None]  # that many, for the mean's own error is 0.7 % of the last KL
    path = [gaussian(particles) for particles in langevin(start, P, 2.0, 40, generator)]
    for time in (0.5, 1, 2):
        assert kl_divergence(path[round(20 * time) - 1], P).item() == pytest.approx(kl(time), rel=0.02)


def test_a_jko_step_is_the_implicit_euler_step_of_mean_and_spread():
    rate, mean, spread = 0.1, 2.0, 0.3
    particles = normal(100, mean, spread)
    for _ in range(5):
        particles = jko(particles, P, rate)
        mean = mean / (1 + rate)
        spread = (spread + math.sqrt(spread**2 + 4 * rate * (1 + rate))) / (2 * (1 + rate))
        assert particles.mean().item() == pytest.approx(mean, rel=1e-6)
        assert particles.std(correction=0).item() == pytest.approx(spread, rel=0.01)


@pytest.mark.slow
def test_jko_follows_the_closed_form_as_its_steps_shrink():
    particles, rate = normal(64, 2, 0.3), 1 / 160
    for time, steps in ((0.5, 80), (1.0, 80), (2.0, 160)):
        for _ in range(steps):
            particles = jko(particles, P, rate)
        found = kl_divergence(gaussian(particles[:, None]), P).item()
        assert found == pytest.approx(kl(time), rel=0.02)


@pytest.mark.parametrize(
    "particles", [[1.0, 0.0], [0.0, 0.0], [0.0, math.inf], [-math.inf, 0.0], [math.nan, 0.0], []]
)
def test_jko_refuses_particles_that_are_not_finite_and_rising(particles):
    with pytest.raises(ValueError, match=r"jko needs finite particles .* sort them"):
        jko(torch.tensor(particles), P, 0.1)


@pytest.mark.parametrize("rate", [0.0, -0.1, math.nan, math.inf, "1"])
def test_jko_refuses_a_rate_at_which_it_would_never_end(rate):
    with pytest.raises(ValueError, match="jko: rate must be a finite number > 0"):
        jko(torch.tensor([0.0, 1.0]), P, rate)


@pytest.mark.parametrize(
    ("rate", "end"), [(1e-300, [-0.5, 0.1, 1.0]), (1e-12, [-0.5, 0.1, 1.0]), (1e12, [-1.0, 0.0, 1.0])]
)
def test_jko_stays_at_rates_near_zero_and_reaches_the_minimum_at_large_ones(rate, end):
    end = torch.tensor(end, dtype=torch.float64)  # of three particles: x² / 2 - log x is least at 1
    start = torch.tensor([-0.5, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(jko(start, P, rate), end, atol=1e-9, rtol=0)


def test_jko_refuses_particles_where_the_target_has_no_density():
    from torch.distributions import Independent, Uniform

    box = Independent(Uniform(torch.zeros(1), torch.ones(1), validate_args=False), 1)
    with pytest.raises(ValueError, match="where p has a density"):
        jko(torch.tensor([0.5, 2.0]), box, 0.1)


def test_the_kl_falls_at_the_rate_of_the_fisher_divergence():
    for mean, spread in ((2.0, 0.3), (0.5, 1.5)):
        particles = normal(20_000, mean, spread)[:, None]
        v = velocity(gaussian_ratio(P)(particles), MONOTONE["logit"], particles)
        fisher = mean**2 + spread**2 - 2 + spread**-2
        assert v.square().mean().item() == pytest.approx(fisher, rel=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "pearson", "neyman", "hellinger", "js", "gan"])
def test_every_f_divergence_falls_at_the_mean_square_of_its_velocity(name):
    f, h = F_DIVERGENCES[name].f, variational(F_DIVERGENCES[name])
    p, q = Normal(0.0, 1.0), Normal(torch.tensor(0.4, dtype=torch.float64), 1.1)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    weight = q.log_prob(x[:, 0]).exp()
    field = lambda x: velocity(lambda x: (p.log_prob(x) - q.log_prob(x))[:, 0], h, x)  # noqa: E731
    v, v_slope = torch.func.jvp(field, (x,), (torch.ones_like(x),))
    time = torch.zeros((), dtype=torch.float64, requires_grad=True)
    # particles x + t v carry q; the density at their places is q / (1 + t v')
    log_ratio = (p.log_prob(x + time * v) + (1 + time * v_slope).log() - q.log_prob(x))[:, 0]
    divergence = torch.trapezoid(weight * f(log_ratio.exp()), x[:, 0])
    (rate,) = torch.autograd.grad(divergence, time)
    assert rate.item() == pytest.approx(-torch.trapezoid(weight * v[:, 0] ** 2, x[:, 0]).item(), rel=1e-6)


@pytest.mark.parametrize("name", MONOTONE)
def test_every_h_increases(name):
    assert (slopes(MONOTONE[name]) > 0).all()


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_variational_loss_of_every_f_never_decreases(name):
    assert (slopes(variational(F_DIVERGENCES[name])) >= -1e-9).all()
    assert (slopes(F_DIVERGENCES[name].conjugate) >= 0).all()


@pytest.mark.parametrize(
    ("f", "h"), [("kl", "kl"), ("reverse-kl", "logit"), ("pearson", "pearson"), ("js", "vanilla")]
)
def test_four_h_are_variational_losses_of_an_f(f, h):
    torch.testing.assert_close(slopes(variational(F_DIVERGENCES[f])), slopes(MONOTONE[h]))
    torch.testing.assert_close(slopes(variational(F_DIVERGENCES["hellinger"])), slopes(MONOTONE["hellinger"]))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_raw_f_increases_only_where_f_falls_everywhere(name):
    assert bool((slopes(raw(F_DIVERGENCES[name])) > 0).all()) is (name in ("reverse-kl", "gan"))


@pytest.mark.parametrize(
    ("name", "rounds"),
    [(name, 500) for name in MONOTONE if name not in ("exp", "pearson")]
    + [("exp", 800), pytest.param("pearson", 2500, marks=pytest.mark.slow)],
)
def test_a_generator_of_any_increasing_h_finds_the_gaussian(name, rounds):
    *_, q = follow(TARGET, MONOTONE[name], rounds=rounds, rate=0.01)
    assert q.mean.abs().max() < 0.05
    torch.testing.assert_close(q.covariance_matrix, TARGET.covariance_matrix, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("kl", (1.418, 1.433)),
        ("pearson", (1.391, 1.282)),
        ("hellinger", (1.512, 1.523)),
        ("js", (1.558, 1.487)),
    ],
)
@pytest.mark.slow
def test_the_raw_f_carries_the_generator_away_as_published(name, published):
    *_, q = follow(TARGET, raw(F_DIVERGENCES[name]), rounds=3000, rate=0.001)
    assert q.mean.tolist() == pytest.approx(published, abs=0.15)
    assert q.covariance_matrix[0, 1] < -0.3  # tilted against the target's 0.8


def test_the_raw_f_carries_the_generator_away():
    *_, q = follow(TARGET, raw(F_DIVERGENCES["kl"]), rounds=500, rate=0.001)
    assert (q.mean > 1.1).all()


def test_the_first_gradient_of_the_projection_is_that_of_the_usual_loss():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    z, push = torch.randn(64, 3), 0.3
    log_ratio = gaussian_ratio(TARGET)(net(z).detach())
    before = net(z).detach()
    moved = before + push * velocity(log_ratio, MONOTONE["logit"], before)
    followed = torch.autograd.grad(projection(net(z), moved), list(net.parameters()))
    usual = torch.autograd.grad(log_ratio(net(z)).mean(), list(net.parameters()))
    for one, other in zip(followed, usual, strict=True):
        torch.testing.assert_close(one, -2 * push * other)


def test_many_steps_on_one_critic_overshoot_unless_they_follow_the_projection():
    h = MONOTONE["logit"]
    path = {
        push: [
            kl_divergence(q, TARGET).item()
            for q in follow(TARGET, h, rounds=30, rate=0.01, inner=50, push=push)
        ]
        for push in (None, 0.1)
    }
    assert max(path[None][5:]) > 10
    assert path[0.1] == sorted(path[0.1], reverse=True)
    assert path[0.1][-1] < 0.05


def test_jko_refuses_particles_that_are_no_tensor():
    with pytest.raises(ValueError, match="particles is a list; give a tensor"):
        jko([0.0, 1.0], P, 0.1)
