"""Metrics beside prdc and torchmetrics, where these packages are at hand."""

import pytest
import torch

from rope_mm.evaluation.metrics import frechet, kid, prdc

# deprecations inside the peers are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")


def features(samples, width, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mix + shift


@pytest.mark.parametrize(("samples", "width", "k"), [((300, 200), 16, 5), ((150, 400), 3, 1)])
def test_precision_recall_density_and_coverage_are_those_of_prdc(samples, width, k):
    peer = pytest.importorskip("prdc", reason="wants the package prdc, which is not installed")
    real, fake = features(samples[0], width, 0), features(samples[1], width, 1, 0.2)
    expected = peer.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    assert prdc(real, fake, k) == pytest.approx(expected, abs=1e-12)


class Flat(torch.nn.Module):
    """Features of an image: its numbers."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).double()


def images_of(x):
    return x.view(len(x), 3, 2, 2)


def test_the_frechet_distance_is_that_of_torchmetrics():
    peer = pytest.importorskip(
        "torchmetrics.image.fid", reason="wants the package torchmetrics, which is not installed"
    )
    real, fake = features(400, 12, 0), features(300, 12, 1, 0.3)
    metric = peer.FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(images_of(real), real=True)
    metric.update(images_of(fake), real=False)
    assert frechet(real, fake) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_the_kernel_distance_is_that_of_torchmetrics():
    peer = pytest.importorskip(
        "torchmetrics.image.kid", reason="wants the package torchmetrics, which is not installed"
    )
    real, fake = features(60, 12, 0), features(60, 12, 1, 0.3)
    expected = peer.poly_mmd(real, fake, 3, None, 1.0)
    assert kid(real, fake) == pytest.approx(expected.item(), rel=1e-9)
