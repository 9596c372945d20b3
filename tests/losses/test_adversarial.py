import math
from itertools import product
from operator import itemgetter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from rope_mm.losses import (
    DISTANCES,
    F_DIVERGENCES,
    GAN_LOSSES,
    METHODS,
    MONOTONE,
    PENALTIES,
    GanLoss,
    transport_cost,
)

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


# two distributions on three points, as the hundred equally likely pairs (real, fake) of a batch
COUNTS_P, COUNTS_Q = torch.tensor([5, 3, 2]), torch.tensor([2, 2, 6])
P, Q = COUNTS_P.double() / 10, COUNTS_Q.double() / 10
REALS, FAKES = torch.cartesian_prod(
    torch.arange(3).repeat_interleave(COUNTS_P), torch.arange(3).repeat_interleave(COUNTS_Q)
).unbind(1)
PAIR, SWAP = P[:, None] * Q, Q[:, None] * P
BETWEEN = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]]).double()  # distances


def best(value, shape):
    """The scores that minimise a value, and its minimum."""
    scores = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = value(scores)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach(), value(scores).item()


def unary(name, distance=None):
    """The loss of a critic of one sample: scores (3,)."""
    return best(lambda t: critic(name, t[REALS], t[FAKES], distance), 3)


def binary(name, distance=None):
    """The loss of a critic of both samples, score(a, b) - score(b, a) in place of the difference."""
    return best(lambda t: critic(name, t[REALS, FAKES], t[FAKES, REALS], distance), (3, 3))


def corner(name):
    """The same for losses of straight pieces, whose best scores are at the bends, 1 and -1."""
    scores = [torch.tensor(signs).double() for signs in product((-1, 1), repeat=3)]
    return min(((t, critic(name, t[REALS], t[FAKES]).item()) for t in scores), key=itemgetter(1))


def js(p, q):
    mix = (p + q) / 2
    return (((p * (p / mix).log()).sum() + (q * (q / mix).log()).sum()) / 2).item()


def triangular(p, q):
    return ((p - q).square() / (p + q)).sum().item()


def variation(p, q):
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize(
    ("find", "name", "least"),
    [
        (unary, "ns", 2 * math.log(2) - 2 * js(P, Q)),
        (unary, "saturating", 2 * math.log(2) - 2 * js(P, Q)),
        (unary, "lsgan", 1 / 4 - triangular(P, Q) / 8),
        (corner, "hinge", 2 - 2 * variation(P, Q)),
        (unary, "rsgan", math.log(2) - js(PAIR, SWAP)),
        (binary, "rsgan", math.log(2) - js(PAIR, SWAP)),
        (binary, "rp-ls", 1 - triangular(PAIR, SWAP) / 2),
        (binary, "rp-hinge", 1 - variation(PAIR, SWAP)),
    ],
)
def test_the_best_critic_measures_the_divergence_of_the_entry(find, name, least):
    assert find(name)[1] == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("name", ["rp-ls", "rp-hinge"])
def test_a_critic_of_one_sample_measures_at_most_what_one_of_both_does(name):
    assert unary(name)[1] > binary(name)[1] - 1e-9


def test_the_best_rsgan_critic_is_the_log_ratio_up_to_a_constant():
    off = unary("rsgan")[0] - (P / Q).log()
    torch.testing.assert_close(off, off.mean().expand(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_best_f_gan_critic_measures_its_f_divergence(name):
    scores, least = unary(f"f-gan-{name}")
    divergence = (Q * F_DIVERGENCES[name].f(P / Q)).sum().item()
    assert -least == pytest.approx(divergence, abs=1e-6)
    if name != "tv":  # its best score is infinite
        ratio = (P / Q).requires_grad_()
        (slope,) = torch.autograd.grad(F_DIVERGENCES[name].f(ratio).sum(), ratio)
        torch.testing.assert_close(F_DIVERGENCES[name].activation(scores), slope, atol=1e-5, rtol=0)


def test_gan_qp_with_a_critic_of_both_samples_measures_the_weighted_triangular_discrimination():
    scores, least = binary("gan-qp", BETWEEN[REALS, FAKES])
    value = 10 / 4 * (BETWEEN * (PAIR - SWAP).square() / (PAIR + SWAP)).sum().item()
    assert -least == pytest.approx(value, abs=1e-6)
    delta = scores - scores.T
    assert (delta.abs() <= 10 * BETWEEN + 1e-6).all()  # as steep as the distances, of itself


def test_gan_qp_with_a_critic_of_one_sample_measures_the_poisson_energy_and_may_be_steeper():
    scores, least = unary("gan-qp", BETWEEN[REALS, FAKES])
    weights = ((PAIR + SWAP) / (10 * BETWEEN)).fill_diagonal_(0)
    laplacian = weights.sum(1).diag() - weights
    gap = P - Q
    assert -least == pytest.approx((gap @ torch.linalg.pinv(laplacian) @ gap).item() / 2, abs=1e-6)
    assert -least < -binary("gan-qp", BETWEEN[REALS, FAKES])[1]
    steepness = ((scores[:, None] - scores).abs() / (10 * BETWEEN)).nan_to_num(0)
    assert steepness.max() > 1  # the bound of the critic of both samples does not hold


@pytest.mark.parametrize("distance", [0.1, 1.0, 10.0, 100.0])
def test_a_far_fake_keeps_its_gradient_under_gan_qp_and_loses_it_in_the_zero_sum_logistic_games(distance):
    def pull(generator, slope):
        """Gradient at a fake, standing a distance from the real one, through the critic -slope x."""
        place = torch.tensor([distance], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(generator(0 * place.detach(), -slope * place), place)[0].item()

    here = torch.zeros(1).double()
    (steep,), _ = best(lambda w: critic("gan-qp", here, -w * distance, here + distance), 1)
    assert pull(GAN_LOSSES["gan-qp"].generator, steep) == pytest.approx(10)  # lambda, however far
    sure = 25 / distance  # the logistic critics have no best slope; this one is 1e-11 from their infimum
    assert abs(pull(GAN_LOSSES["saturating"].generator, sure)) < 1e-10 * sure
    assert abs(pull(lambda real, fake: -GAN_LOSSES["rsgan"].critic(real, fake), sure)) < 1e-10 * sure
    for swapped in ("ns", "rsgan"):  # what non-saturating generators are for
        assert pull(GAN_LOSSES[swapped].generator, sure) == pytest.approx(sure)


def test_every_entry_names_its_divergence_and_source():
    assert all(loss.divergence and loss.source for loss in GAN_LOSSES.values())
    assert all(h.divergence for h in MONOTONE.values())
    assert all(penalty.source for penalty in PENALTIES.values())


@pytest.mark.parametrize("power", [2, 4, 6])
def test_the_best_gan_qp_critic_of_one_pair_stands_lambda_times_the_distance_apart(power):
    for distance in (0.1, 1.0, 100.0):
        d, gap = torch.tensor([distance]), torch.tensor([10 * distance], requires_grad=True)
        value = GAN_LOSSES["gan-qp"].critic(gap, torch.zeros(1), d, power=power)
        (slope,) = torch.autograd.grad(value, gap)
        assert slope.abs() < 1e-6
        assert value.item() == pytest.approx(-10 * distance * (1 - 1 / power))


def test_gan_qp_wants_an_even_power():
    with pytest.raises(ValueError, match="an even power of 2 to 100, not 3"):
        GAN_LOSSES["gan-qp"].critic(REAL, FAKE, torch.ones(4), power=3)


WRONG_SHAPES = [((4, 1), (4,)), ((4,), (4, 1)), ((1,), (8,)), ((8,), (1,)), ((4, 1), (4, 1)), ((), ())]


@pytest.mark.parametrize("name", GAN_LOSSES)
@pytest.mark.parametrize(("of_real", "of_fake"), WRONG_SHAPES)
def test_scores_that_would_broadcast_are_refused_on_both_sides(name, of_real, of_fake):
    real, fake = torch.randn(of_real), torch.randn(of_fake)
    with pytest.raises(ValueError, match=r"must be \(b,\), one number for each image"):
        GAN_LOSSES[name].generator(real, fake)
    with pytest.raises(ValueError, match=r"must be \(b,\), one number for each image"):
        critic(name, real, fake, torch.ones(4))


@pytest.mark.parametrize("shape", [(8,), (4, 1), (1,)])
def test_distances_that_would_broadcast_are_refused(shape):
    with pytest.raises(ValueError, match=r"as many of each, not real \(4,\), fake \(4,\), distance"):
        GAN_LOSSES["gan-qp"].critic(REAL, FAKE, torch.ones(shape))
    with pytest.raises(ValueError, match=r"as many of each, not real \(4,\), fake \(4,\), distance"):
        GAN_LOSSES["gan-qp"].critic(REAL, FAKE, distance=torch.ones(shape))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("of_real", "of_fake"), [((4, 2), (1, 2)), ((4, 1, 3), (4, 2, 3)), ((4,), (4,))])
def test_distances_of_images_of_different_shapes_are_refused(name, of_real, of_fake):
    with pytest.raises(ValueError, match="a distance pairs images"):
        DISTANCES[name](torch.zeros(of_real), torch.zeros(of_fake))


@pytest.mark.parametrize("name", GAN_LOSSES)
@pytest.mark.parametrize("side", ["critic", "generator"])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "give a tensor"),
        (torch.zeros(2, dtype=torch.complex64), "real numbers"),
        (torch.zeros(0), "at least one"),
    ],
)
def test_scores_that_are_no_real_numbers_are_refused_on_both_sides(name, side, scores, message):
    loss = GAN_LOSSES[name]
    distance = [torch.ones(len(scores))] * (side == "critic" and loss.needs_distance)
    with pytest.raises(ValueError, match=message):
        getattr(loss, side)(scores, scores, *distance)


def test_a_distance_that_is_a_number_is_refused():
    with pytest.raises(ValueError, match="distance is a float"):
        GAN_LOSSES["gan-qp"].critic(torch.ones(2), torch.ones(2), 0.5)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, 0.0, -1.0])
def test_a_step_of_finite_differences_that_is_not_finite_and_positive_is_refused(sigma):
    images = torch.ones(2, 3)
    with pytest.raises(ValueError, match="finite differences: sigma must be a finite number > 0"):
        METHODS["fd"](lambda x: x.square().sum(1), images, sigma, None)


def test_distances_of_bytes_do_not_wrap_around():
    dark, light = torch.zeros(1, 4, dtype=torch.uint8), torch.full((1, 4), 255, dtype=torch.uint8)
    assert [measure(dark, light).item() for measure in DISTANCES.values()] == [255, 255]


@pytest.mark.parametrize("name", GAN_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_scores_are_computed_in_float32(name, dtype):
    real, fake = REAL.to(dtype), FAKE.to(dtype)
    for found, expected in (
        (critic(name, real, fake), critic(name, real.float(), fake.float())),
        (GAN_LOSSES[name].generator(real, fake), GAN_LOSSES[name].generator(real.float(), fake.float())),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_half_precision_scores_of_a_hundred_do_not_overflow():
    real, fake = torch.full((1024,), -100.0).half(), torch.full((1024,), 100.0).half()
    assert GAN_LOSSES["ralsgan"].critic(real, fake).item() == pytest.approx(201**2)
    assert PENALTIES["consistency"](real, fake).item() == pytest.approx(200**2 / 2)


@pytest.mark.parametrize("qp_lambda", [0.0, -1.0, math.nan, math.inf])
def test_a_lambda_of_gan_qp_that_is_not_positive_is_refused(qp_lambda):
    with pytest.raises(ValueError, match="gan-qp: qp_lambda must be a finite number > 0"):
        GAN_LOSSES["gan-qp"].critic(REAL, FAKE, torch.ones(4), qp_lambda)


def test_the_transport_cost_is_the_mean_square_of_what_the_generator_moves():
    noise, images = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2, requires_grad=True)
    cost = transport_cost(noise, images)
    assert cost.item() == pytest.approx(((images - noise) ** 2).mean().item())
    (gradient,) = torch.autograd.grad(cost, images)
    torch.testing.assert_close(gradient, 2 * (images - noise).detach() / noise.numel())
    with pytest.raises(ValueError, match="a distance pairs images"):
        transport_cost(noise[:1], images)


def test_coinciding_pairs_do_not_divide_by_zero():
    assert critic("gan-qp", REAL, FAKE, torch.zeros(4)).isfinite()


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 16, 4)])
def test_distances_are_means_over_the_entries_so_that_size_does_not_matter(shape):
    real, fake = torch.randn(shape), torch.randn(shape)
    flat = (real - fake).reshape(3, -1)
    torch.testing.assert_close(DISTANCES["l1"](real, fake), flat.abs().mean(1))
    torch.testing.assert_close(DISTANCES["l2"](real, fake), flat.square().mean(1).sqrt())
