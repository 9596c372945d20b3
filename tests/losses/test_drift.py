"""Fields without a critic against closed forms of normal laws, gradients of divergences, and symmetries."""

import math
from itertools import product

import numpy
import pytest
import torch
from torch.distributions import MultivariateNormal

from rope_mm.losses import FIELDS, coupled_field, follow_field, kernel_field, sinkhorn_field
from rope_mm.theory.flow import velocity

POINTS = torch.linspace(-14, 14, 561, dtype=torch.float64)[
    :, None
]  # a sum over them is exact for smooth laws
EXACT = {"atol": 1e-12, "rtol": 1e-12}
ALL = [(name, 0.3) for name in FIELDS]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(mean, deviation):
    """Of POINTS, those of a normal law; the least one is not zero."""
    return (-(((POINTS[:, 0] - mean) / deviation) ** 2) / 2).exp().clamp_min(1e-300)


@pytest.mark.parametrize("width", [0.3, 1.0])
def test_the_gaussian_kernels_field_between_normal_laws_is_its_closed_form(width):
    """V = h² [(x - m_q) / (s_q² + h²) - (x - m_p) / (s_p² + h²)]."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    (m_p, s_p), (m_q, s_q) = (0.7, 1.1), (-0.4, 0.8)
    found = kernel_field(x, POINTS, POINTS, width, "gaussian", weights(m_p, s_p), weights(m_q, s_q))
    expected = width**2 * ((x - m_q) / (s_q**2 + width**2) - (x - m_p) / (s_p**2 + width**2))
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_gaussian_kernels_field_is_the_flow_of_kl_between_the_blurred_laws():
    width, x = 0.6, normal(20, 1)
    p, q = (0.7, 1.1), (-0.4, 0.8)
    found = kernel_field(x, POINTS, POINTS, width, "gaussian", weights(*p), weights(*q))

    def blurred(mean, deviation):
        return MultivariateNormal(
            torch.tensor([mean], dtype=torch.float64),
            torch.tensor([[deviation**2 + width**2]], dtype=torch.float64),
        )

    log_ratio = lambda x: blurred(*p).log_prob(x) - blurred(*q).log_prob(x)  # noqa: E731
    torch.testing.assert_close(found, width**2 * velocity(log_ratio, lambda d: d, x), **EXACT)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_sinkhorn_field_between_normal_laws_is_its_closed_form(epsilon):
    """V = (m_p - m_q) + (c(s_q, s_p) - c(s_q, s_q)) / s_q² (x - m_q), c the covariance of the plan."""
    (m_p, s_p), (m_q, s_q) = (0.7, 1.3), (-0.4, 0.8)

    def covariance(a, b):
        return (math.sqrt(epsilon**2 + 4 * a**2 * b**2) - epsilon) / 2

    law_q, law_p = weights(m_q, s_q), weights(m_p, s_p)
    found = sinkhorn_field(POINTS, POINTS, POINTS, epsilon, 100, law_q, law_p, law_q)
    slope = (covariance(s_q, s_p) - covariance(s_q, s_q)) / s_q**2
    expected = (m_p - m_q) + slope * (POINTS - m_q)
    middle = (POINTS[:, 0] - m_q).abs() < 3 * s_q
    assert middle.sum() > 50
    torch.testing.assert_close(found[middle], expected[middle], atol=2e-12, rtol=0)


def entropic_cost(x, y, epsilon, iterations):
    """The dual value of entropic transport of cost |x - y|² / 2 between equally likely points, converged."""
    cost = (x[:, None] - y).square().sum(2) / 2
    g = torch.zeros(len(y), dtype=x.dtype)
    f = torch.zeros(len(x), dtype=x.dtype)
    for _ in range(iterations):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon - math.log(len(y)), 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon - math.log(len(x)), 0)
    return f.mean() + g.mean()


def test_the_sinkhorn_field_is_the_gradient_of_the_sinkhorn_divergence():
    x, y = normal(7, 2).requires_grad_(), 0.5 + 1.5 * normal(9, 2, seed=1)
    epsilon, iterations = 0.5, 400
    divergence = entropic_cost(x, y, epsilon, iterations) - entropic_cost(x, x, epsilon, iterations) / 2
    (gradient,) = torch.autograd.grad(divergence, x)
    at = x.detach()
    found = sinkhorn_field(at, y, at, epsilon, iterations)
    assert gradient.abs().amax() > 0.01
    torch.testing.assert_close(found, -len(at) * gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["laplace", "gaussian"])
def test_one_real_place_pulls_from_anywhere_by_its_distance_to_the_place_of_the_others(kernel):
    x, a, b = normal(5, 3), normal(1, 3, seed=1), normal(1, 3, seed=2)
    found = kernel_field(x, a.expand(4, 3), b.expand(6, 3), 0.4, kernel)
    torch.testing.assert_close(found, (a - b).expand(5, 3), **EXACT)


@pytest.mark.parametrize(("name", "width"), ALL)
def test_real_and_other_samples_change_places_with_the_sign_so_the_mean_field_of_equal_laws_is_zero(
    name, width
):
    x, real, other = normal(8, 2), normal(6, 2, seed=1), normal(6, 2, seed=2)
    one, two = FIELDS[name](x, real, other, width), FIELDS[name](x, other, real, width)
    torch.testing.assert_close(one, -two, **EXACT)
    assert one.abs().max() > 0.01
    torch.testing.assert_close(FIELDS[name](x, real, real, width), torch.zeros_like(x), **EXACT)


def test_the_coupled_field_is_its_definition_written_with_loops():
    x, real, other = normal(3, 2), normal(2, 2, seed=1), normal(4, 2, seed=2)
    every = torch.cat([real, other])
    kernel = torch.stack([torch.stack([(-(one - y).norm() / 0.5).exp() for y in every]) for one in x])
    affinity = (kernel / kernel.sum(1, keepdim=True) * kernel / kernel.sum(0)).sqrt()
    expected = torch.zeros_like(x)
    for row, place in product(range(3), range(2)):
        for rival in range(4):
            weight = affinity[row, place] * affinity[row, 2 + rival]
            expected[row] += weight * (real[place] - other[rival])
    torch.testing.assert_close(coupled_field(x, real, other, 0.5), expected, **EXACT)


@pytest.mark.parametrize(("name", "width"), ALL)
def test_a_field_moves_with_the_data_when_they_are_shifted_and_rotated(name, width):
    x, real, other = normal(8, 2), normal(6, 2, seed=1), normal(5, 2, seed=2)
    turn = torch.linalg.qr(normal(2, 2, seed=3)).Q
    there = [samples @ turn + 3 for samples in (x, real, other)]
    torch.testing.assert_close(
        FIELDS[name](*there, width), FIELDS[name](x, real, other, width) @ turn, **EXACT
    )


@pytest.mark.parametrize(("name", "width"), [("drift", 0.05), ("wflow", 0.01)])
def test_a_collapsed_cloud_expands(name, width):
    """A floor under affinities, 1e-6 before the root, would leave the cosine near zero."""
    x, other = 0.01 * normal(256, 2), 0.01 * normal(256, 2, seed=1)
    field = FIELDS[name](x, 2 * normal(256, 2, seed=2), other, width)
    assert torch.nn.functional.cosine_similarity(field.flatten(), x.flatten(), dim=0) > 0.5


@pytest.mark.parametrize("same", [False, True])
def test_the_sinkhorn_field_of_equal_laws_is_zero_on_average_with_independent_others_and_shrinks_without(
    same,
):
    shrink = []
    for trial in range(300):
        x, real, other = normal(3, 16, 2, seed=trial)
        shrink.append((sinkhorn_field(x, real, x if same else other, 0.1) * x).sum(1).mean())
    mean, error = torch.stack(shrink).mean(), torch.stack(shrink).std() / math.sqrt(300)
    assert mean < -5 * error if same else mean.abs() < 3 * error


@pytest.mark.parametrize(
    ("name", "widths"), [("drift", [0.05, 0.2]), ("mean-shift", [0.3]), ("wflow", [0.05])]
)
def test_the_gradient_of_the_loss_is_twice_the_field_of_unit_size(name, widths):
    x, real, other = normal(8, 3).requires_grad_(), normal(6, 3, seed=1), normal(8, 3, seed=2)
    followed = follow_field(x, real, other, name, widths)
    (gradient,) = torch.autograd.grad(followed.loss, x)
    scale = torch.cdist(x.detach(), torch.cat([real, other])).mean()
    fields = [FIELDS[name](x.detach() / scale, real / scale, other / scale, width) for width in widths]
    sizes = [field.square().mean().sqrt() for field in fields]
    unit = sum(field / size for field, size in zip(fields, sizes, strict=True))
    torch.testing.assert_close(gradient, -2 * unit / len(x) / scale, **EXACT)
    torch.testing.assert_close(followed.size, torch.stack(sizes).mean(), **EXACT)


@pytest.mark.parametrize("name", FIELDS)
def test_a_generator_that_follows_a_field_learns_mean_and_deviation_of_a_normal_law(name):
    mean, scale = torch.full((2,), 2.0).requires_grad_(), torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, scale], 0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 150 else 0.01
        real, noise, more = normal(3, 64, 2, seed=step).float()
        x, other = (mean + scale * z for z in (noise, more))
        optimizer.zero_grad()
        follow_field(x, 0.5 + 0.3 * real, other.detach(), name, [0.2]).loss.backward()
        optimizer.step()
    torch.testing.assert_close(mean.detach(), torch.full((2,), 0.5), atol=0.1, rtol=0)
    assert scale.item() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("name", FIELDS)
def test_half_precision_and_autocast_are_computed_in_float32(name):
    x, real, other = (20 * normal(8, 4, seed=seed).half() for seed in range(3))
    exact = FIELDS[name](x.float(), real.float(), other.float(), 5.0)
    torch.testing.assert_close(FIELDS[name](x, real, other, 5.0), exact, atol=0, rtol=0)
    plain = follow_field(x.float(), real, other, name, [0.3])
    with torch.autocast("cpu", torch.bfloat16):
        found = follow_field(x.float(), real, other, name, [0.3])
    assert found.size == plain.size


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2), (4, 2), (4, 2)), "2 or more of each kind, not 1 of x"),
        (((4, 2), (1, 2), (0, 2)), "not 1 of real, 0 of other"),
        (((4, 2), (4, 3), (4, 2)), r"real \(4, 3\)"),
        (((4, 1, 2), (4, 2), (4, 2)), "flatten images"),
    ],
)
@pytest.mark.parametrize("name", FIELDS)
def test_groups_that_make_no_field_are_refused(name, shapes, message):
    with pytest.raises(ValueError, match=message):
        FIELDS[name](*map(torch.zeros, shapes), 0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": []}, "at least one number"),
        ({"widths": [0.0]}, "widths must be a list of numbers, each a finite number > 0"),
        ({"widths": 0.05}, "widths must be a list of numbers, .* not 0.05"),
        ({"widths": "0.1"}, "widths must be a list of numbers"),
        ({"field": "wflows"}, "did you mean 'wflow'"),
        ({"field": "wflow", "iterations": 0}, "iterations must be"),
        ({"field": "wflow", "real_weight": torch.tensor([1.0, 0, 1])}, "weights must be positive"),
    ],
)
def test_settings_that_make_no_loss_are_refused(wrong, message):
    settings = {"field": "drift", "widths": [0.1]} | wrong
    with pytest.raises(ValueError, match=message):
        follow_field(*normal(3, 3, 2), **settings)


@pytest.mark.parametrize("x", [[[0.0, 1.0]] * 3, numpy.zeros((3, 2)), None])
def test_samples_that_are_no_tensor_are_refused(x):
    with pytest.raises(ValueError, match=r"x is a (list|ndarray|NoneType); give a tensor"):
        follow_field(x, *normal(2, 3, 2), "drift", [0.1])


def test_a_field_that_underflows_or_is_no_number_is_refused_and_not_taken_for_rest():
    x, real, other = normal(4, 2).float(), 9 + normal(4, 2, seed=1).float(), normal(4, 2, seed=2).float()
    with pytest.raises(
        ValueError, match=r"the drift field is zero or no number at widths \[0.001\]; give wider"
    ):
        follow_field(x, real, other, "drift", [0.1, 0.001])
    real[0] = math.nan
    with pytest.raises(ValueError, match="samples that are finite"):
        follow_field(x, real, other, "drift", [0.1])
