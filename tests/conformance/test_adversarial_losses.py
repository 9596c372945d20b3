"""Losses and penalties as their articles and released code state them, with gradients, in float64.

RelativisticGAN (arXiv 1807.00734) states its losses by the cross-entropy of differences with labels, GAN-QP
(arXiv 1811.07296) by the distance of each pair; R3GAN (arXiv 2501.05441) sums squares over each image.
"""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from rope_mm.losses import DISTANCES, GAN_LOSSES, PENALTIES, gamma, input_gradients

ONES, ZEROS = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)


def relu(z):
    return z.clamp_min(0)


def relativistic_average(part):
    """Half of what a real and what a fake lose, each against the mean of the other side."""
    critic = lambda r, f: (part(r - f.mean(), True) + part(f - r.mean(), False)) / 2  # noqa: E731
    generator = lambda r, f: (part(r - f.mean(), False) + part(f - r.mean(), True)) / 2  # noqa: E731
    return critic, generator


# critic and generator of each, of scores of reals r and fakes f
PUBLISHED = {
    "ns": (lambda r, f: bce(r, ONES) + bce(f, ZEROS), lambda r, f: bce(f, ONES)),
    "rsgan": (lambda r, f: bce(r - f, ONES), lambda r, f: bce(f - r, ONES)),
    "rpgan": (lambda r, f: softplus(-(r - f)).mean(), lambda r, f: softplus(-(f - r)).mean()),
    "hinge": (lambda r, f: relu(1 - r).mean() + relu(1 + f).mean(), lambda r, f: -f.mean()),
    "wgan": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "rasgan": relativistic_average(lambda z, real: bce(z, ONES if real else ZEROS)),
    "ralsgan": relativistic_average(lambda z, real: ((z - (1 if real else -1)) ** 2).mean()),
    "rahinge": relativistic_average(lambda z, real: relu(1 - (z if real else -z)).mean()),
}


def scores(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: (3 * torch.randn(64, dtype=torch.float64, generator=generator)).requires_grad_()  # noqa: E731
    return draw(), draw()


def assert_agree(ours, theirs, inputs):
    """The same value, and the same gradient to every input."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(ours, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(
        theirs, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PUBLISHED)
def test_losses_are_those_of_their_articles(name, seed):
    critic, generator = PUBLISHED[name]
    pair = scores(seed)
    assert_agree(GAN_LOSSES[name].critic(*pair), critic(*pair), pair)
    assert_agree(GAN_LOSSES[name].generator(*pair), generator(*pair), pair)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("qp_lambda", [1.0, 10.0])
def test_gan_qp_is_that_of_its_article(norm, qp_lambda):
    real, fake = scores(0)
    images = torch.randn(2, 64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gap = images[0] - images[1]
    distance = gap.abs().mean((1, 2, 3)) if norm == "l1" else gap.square().mean((1, 2, 3)).sqrt()
    ours = GAN_LOSSES["gan-qp"].critic(real, fake, DISTANCES[norm](*images), qp_lambda)
    delta = real - fake
    assert_agree(ours, -(delta - delta**2 / (2 * qp_lambda * distance)).mean(), (real, fake))
    assert_agree(GAN_LOSSES["gan-qp"].generator(real, fake), (real - fake).mean(), (real, fake))


def convolutions():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(72, 1)
    net = torch.nn.Sequential(*layers).double()
    return net, lambda x: net(x).squeeze(1)


@pytest.mark.parametrize(("name", "side"), [("r1", 0), ("r2", 1)])
def test_zero_centred_penalties_are_those_of_r3gan_with_gradients_to_the_weights(name, side):
    net, critic = convolutions()
    pair = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64)
    images = pair[side].clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    weights = [weight for weight in net.parameters() if weight is not net[3].bias]  # no slope depends on it
    theirs = 10.0 / 2 * slope.square().sum((1, 2, 3)).mean()
    assert_agree(10.0 * PENALTIES[name].of(critic, *pair, method="autograd"), theirs, weights)
    again = pair[side].clone().requires_grad_()
    gradients = input_gradients(critic(again), again)
    assert_agree(10.0 * PENALTIES[name](gradients, gradients), theirs, weights)


def test_the_penalty_of_wgan_gp_is_that_of_its_article():
    net, critic = convolutions()
    real, fake = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64).unbind()
    share = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))[
        :, None, None, None
    ]
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    theirs = 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
    ours = PENALTIES["one-centred"].of(critic, real, fake, generator=torch.Generator().manual_seed(3))
    assert_agree(gamma(10, "whole") * ours, theirs, list(net.parameters())[:3])
