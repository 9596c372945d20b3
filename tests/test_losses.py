import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn.functional import scaled_dot_product_attention

from rope_mm.losses import (
    DISTANCES,
    GAN_LOSSES,
    PENALTIES,
    GanLoss,
    input_gradients,
    twice_differentiable,
)
from rope_mm.losses.gradients import squares

REAL, FAKE = torch.tensor([1.3, 2.9, 8.4, 6.3]), torch.tensor([4.8, 1.2, -3.5, 5.9])
RELATIVISTIC = [name for name, loss in GAN_LOSSES.items() if loss.relativistic]


def log_sigmoid(z):
    return math.log(1 / (1 + math.exp(-z)))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def pairs():
    return list(zip(REAL.tolist(), FAKE.tolist(), strict=True))


MR, MF = REAL.mean().item(), FAKE.mean().item()
D = [2.0, 0.5, 1.0, 3.0]

# each pair of formulas written out once more, in plain Python, from its article
CLOSED_FORMS = {
    "ns": (
        mean(-log_sigmoid(a) - log_sigmoid(-b) for a, b in pairs()),
        mean(-log_sigmoid(b) for _, b in pairs()),
    ),
    "saturating": (
        mean(-log_sigmoid(a) - log_sigmoid(-b) for a, b in pairs()),
        mean(log_sigmoid(-b) for _, b in pairs()),
    ),
    "lsgan": (
        mean((a - 1) ** 2 / 2 + b**2 / 2 for a, b in pairs()),
        mean((b - 1) ** 2 / 2 for _, b in pairs()),
    ),
    "hinge": (mean(max(0, 1 - a) + max(0, 1 + b) for a, b in pairs()), -MF),
    "wgan": (MF - MR, -MF),
    "rsgan": (mean(-log_sigmoid(a - b) for a, b in pairs()), mean(-log_sigmoid(b - a) for a, b in pairs())),
    "rpgan": (mean(-log_sigmoid(a - b) for a, b in pairs()), mean(-log_sigmoid(b - a) for a, b in pairs())),
    "rp-ls": (mean((a - b - 1) ** 2 for a, b in pairs()), mean((b - a - 1) ** 2 for a, b in pairs())),
    "rp-hinge": (mean(max(0, 1 - a + b) for a, b in pairs()), mean(max(0, 1 - b + a) for a, b in pairs())),
    "rasgan": (
        mean(-log_sigmoid(a - MF) - math.log(1 - 1 / (1 + math.exp(-(b - MR)))) for a, b in pairs()) / 2,
        mean(-log_sigmoid(b - MR) - math.log(1 - 1 / (1 + math.exp(-(a - MF)))) for a, b in pairs()) / 2,
    ),
    "ralsgan": (
        mean((a - MF - 1) ** 2 + (b - MR + 1) ** 2 for a, b in pairs()) / 2,
        mean((b - MR - 1) ** 2 + (a - MF + 1) ** 2 for a, b in pairs()) / 2,
    ),
    "rahinge": (
        mean(max(0, 1 - (a - MF)) + max(0, 1 + (b - MR)) for a, b in pairs()) / 2,
        mean(max(0, 1 + (a - MF)) + max(0, 1 - (b - MR)) for a, b in pairs()) / 2,
    ),
    "gan-qp": (
        mean(-(a - b) + (a - b) ** 2 / (2 * 10 * d) for (a, b), d in zip(pairs(), D, strict=True)),
        MR - MF,
    ),
}

# f and the activation of each f-GAN loss; the conjugate is found as the supremum that it is
F_GAN = {
    "kl": (lambda u: u * math.log(u), lambda v: v),
    "reverse-kl": (lambda u: -math.log(u), lambda v: -math.exp(-v)),
    "pearson": (lambda u: (u - 1) ** 2, lambda v: v),
    "neyman": (lambda u: (1 - u) ** 2 / u, lambda v: 1 - math.exp(-v)),
    "hellinger": (lambda u: (math.sqrt(u) - 1) ** 2, lambda v: 1 - math.exp(-v)),
    "js": (
        lambda u: u * math.log(u) - (u + 1) * math.log((1 + u) / 2),
        lambda v: math.log(2 / (1 + math.exp(-v))),
    ),
    "gan": (lambda u: u * math.log(u) - (u + 1) * math.log(1 + u), log_sigmoid),
    "tv": (lambda u: abs(u - 1) / 2, lambda v: math.tanh(v) / 2),
}


def conjugate(f, t):
    """sup over u of u t - f(u), for u = exp(x)."""
    best = minimize_scalar(
        lambda x: f(math.exp(x)) - t * math.exp(x),
        bounds=(-25, 15),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return -best.fun


H = {
    "logit": lambda d: d,
    "ns": log_sigmoid,
    "vanilla": lambda d: math.log(1 + math.exp(d)),
    "shifted": lambda d: math.log(1 + math.exp(d + 5)),
    "arcsinh": math.asinh,
    "exp": lambda d: math.exp(1.5 * d),
    "kl": math.exp,
    "pearson": lambda d: math.exp(d) ** 2,
    "hellinger": lambda d: math.sqrt(math.exp(d)),
}

for name, (f, activation) in F_GAN.items():
    CLOSED_FORMS[f"f-gan-{name}"] = (
        mean(-activation(a) + conjugate(f, activation(b)) for a, b in pairs()),
        mean(-conjugate(f, activation(b)) for _, b in pairs()),
    )
for name, h in H.items():
    CLOSED_FORMS[f"monoflow-{name}"] = (CLOSED_FORMS["ns"][0], mean(-h(b) for _, b in pairs()))


def critic(name, real, fake, distance=None):
    loss = GAN_LOSSES[name]
    extra = (torch.ones_like(real) if distance is None else distance,) if loss.needs_distance else ()
    return loss.critic(real, fake, *extra)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_each_loss_is_its_formula(name):
    of_critic, of_generator = CLOSED_FORMS[name]
    assert critic(name, REAL.double(), FAKE.double(), torch.tensor(D)).item() == pytest.approx(
        of_critic, rel=1e-6
    )
    assert GAN_LOSSES[name].generator(REAL.double(), FAKE.double()).item() == pytest.approx(
        of_generator, rel=1e-6
    )


@pytest.mark.parametrize("name", RELATIVISTIC)
@given(shift=st.floats(-100, 100))
def test_a_relativistic_loss_does_not_see_a_common_shift_of_the_scores(name, shift):
    real, fake = REAL.double(), FAKE.double()
    torch.testing.assert_close(critic(name, real + shift, fake + shift), critic(name, real, fake))
    generator = GAN_LOSSES[name].generator
    torch.testing.assert_close(generator(real + shift, fake + shift), generator(real, fake))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_the_critic_wants_reals_above_fakes_and_the_generator_the_reverse(name):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    of_real, of_fake = torch.autograd.grad(critic(name, real, fake), (real, fake))
    assert (of_real < 0).all() or name == "lsgan"
    assert (of_fake > 0).all() or name == "lsgan"  # its fakes are aimed at 0, where they stand
    (of_fake,) = torch.autograd.grad(GAN_LOSSES[name].generator(real, fake), fake)
    assert (of_fake < 0).all()


def test_a_loss_of_ones_own_is_two_functions():
    mine = GanLoss(lambda real, fake: (fake - real).mean(), lambda real, fake: -fake.mean(), "none")
    assert mine.critic(REAL, FAKE) == pytest.approx(MF - MR)
    assert not mine.needs_distance


def test_the_best_rsgan_critic_on_discrete_data_measures_the_swap_and_is_the_log_ratio():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    pair, swap = p[:, None] * q, q[:, None] * p  # P(real, fake) and the same with the places swapped
    mix = (pair + swap) / 2
    js = ((pair * (pair / mix).log()).sum() + (swap * (swap / mix).log()).sum()) / 2
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def value():
        optimizer.zero_grad()
        loss = (pair * torch.nn.functional.softplus(-(scores[:, None] - scores))).sum()
        loss.backward()
        return loss

    optimizer.step(value)
    assert -value().item() == pytest.approx((js - math.log(2)).item(), abs=1e-6)
    best = scores.detach() - (p / q).log()
    torch.testing.assert_close(best, best.mean().expand(3), atol=1e-5, rtol=0)


def test_the_best_gan_qp_critic_of_one_pair_stands_strength_times_the_distance_apart():
    for distance in (0.1, 1.0, 100.0):
        d, gap = torch.tensor([distance]), torch.tensor([10 * distance], requires_grad=True)
        value = critic("gan-qp", gap, torch.zeros(1), d)
        (slope,) = torch.autograd.grad(value, gap)
        assert slope.abs() < 1e-6
        assert value.item() == pytest.approx(-10 * distance / 2)


def test_coinciding_pairs_do_not_divide_by_zero():
    assert critic("gan-qp", REAL, FAKE, torch.zeros(4)).isfinite()


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 16, 4)])
def test_distances_are_means_over_the_entries_so_that_size_does_not_matter(shape):
    real, fake = torch.randn(shape), torch.randn(shape)
    flat = (real - fake).reshape(3, -1)
    torch.testing.assert_close(DISTANCES["l1"](real, fake), flat.abs().mean(1))
    torch.testing.assert_close(DISTANCES["l2"](real, fake), flat.square().mean(1).sqrt())


def test_the_penalty_of_a_quadratic_critic_is_half_the_mean_square_of_its_gradient():
    images = torch.randn(5, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 16, dtype=torch.float64)
    scores = torch.einsum("bi,ij,bj->b", images.flatten(1), weight, images.flatten(1))
    expected = images.flatten(1) @ (weight + weight.T)
    gradient = input_gradients(scores, images)
    torch.testing.assert_close(gradient.flatten(1), expected)
    assert PENALTIES["r1"](gradient, 0 * gradient).item() == pytest.approx(
        expected.square().sum(1).mean().item() / 2
    )
    assert PENALTIES["r2"](0 * gradient, gradient).item() == pytest.approx(
        expected.square().sum(1).mean().item() / 2
    )


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_a_penalty_is_the_same_for_a_batch_and_the_batch_twice(name):
    gradient = torch.randn(5, 1, 4, 4)
    twice = torch.cat([gradient, gradient])
    torch.testing.assert_close(PENALTIES[name](twice, twice), PENALTIES[name](gradient, gradient))


def attended(images):
    q = images.view(2, 1, 4, 4)
    return scaled_dot_product_attention(q, q.tanh(), q).sum((1, 2, 3))


def test_a_penalty_trains_through_attention_made_twice_differentiable():
    images = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)

    def penalty(x):
        with twice_differentiable():
            return squares(input_gradients(attended(x), x)).mean() / 2

    assert torch.autograd.gradcheck(penalty, images)


def test_a_penalty_through_fused_attention_is_refused_with_the_cure():
    images = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(ValueError, match=r"ScaledDotProductFlash.*with twice_differentiable"):
        input_gradients(attended(images), images)


@pytest.mark.parametrize(
    ("table", "typo", "nearest"), [(GAN_LOSSES, "rsgann", "rsgan"), (PENALTIES, "r11", "r1")]
)
def test_an_unknown_name_is_answered_with_the_nearest(table, typo, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}"):
        table[typo]
