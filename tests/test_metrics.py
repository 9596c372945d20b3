import numpy
import pytest
import scipy.linalg
import torch

from rope_mm.data import load_images
from rope_mm.metrics import coverage, frechet, prepare_exam, train_judge


def test_the_frechet_distance_is_that_of_the_two_gaussians():
    a = torch.randn(500, 6, dtype=torch.float64)
    b = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    cov_a, cov_b = numpy.cov(a.T), numpy.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + numpy.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_moving_a_cloud_costs_the_square_of_the_way():
    a = torch.randn(300, 3)
    assert frechet(a, a + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25, rel=1e-4)


def test_coverage_is_full_for_the_same_law_and_half_where_half_is_missing():
    # the same law covers 1 - 2**-k of the reals (arXiv 2002.09797, appendix)
    near, far = torch.randn(1000, 8), torch.randn(1000, 8) + 100
    assert coverage(torch.randn(1000, 8), near) == pytest.approx(1 - 2**-5, abs=0.03)
    assert coverage(torch.cat([near[:500], far[:500]]), torch.randn(1000, 8)) == pytest.approx(0.5, abs=0.03)
    assert coverage(far, near) == 0


def test_an_exam_tells_good_pictures_from_mixed_up_and_from_collapsed_ones():
    train, test = load_images("digits", label="label")
    exam = prepare_exam((train.images(), train.labels), (test.images(), test.labels), 360, seed=0)
    assert exam.floor["recognised"] > 0.95
    good, shifted = exam.mark(test.images()), exam.mark(test.images().roll(1, 0))
    assert good["recognised"] == exam.floor["recognised"]
    assert good["frechet"] == pytest.approx(0, abs=1e-6)
    assert shifted["recognised"] < 0.2
    assert shifted["frechet"] == pytest.approx(0, abs=1e-6)
    collapsed = exam.mark(test.images()[:1].expand(360, -1, -1, -1))
    assert collapsed["worst"] == 0
    assert collapsed["coverage"] < 0.2
    assert collapsed["frechet"] > 20 * exam.floor["frechet"]


def test_training_a_judge_leaves_the_global_random_state_alone():
    images, labels = torch.randn(40, 1, 4, 4), torch.arange(40) % 4
    before = torch.get_rng_state()
    one, two = (train_judge(images, labels, seed=1, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
