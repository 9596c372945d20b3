import math
import subprocess
import sys
from itertools import product

import numpy
import pytest
import scipy.linalg
import torch

from rope_mm.evaluation.metrics import (
    conditional_accuracy,
    frechet,
    gaussian_modes,
    kid,
    mode_statistics,
    prdc,
    sliced_wasserstein,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_the_frechet_distance_is_that_of_the_two_gaussians():
    a = torch.randn(500, 6, dtype=torch.float64)
    b = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    cov_a, cov_b = numpy.cov(a.T), numpy.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + numpy.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("metric", [frechet, kid, prdc, sliced_wasserstein])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(9, 3, dtype=torch.complex64), "a is torch.complex64|real is torch.complex64"),
        (torch.randn(9, 3, dtype=torch.float64) * 1e200, "powers of it overflow"),
    ],
)
def test_features_that_are_complex_or_too_large_for_powers_are_refused(metric, wrong, message):
    with pytest.raises(ValueError, match=message):
        metric(wrong, wrong)


@pytest.mark.parametrize("metric", [frechet, kid, prdc, sliced_wasserstein])
def test_the_largest_features_that_are_taken_have_finite_metrics(metric):
    largest = torch.full((200, 8), torch.finfo(torch.float32).max) * torch.randn(200, 1).sign()
    found = metric(largest, -largest)
    assert all(math.isfinite(value) for value in (found.values() if metric is prdc else [found]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mode_statistics(numpy.zeros(3, int), torch.ones(2)), "labels is a ndarray; give a tensor"),
        (
            lambda: mode_statistics(torch.zeros(3).long(), numpy.ones(2)),
            "weights is a ndarray; give a tensor",
        ),
        (lambda: conditional_accuracy(numpy.ones(3), torch.ones(3)), "found is a ndarray; give a tensor"),
        (lambda: conditional_accuracy(*[torch.full((3,), math.nan)] * 2), "labels must be finite"),
        (lambda: prdc(torch.randn(9, 3), torch.randn(9, 3), 2.5), "k must be a whole number >= 0, not 2.5"),
        (lambda: prdc(torch.randn(9, 3), torch.randn(9, 3), "2"), "k must be a whole number >= 0, not '2'"),
        (lambda: gaussian_modes(torch.randn(9, 2), torch.eye(2), "1"), "sigma must be a finite number > 0"),
        (lambda: sliced_wasserstein(torch.eye(3), torch.eye(3), 0), "directions must be a whole number >= 1"),
    ],
)
def test_labels_and_numbers_that_are_none_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("metric", [frechet, kid, prdc])
def test_features_that_are_no_tensors_are_refused(metric):
    features = torch.randn(9, 3)
    with pytest.raises(ValueError, match="is a ndarray; give a tensor"):
        metric(features, features.numpy())


def test_the_frechet_distance_of_a_shifted_cloud_is_the_squared_shift():
    a = torch.randn(300, 3)
    assert frechet(a, a + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25, rel=1e-4)


def brute_kid(a, b):
    def kernel(x, y):
        return (sum(i * j for i, j in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(x):
        return sum(kernel(x[i], x[j]) for i, j in product(range(len(x)), repeat=2) if i != j) / (
            len(x) * (len(x) - 1)
        )

    across = sum(kernel(x, y) for x, y in product(a, b)) / (len(a) * len(b))
    return within(a) + within(b) - 2 * across


def test_the_kernel_distance_is_the_sum_over_pairs_that_it_is(monkeypatch):
    monkeypatch.setattr("rope_mm.evaluation.metrics.ROWS", 4)
    a, b = torch.randn(9, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64) * 2
    assert kid(a, b) == pytest.approx(brute_kid(a.tolist(), b.tolist()), rel=1e-12)


def test_the_kernel_distance_is_unbiased():
    """On the line it compares three moments: (m3 - n3)² + 3 (m2 - n2)² + 3 (m1 - n1)² on average."""
    values, small = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([0.0, 1.0]).double()
    # every sample of two of `values`, and of two of `small`, is equally likely
    draws = [kid(values[list(x)][:, None], small[list(y)][:, None])
             for x in product(range(3), repeat=2) for y in product(range(2), repeat=2)]  # fmt: skip
    gaps = [(values**k).mean() - (small**k).mean() for k in (1, 2, 3)]
    expected = sum(weight * gap**2 for weight, gap in zip((3, 3, 1), gaps, strict=True)).item()
    assert sum(draws) / len(draws) == pytest.approx(expected, rel=1e-12)


def test_the_sliced_distance_of_moved_and_of_widened_clouds_is_known():
    a = torch.randn(2000, 4, dtype=torch.float64)
    move = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert sliced_wasserstein(a[:20], a[:20] + move, 2**14) == pytest.approx(25 / 4, rel=0.05)
    widened = 3 * a[torch.randperm(len(a))]  # |x|² (3 - 1)² / f, whatever the order of the samples
    assert sliced_wasserstein(a, widened) == pytest.approx(4, rel=0.05)
    assert sliced_wasserstein(a[:, :1], a[:, :1] + 2) == pytest.approx(4)  # one direction: W2 itself


def test_the_sliced_distance_is_seeded_and_wants_as_many_samples():
    a, b = torch.randn(50, 3), torch.rand(50, 3)
    one, two = (sliced_wasserstein(a, b, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two
    with pytest.raises(ValueError, match="as many, not 50 and 49"):
        sliced_wasserstein(a, b[1:])


def brute_prdc(real, fake, k):
    def ball(points):
        return [sorted(math.dist(x, y) for y in points)[k] for x in points]

    of_real, of_fake = ball(real), ball(fake)
    inside = [[math.dist(x, y) < r for y in fake] for x, r in zip(real, of_real, strict=True)]
    reached = [[math.dist(x, y) < r for y, r in zip(fake, of_fake, strict=True)] for x in real]
    return {
        "precision": sum(map(any, zip(*inside, strict=True))) / len(fake),
        "recall": sum(map(any, reached)) / len(real),
        "density": sum(map(sum, inside)) / (k * len(fake)),
        "coverage": sum(map(any, inside)) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_and_coverage_count_balls(k, monkeypatch):
    monkeypatch.setattr("rope_mm.evaluation.metrics.ROWS", 16)
    real, fake = torch.randn(60, 3, dtype=torch.float64), torch.rand(45, 3, dtype=torch.float64)
    assert prdc(real, fake, k) == pytest.approx(brute_prdc(real.tolist(), fake.tolist(), k), abs=1e-12)


def test_fakes_of_the_real_distribution_have_the_expected_density_and_coverage():
    n, m, k = 60, 40, 3
    found = [prdc(torch.randn(n, 4), torch.randn(m, 4), k) for _ in range(200)]
    mean = {name: sum(marks[name] for marks in found) / len(found) for name in found[0]}
    coverage = 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    assert mean["density"] == pytest.approx(1, abs=0.04)
    assert mean["coverage"] == pytest.approx(coverage, abs=0.02)


def test_a_collapsed_generator_has_high_precision_and_low_recall_and_a_wide_one_the_reverse():
    real = torch.randn(500, 8)
    collapsed = prdc(real, 0.3 * torch.randn(500, 8))
    assert collapsed["precision"] > 0.99
    assert collapsed["recall"] < 0.05
    assert collapsed["density"] > 2
    wide = prdc(real, 3 * torch.randn(500, 8))
    assert wide["precision"] < 0.1
    assert wide["recall"] > 0.95


def test_coverage_is_half_where_half_is_missing():
    near, far = torch.randn(500, 8), torch.randn(500, 8) + 100
    assert prdc(torch.cat([near, far]), torch.randn(1000, 8))["coverage"] == pytest.approx(0.5, abs=0.02)
    assert prdc(far, near)["coverage"] == 0


CASES = [
    (torch.tensor([[1.0, math.nan], [0.0, 1.0], [2.0, 2.0]]), "1 of 3 samples with nan or infinite features"),
    (torch.tensor([[1.0, math.inf], [0.0, 1.0], [2.0, 2.0]]), "1 of 3 samples with nan or infinite features"),
    (torch.randn(1, 2), r"at least 2 samples, not \(1, 2\)"),
    (torch.randn(0, 2), r"at least 2 samples, not \(0, 2\)"),
    (torch.randn(9), r"at least 2 samples, not \(9,\); one feature is \(n, 1\)"),
    (torch.randn(9, 2, 1), r"at least 2 samples, not \(9, 2, 1\)"),
    (torch.randn(9, 0), r"at least 2 samples, not \(9, 0\)"),
    (torch.randn(9, 3), "features must be equally wide"),
]


@pytest.mark.parametrize("metric", [frechet, kid, sliced_wasserstein, prdc], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("wrong", "message"), CASES)
def test_features_that_give_no_metric_are_refused_on_both_sides(metric, wrong, message):
    right = torch.randn(9, 2)
    for pair in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match=message):
            metric(*pair)


@pytest.mark.parametrize("wrong", [CASES[0][0], CASES[1][0], torch.randn(0, 2), torch.randn(9)])
def test_samples_that_show_no_modes_are_refused(wrong):
    with pytest.raises(ValueError, match="samples"):
        gaussian_modes(wrong, torch.zeros(3, 2), 0.1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_deviation_of_modes_that_is_not_positive_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be a finite number > 0 and <= "):
        gaussian_modes(torch.randn(9, 2), torch.zeros(3, 2), sigma)


def test_one_feature_is_enough():
    a, b = torch.randn(300, 1).double(), 2 * torch.randn(200, 1).double() + 1
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet(a, b) == pytest.approx(expected.item())
    assert kid(a[:9], b[:7]) == pytest.approx(brute_kid(a[:9].tolist(), b[:7].tolist()))
    assert prdc(a[:20], b[:20], 3) == pytest.approx(brute_prdc(a[:20].tolist(), b[:20].tolist(), 3))


def test_copies_of_a_sample_are_at_distance_zero_from_one_another():
    point = torch.randn(1, 64) + 1000
    collapsed = prdc(point + torch.randn(50, 64), point.expand(50, -1))
    assert collapsed["recall"] == 0  # balls of radius 0
    same = prdc(point.expand(50, -1), point.expand(50, -1))
    assert same == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_ten_thousand_samples_take_little_memory():
    script = """
import resource, torch
from rope_mm.evaluation.metrics import kid, prdc
a, b = torch.randn(2, 10_000, 64).unbind()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kid(a, b), prdc(a, b)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200  # MiB; one matrix of distances has 763


@pytest.mark.parametrize(
    ("found", "asked"), [((1,), (4,)), ((4,), (4, 1)), ((4, 3), (4,)), ((0,), (0,)), ((), ())]
)
def test_answers_that_are_not_one_for_each_caption_are_refused(found, asked):
    with pytest.raises(ValueError, match="accuracy compares labels"):
        conditional_accuracy(torch.zeros(found).long(), torch.zeros(asked).long())


def test_weights_and_labels_of_modes_are_numbers_of_the_right_kind():
    with pytest.raises(ValueError, match="every mode needs a positive weight"):
        mode_statistics(torch.tensor([0]), torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"labels must be whole numbers \(n,\)"):
        mode_statistics(torch.tensor([0.0]), torch.ones(2))


def test_neighbours_need_samples():
    with pytest.raises(
        ValueError, match=r"5 neighbours need .* more than 5 samples, not 9 reals and 4 fakes"
    ):
        prdc(torch.randn(9, 2), torch.randn(4, 2))


def test_mode_statistics_are_shares_and_their_divergence_from_the_weights():
    labels = torch.tensor([0] * 70 + [1] * 29 + [3])
    found = mode_statistics(labels, torch.tensor([5, 3, 1, 1]))
    assert found["modes"] == 3
    assert found["modes_covered"] == 3  # 1 % of the samples is exactly a tenth of the last weight
    assert found["min_mode_share"] == 0
    kl = 0.7 * math.log(0.7 / 0.5) + 0.29 * math.log(0.29 / 0.3) + 0.01 * math.log(0.01 / 0.1)
    assert found["kl"] == pytest.approx(kl)
    assert found["kl_floor"] == 3 / 200
    assert mode_statistics(labels[labels < 3], torch.ones(3))["min_mode_share"] == 0


def test_true_samples_have_the_sampling_floor_of_divergence_on_average():
    weights, n = torch.rand(20) + 0.5, 2000
    draws = [mode_statistics(weights.multinomial(n, replacement=True), weights) for _ in range(300)]
    assert sum(d["kl"] for d in draws) / 300 == pytest.approx(draws[0]["kl_floor"], rel=0.1)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], []])
def test_a_label_that_is_no_mode_is_refused(labels):
    with pytest.raises(ValueError, match="positive weight, and 1 have none"):
        mode_statistics(torch.tensor([0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"labels must be some of 0\.\.3"):
        mode_statistics(torch.tensor(labels, dtype=torch.long), torch.ones(4))


@pytest.mark.parametrize("f", [1, 2, 3])
def test_true_samples_of_gaussians_have_the_spread_of_the_truth(f):
    centres = 10 * torch.randn(6, f)
    samples = centres[torch.randint(6, (30_000,))] + 0.2 * torch.randn(30_000, f)
    found = gaussian_modes(samples, centres, 0.2)
    quality = {1: 0.9973, 2: 1 - math.exp(-4.5), 3: 0.9707}[f]
    assert found["quality"] == pytest.approx(quality, abs=0.003)
    assert found["spread"] == pytest.approx(1, abs=0.01)
    assert (found["modes"], found["modes_covered"]) == (6, 6)
    half = gaussian_modes(centres.repeat(500, 1) + 0.1 * torch.randn(3000, f), centres, 0.2)
    assert half["spread"] < 0.56  # half the truth, but for what the truth loses beyond 3 sigma
    assert half["quality"] == pytest.approx(1, abs=1e-3)


def test_a_mode_is_found_by_a_sample_of_high_quality_and_covered_by_a_share():
    centres = torch.tensor([[0.0], [10.0], [20.0]])
    samples = torch.tensor([[0.0]] * 30 + [[0.1]] * 30 + [[10.2]] + [[23.0]] * 39)  # the last: far from 20
    found = gaussian_modes(samples, centres, 0.1)
    assert (found["modes"], found["modes_covered"], found["quality"]) == (2, 1, pytest.approx(0.61))
    assert found["kl"] == pytest.approx(sum(p * math.log(3 * p) for p in (0.6, 0.01, 0.39)))
    assert math.isnan(gaussian_modes(samples[-39:], centres, 0.1)["spread"])


def test_accuracy_asks_for_every_attribute_and_names_the_worst_caption():
    asked, found = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 0])
    assert conditional_accuracy(found, asked) == {
        "accuracy": pytest.approx(4 / 6),
        "worst_class_accuracy": 0.5,
    }
    asked = torch.tensor([[1, 2, 3], [1, 2, 3], [3, 2, 1]])
    found = torch.tensor([[1, 2, 3], [1, 2, 0], [3, 2, 1]])
    assert conditional_accuracy(found, asked) == {
        "accuracy": pytest.approx(2 / 3),
        "worst_class_accuracy": 0.5,
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda: frechet(torch.ones(4, 2, device="meta"), torch.ones(4, 2, device="meta")),
        lambda: mode_statistics(torch.arange(3, device="meta"), torch.ones(3, device="meta")),
        lambda: conditional_accuracy(torch.arange(3, device="meta"), torch.arange(3, device="meta")),
    ],
)
def test_tensors_without_numbers_are_refused(call):
    with pytest.raises(ValueError, match="is on the meta device, without numbers; give it on a CPU or a GPU"):
        call()


def test_metrics_refuse_seeds_truth_values_and_numbers_whose_squares_overflow():
    x = torch.randn(20, 2)
    for call, message in (
        (lambda: sliced_wasserstein(x, x, generator=0), "generator is 0; give a torch.Generator"),
        (
            lambda: sliced_wasserstein(x, x, directions=2**40),
            "directions must be a whole number >= 1 and <= ",
        ),
        (lambda: mode_statistics(torch.ones(9) > 0, torch.ones(2)), "labels must be whole numbers"),
        (lambda: gaussian_modes(x, x[:2], 1e308), "sigma must be a finite number > 0 and <= "),
        (lambda: frechet(x.to_sparse(), x), "a is a nested or sparse tensor"),
        (lambda: kid(x, x.to("meta")), "give all tensors on one device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
