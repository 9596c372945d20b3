"""The Dirac-GAN against its closed forms (kexue.fm/archives/6583; Mescheder et al., arXiv 1801.04406)."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_mm.losses import GAN_LOSSES
from rope_mm.theory.dynamics import Descent, Dirac, average, eigenvalues, flow, growth, walk, wedge

START = torch.tensor([[0.1, 0.2], [0.2, 0.1]], dtype=torch.float64)  # phi, theta of the article
ORIGIN = torch.zeros(2, 1, dtype=torch.float64)
ZERO, ONE = {"zero-centred": 0.2}, {"one-centred": 0.2}  # the article's lambda = 0.1 is gamma / 2


def radii(game, time, count=401, tolerance=1e-7):
    """‖phi‖ and ‖theta‖ (t, 2)."""
    return flow(game.field, START, torch.linspace(0, time, count), tolerance).norm(dim=-1)


# the vector fields as the article prints them, its weights in place of gamma
@pytest.mark.parametrize(
    ("game", "article"),
    [
        (
            Dirac(loss="ns"),
            lambda p, t: (-torch.sigmoid(t @ p) * t, (1 - torch.sigmoid(t @ p)) * p),
        ),
        (
            Dirac(loss="wgan", critic="normalised"),
            lambda p, t: (-t / p.norm() + (t @ p) * p / p.norm() ** 3, p / p.norm()),
        ),
        (Dirac(loss="wgan", penalties=ZERO), lambda p, t: (-t - 0.2 * p, p)),
        (Dirac(loss="wgan", penalties=ONE), lambda p, t: (-t - 0.2 * (1 - 1 / p.norm()) * p, p)),
        (Dirac(loss="gan-qp"), lambda p, t: (-t - (t @ p) * t / t.norm(), p)),
        (Dirac(loss="gan-qp", decay=0.1), lambda p, t: (-t - (t @ p) * t / t.norm() - 0.1 * p, p)),
    ],
)
@given(seed=st.integers(0, 99))
@settings(max_examples=10)
def test_each_vector_field_is_the_articles(game, article, seed):
    state = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(game.field(state), torch.stack(article(*state)))


@pytest.mark.parametrize(
    ("game", "time"),
    [
        (Dirac(loss="ns"), 700),
        pytest.param(Dirac(loss="rsgan"), 700, marks=pytest.mark.slow),
        (Dirac(loss="gan-qp"), 300),
    ],
)
def test_losses_of_the_product_alone_end_on_a_circle_of_radius_root_of_the_wedge(game, time):
    end = radii(game, time)[-1]
    torch.testing.assert_close(end, torch.full_like(end, math.sqrt(0.03)), atol=1e-3, rtol=0)


def test_the_normalised_wgan_critic_neither_converges_nor_settles():
    theta = radii(Dirac(loss="wgan", critic="normalised"), 10)[:, 1]
    assert theta.mean().item() == pytest.approx(0.25, abs=0.01)
    assert theta.max().item() == pytest.approx(0.40, abs=0.01)


def test_a_one_centred_penalty_ends_on_the_unit_circle():
    end = radii(Dirac(loss="wgan", penalties=ONE), 200)[-1]
    torch.testing.assert_close(end, torch.ones_like(end), atol=1e-3, rtol=0)


def test_a_zero_centred_penalty_converges_at_half_its_gamma():
    times = torch.linspace(0, 40, 5, dtype=torch.float64)
    states = flow(Dirac(loss="wgan", penalties=ZERO).field, START, times)
    phi, theta = START
    swing = math.sqrt(1 - 0.1**2)  # theta'' + 0.2 theta' + theta = 0, from theta and theta' = phi
    angle = swing * times[:, None]
    exact = (-0.1 * times[:, None]).exp() * (theta * angle.cos() + (phi + 0.1 * theta) / swing * angle.sin())
    torch.testing.assert_close(states[:, 1], exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "loss", sorted({"ns", "saturating", "hinge", "rp-ls", "rasgan", "gan-qp", "f-gan-kl"})
)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_wedge_is_conserved_and_decays_with_the_critics_weights(loss, decay):
    times = torch.linspace(0, 5, 6, dtype=torch.float64)
    wedges = wedge(flow(Dirac(loss=loss, decay=decay).field, START, times))
    torch.testing.assert_close(wedges, 0.03 * (-decay * times).exp(), atol=1e-6, rtol=0)


def test_in_one_dimension_gan_qp_converges_as_one_over_time():
    start = torch.full((2, 1), 0.3, dtype=torch.float64)  # the averaged equation is that of small radii
    ends = flow(Dirac(loss="gan-qp").field, start, [0, 25, 100]).flatten(1).norm(dim=1)
    averaged = [1 / (1 / math.sqrt(0.18) + 2 * time / (3 * math.pi)) for time in (25, 100)]
    assert ends[1:].tolist() == pytest.approx(averaged, rel=5e-3)


@pytest.mark.parametrize("loss", GAN_LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 3.0])
def test_the_eigenvalues_at_the_equilibrium_are_those_of_a_damped_oscillator(loss, gamma):
    fake = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    extra = (torch.ones(1),) if GAN_LOSSES[loss].needs_distance else ()
    (up,) = torch.autograd.grad(GAN_LOSSES[loss].critic(0 * fake.detach(), fake, *extra), fake)
    (down,) = torch.autograd.grad(GAN_LOSSES[loss].generator(0 * fake.detach(), fake), fake)
    root = cmath.sqrt(gamma**2 / 4 + (up * down).item())  # f'² = -up down
    exact = sorted([-gamma / 2 + root, -gamma / 2 - root], key=lambda z: (z.real, z.imag))
    found = eigenvalues(Dirac(loss=loss, penalties={"r1": gamma}).field, ORIGIN).tolist()
    for one, other in zip(sorted(found, key=lambda z: (round(z.real, 9), z.imag)), exact, strict=True):
        assert abs(one - other) < 1e-6


def test_the_logistic_slope_is_one_half_and_r1_with_r2_damp_twice():
    assert eigenvalues(Dirac().field, ORIGIN).imag.abs().tolist() == pytest.approx([0.5, 0.5])
    both = eigenvalues(Dirac(loss="rpgan", penalties={"r1": 0.3, "r2": 0.3}).field, ORIGIN)
    assert both.real.tolist() == pytest.approx([-0.3, -0.3])
    assert both.imag.abs().tolist() == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("rate", [0.01, 0.5, 2.0])
def test_simultaneous_steps_without_a_penalty_always_diverge(rate):
    assert growth(Descent(rate=rate), Dirac().field, ORIGIN) == pytest.approx(math.sqrt(1 + rate**2 / 4))


@pytest.mark.parametrize("turns", [(1, 1), (2, 1), (1, 2), (5, 1)])
def test_alternating_steps_stay_on_the_unit_circle_up_to_the_threshold(turns):
    threshold = 2 / (0.5 * math.sqrt(turns[0] * turns[1]))
    below, above = (Descent(rate=rate * threshold, turns=turns) for rate in (0.99, 1.01))
    assert growth(below, Dirac().field, ORIGIN) == pytest.approx(1, abs=1e-9)
    assert growth(above, Dirac().field, ORIGIN) > 1.1


@pytest.mark.parametrize(("gamma", "threshold"), [(0.1, 0.4), (0.3, 1.2)])
def test_simultaneous_steps_with_r1_are_stable_below_gamma_over_slope_squared(gamma, threshold):
    field = Dirac(penalties={"r1": gamma}).field
    assert growth(Descent(rate=0.99 * threshold), field, ORIGIN) < 1
    assert growth(Descent(rate=1.01 * threshold), field, ORIGIN) > 1


@pytest.mark.parametrize(
    ("momentum", "together", "in_turns", "with_r1"),
    [
        (-0.5, 1.0007, 0.9985, 0.979),
        (0.0, 1.0050, 1.0000, 0.970),
        (0.5, 1.046, 1.032, 0.979),
        (0.9, 1.198, 1.192, 1.147),
    ],
)
def test_positive_momentum_hurts(momentum, together, in_turns, with_r1):
    plain, damped = Dirac().field, Dirac(penalties={"r1": 0.3}).field
    sim = Descent(rate=0.2, momentum=momentum)
    alt = Descent(rate=0.2, momentum=momentum, turns=(1, 1))
    found = growth(sim, plain, ORIGIN), growth(alt, plain, ORIGIN), growth(alt, damped, ORIGIN)
    assert found == pytest.approx((together, in_turns, with_r1), abs=6e-4)


def test_a_step_moves_the_players_together_or_one_after_the_other():
    field, state = Dirac().field, torch.stack([START, torch.zeros_like(START)])
    together = Descent(rate=0.1)(field, state)[0]
    torch.testing.assert_close(together, START + 0.1 * field(START))
    first, second = Descent(rate=0.1, turns=(1, 1))(field, state)[0]
    torch.testing.assert_close(first, together[0])
    torch.testing.assert_close(second, START[1] + 0.1 * field(torch.stack([first, START[1]]))[1])


def test_averaged_weights_come_at_least_ten_times_closer():
    start = torch.ones(2, 1, dtype=torch.float64)
    states = torch.stack(list(walk(Descent(rate=0.2, turns=(1, 1)), Dirac().field, start, 5_000)))
    theta, mean = states[:, 1], average(states, 0.999)[:, 1]
    turn = slice(-63, None)  # 2 pi / (rate f')
    assert theta[turn].abs().max() > 10 * mean[turn].abs().max()


def test_a_penalty_of_scores_is_refused():
    with pytest.raises(ValueError, match="takes penalties of gradients, and 'lecam' is one of scores"):
        Dirac(penalties={"lecam": 1.0}).field(START)


def test_a_flow_that_leaves_the_finite_says_when():
    with pytest.raises(ValueError, match="the flow stops at t = "):
        flow(lambda state: state**3, torch.ones(2, 1, dtype=torch.float64), [0, 10])
