import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.losses import energy_distance, energy_score

ROWS = 200_000


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def mean_distance(gap, variance):
    """E|N(gap, variance)|, the mean of a folded normal."""
    scale = math.sqrt(2 * variance)
    return scale / math.sqrt(math.pi) * math.exp(-((gap / scale) ** 2)) + gap * math.erf(gap / scale)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("repulsion", [0.0, 0.99, 1.0])
def test_of_two_samples_it_is_the_formula_of_its_paper(exponent, repulsion):
    first, second, target = normal(3, 5, 4)
    expected = [
        math.dist(a, y) ** exponent + math.dist(b, y) ** exponent - repulsion * math.dist(a, b) ** exponent
        for a, b, y in zip(first.tolist(), second.tolist(), target.tolist(), strict=True)
    ]
    found = energy_score(torch.stack([first, second]), target, exponent, repulsion)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("samples", [2, 3])
def test_its_mean_for_two_normal_laws_is_the_closed_form_for_any_number_of_samples(samples):
    law, truth = 0.5 + 2 * normal(samples, ROWS, 1), -1 + normal(ROWS, 1, seed=1)
    expected = 2 * mean_distance(1.5, 4 + 1) - mean_distance(0.0, 4 + 4)
    assert energy_score(law, truth).mean().item() == pytest.approx(expected, abs=0.02)


def test_on_a_line_it_is_cramers_distance_of_the_distribution_functions_and_what_the_target_alone_has():
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| = 2 ∫ (F - G)², of laws on six and on four points."""
    x, y = normal(6).sort().values, 2 * normal(4, seed=1).sort().values
    pairs = torch.cartesian_prod(x, x, y)  # all samples, equally likely: the mean over rows is exact
    score = energy_score(pairs[:, :2].T[:, :, None], pairs[:, 2:]).mean()
    own = (y[:, None] - y).abs().mean()
    edges = torch.cat([x, y]).sort().values
    f, g = ((points <= edges[:-1, None]).double().mean(1) for points in (x, y))
    torch.testing.assert_close(score - own, 2 * ((f - g).square() * edges.diff()).sum())


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_it_is_unbiased_for_any_number_of_samples(samples):
    """The mean over all ways to take independent samples of a law on three points is the same, exactly."""
    points = normal(3, 2)
    ways = torch.cartesian_prod(*[torch.arange(3)] * samples)
    found = energy_score(points[ways.T], torch.full((len(ways), 2), 0.5, dtype=torch.float64)).mean()
    distances = torch.cdist(points, points)
    to_target = (points - 0.5).square().sum(1).sqrt().mean()
    torch.testing.assert_close(found, 2 * to_target - distances.mean())


@pytest.mark.parametrize("repulsion", [1.0, 0.8])
def test_the_best_deviation_of_a_normal_law_is_the_closed_form_of_the_repulsion(repulsion):
    noise, truth = normal(2, ROWS, 1), normal(ROWS, 1, seed=1)
    deviation = torch.tensor(repulsion / math.sqrt(2 - repulsion**2), dtype=torch.float64, requires_grad=True)
    loss = energy_score(deviation * noise, truth, repulsion=repulsion).mean()
    (slope,) = torch.autograd.grad(loss, deviation)
    assert abs(slope.item()) < 0.01
    for other, sign in ((0.7, -1), (1.4, 1)):
        moved = (other * deviation.detach()).requires_grad_()
        loss = energy_score(moved * noise, truth, repulsion=repulsion).mean()
        assert sign * torch.autograd.grad(loss, moved)[0].item() > 0.05


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_samples_that_coincide_have_a_finite_gradient(exponent):
    samples = torch.zeros(2, 3, 4, requires_grad=True)
    energy_score(samples, torch.zeros(3, 4), exponent).sum().backward()
    assert samples.grad is not None and samples.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    samples, target = torch.full((2, 1, 512), 100.0).half(), torch.full((1, 512), -100.0).half()
    assert energy_score(samples, target).item() == pytest.approx(2 * 200 * math.sqrt(512), rel=1e-6)


@pytest.mark.parametrize(("samples", "target"), [((1, 3, 4), (3, 4)), ((2, 3, 4), (1, 4)), ((2, 3), (3,))])
def test_shapes_that_do_not_fit_are_refused(samples, target):
    with pytest.raises(ValueError, match="the energy score takes 2 samples or more"):
        energy_score(torch.zeros(samples), torch.zeros(target))


@pytest.mark.parametrize("wrong", [{"exponent": 2.0}, {"exponent": 0.0}, {"repulsion": 1.1}])
def test_an_exponent_or_repulsion_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"(exponent|repulsion) must be a finite number >"):
        energy_score(torch.zeros(2, 3, 4), torch.zeros(3, 4), **wrong)


@given(st.integers(0, 10**6))
def test_the_energy_distance_on_a_line_is_twice_the_area_between_squared_distribution_functions(seed):
    """2 ∫ (F - G)² of two laws of finitely many points, without the bias of a sample."""
    random = torch.Generator().manual_seed(seed)
    x, real = (torch.randn(40, 1, generator=random, dtype=torch.float64) for _ in range(2))
    grid = torch.cat([x, real]).flatten().sort().values
    below = [(part.flatten()[None] <= grid[:-1, None]).double().mean(1) for part in (x, real)]
    area = 2 * ((below[0] - below[1]).square() * grid.diff()).sum()
    n = len(real)
    bias = torch.cdist(real, real).mean() / (n - 1)  # of all pairs, each with itself among them
    torch.testing.assert_close(energy_distance(x, x, real), area - bias)


def test_the_energy_distance_is_near_zero_for_one_law_and_refuses_shapes_that_do_not_fit():
    random = torch.Generator().manual_seed(0)
    x, other, real = torch.randn(3, 2000, 8, generator=random)
    assert abs(energy_distance(x, other, real)) < 0.05 < energy_distance(x + 0.5, other + 0.5, real)
    for wrong in ((x, other[:, :4], real), (x, other, real[:1]), (x[0], other, real)):
        with pytest.raises(ValueError, match="the energy distance takes samples"):
            energy_distance(*wrong)


def test_the_energy_distance_is_exact_for_samples_close_together_and_far_from_the_origin():
    random = torch.Generator().manual_seed(0)
    parts = 100 + 1e-2 * torch.randn(3, 40, 8, generator=random)
    parts[2] += 1e-2
    torch.testing.assert_close(
        energy_distance(*parts).double(), energy_distance(*parts.double()), rtol=1e-4, atol=0
    )
