"""What a loss or a penalty would make a wrong number of, or an error of torch, is refused in a sentence."""

import math

import numpy
import pytest
import torch

from rope_mm.losses import (
    DISTANCES,
    FIELDS,
    GAN_LOSSES,
    METHODS,
    PENALTIES,
    energy_score,
    follow_field,
    gamma,
    input_gradients,
    transport_cost,
)
from rope_mm.losses.penalties import GradientPenalty

IMAGES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0])
OF_GRADIENTS = [name for name, penalty in PENALTIES.items() if isinstance(penalty, GradientPenalty)]


class MeanCritic(torch.nn.Module):
    """One score for all images."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Identity(), lambda x: x.square().mean()

    def forward(self, images):
        return self.head(images)


def sums(images):
    return images.square().sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_a_critic_that_gives_one_score_for_all_images_is_refused(name, method):
    method = "autograd" if PENALTIES[name].value is not None and method in ("fd", "jvp") else method
    with pytest.raises(ValueError, match=r"must be \(b,\), one number for each image"):
        PENALTIES[name].of(MeanCritic(), IMAGES, IMAGES, method=method)


@pytest.mark.parametrize("method", ["auto", "autograd", "fd", "jvp"])
def test_a_critic_that_gives_more_scores_than_images_is_refused(method):
    with pytest.raises(ValueError, match="one score for each image, not 8 for 4"):
        PENALTIES["r1"].of(lambda x: sums(x).repeat(2), IMAGES, IMAGES, method=method)


@pytest.mark.parametrize("name", OF_GRADIENTS)
@pytest.mark.parametrize(("reals", "fakes"), [(4, 1), (1, 4), (0, 0)])
def test_images_that_make_no_pairs_are_refused(name, reals, fakes):
    with pytest.raises(ValueError, match="as many fakes of the same shape, b at least 1, not"):
        PENALTIES[name].of(sums, IMAGES[:reals], IMAGES[:fakes])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("consistency", (SCORES, SCORES[0]), r"must be \(b,\), one number for each image"),
        ("centring", (SCORES, SCORES[0]), r"must be \(b,\), one number for each image"),
        ("consistency", (SCORES, 1.0), "argument 2 is a float; give a tensor"),
        ("centring", (SCORES,), r"takes \(real, fake\), not 1 arguments"),
        ("lecam", (SCORES, SCORES[0], 0.0, 0.0), r"must be \(b,\), one number for each image"),
        ("lecam", (SCORES, SCORES, math.nan, 0.0), "real_anchor must be a finite number, not nan"),
        ("lecam", (SCORES, SCORES, 0.0, torch.tensor(math.inf)), "fake_anchor must be a finite number"),
        ("lecam", (SCORES, SCORES, SCORES, 0.0), "real_anchor must be one mean score"),
    ],
)
def test_scores_and_means_that_would_broadcast_or_are_no_numbers_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        PENALTIES[name](*given)


@pytest.mark.parametrize("distance", [*DISTANCES.values(), transport_cost])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(4, 0, 5, 5), "not empty"),
        (torch.ones(0, 3, 5, 5), "not empty"),
        (torch.ones(4, 3, dtype=torch.complex64), "give a tensor of real numbers"),
        (numpy.ones((4, 3)), "is a ndarray; give a tensor"),
    ],
)
def test_distances_of_empty_or_complex_images_and_of_arrays_are_refused(distance, images, message):
    with pytest.raises(ValueError, match=message):
        distance(images, images)


ARRAY = numpy.ones((4, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: energy_score(numpy.ones((2, 4, 3)), IMAGES),
        lambda: energy_score(torch.ones(2, 4, 3), ARRAY),
        lambda: PENALTIES["r1"].of(sums, ARRAY, ARRAY),
        lambda: PENALTIES["r1"].of(lambda x: sums(x).detach().numpy(), IMAGES, IMAGES),
        lambda: PENALTIES["lecam"](ARRAY[:, 0], ARRAY[:, 0], 0.0, 0.0),
    ],
)
def test_arrays_where_tensors_are_meant_are_refused(call):
    with pytest.raises(ValueError, match="is a ndarray; give a tensor"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GAN_LOSSES["gan-qp"].critic(SCORES, SCORES, SCORES, "1"),
            "qp_lambda must be a finite number",
        ),
        (lambda: PENALTIES["r1"].of(sums, IMAGES, IMAGES, method="fd", sigma="1"), "sigma must be a finite"),
        (lambda: METHODS["fd"](sums, IMAGES, "1", None), "sigma must be a finite number > 0, not '1'"),
        (lambda: energy_score(torch.ones(2, 4, 3), IMAGES, "1"), "exponent must be a finite number"),
        (lambda: energy_score(torch.ones(2, 4, 3), IMAGES, 1.0, "1"), "repulsion must be a finite number"),
        (lambda: gamma("1", "whole"), "weight must be a finite number >= 0, not '1'"),
        (lambda: gamma(math.nan, "half"), "weight must be a finite number >= 0, not nan"),
        (lambda: gamma(1.0, "apt", 0.0), "sigma must be a finite number > 0, not 0.0"),
        (lambda: GAN_LOSSES["gan-qp"].critic(SCORES, SCORES), r"takes \(real, fake, distance, .*'distance'"),
        (lambda: GAN_LOSSES["rpgan"].critic(SCORES, SCORES, SCORES), r"takes \(real, fake\): too many"),
    ],
)
def test_what_is_no_number_and_what_is_missing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


KINDS = [
    (SCORES.to_sparse(), "is a nested or sparse tensor; give a dense one"),
    (SCORES.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, with which nothing is computed"),
    (SCORES.to("meta"), "give all tensors on one device, not real on meta, fake on cpu"),
]


@pytest.mark.parametrize(("scores", "message"), KINDS)
@pytest.mark.parametrize("name", ["rpgan", "ns", "wgan"])
def test_kinds_of_tensors_that_torch_does_not_compute_with_are_refused(name, scores, message):
    for side in (GAN_LOSSES[name].critic, GAN_LOSSES[name].generator):
        with pytest.raises(ValueError, match=message):
            side(scores, SCORES)


def test_penalties_refuse_whole_numbers_seeds_and_gradients_that_are_none():
    pixels = torch.ones(4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"real is torch\.uint8, which has no gradient"):
        PENALTIES["r1"].of(sums, pixels, IMAGES)
    with pytest.raises(ValueError, match=r"generator is 0; give a torch\.Generator"):
        PENALTIES["r1"].of(sums, IMAGES, IMAGES, generator=0)
    for gradient, message in (
        (1.0, "real is a float"),
        (torch.ones(4), "b at least 1"),
        (IMAGES[:0], "b at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PENALTIES["r1"](gradient, IMAGES)
    with pytest.raises(ValueError, match=r"fake_anchor is torch\.complex64"):
        PENALTIES["lecam"](SCORES, SCORES, 0.0, torch.tensor(1j))


@pytest.mark.parametrize(
    "critic",
    [
        lambda images: torch.ones(4),
        lambda images: torch.ones(4, requires_grad=True) * 1,
        lambda images: sums(images.detach()),
        torch.no_grad()(sums),
    ],
)
@pytest.mark.parametrize("method", ["auto", "autograd"])
def test_a_critic_whose_scores_do_not_depend_on_the_images_is_refused(critic, method):
    with pytest.raises(
        ValueError, match="scores have no gradient by the images; make them from these images"
    ):
        PENALTIES["r1"].of(critic, IMAGES, IMAGES, method=method)


def test_images_that_have_no_gradient_are_refused():
    with pytest.raises(ValueError, match="scores have no gradient by the images"):
        input_gradients(sums(IMAGES.clone().requires_grad_()), IMAGES)
    with pytest.raises(ValueError, match="images is a list; give a tensor"):
        input_gradients(SCORES, [0.0] * 4)


def test_numbers_that_overflow_are_refused():
    with pytest.raises(ValueError, match="an even power of 2 to 100, not 1180591620717411303424"):
        GAN_LOSSES["gan-qp"].critic(SCORES, SCORES, SCORES, power=2**70)
    huge = GAN_LOSSES["gan-qp"].critic(SCORES, SCORES.flip(0), SCORES, qp_lambda=2**70)
    assert huge.isfinite()


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_tensors_without_numbers_has_the_shape_of_a_loss(field):
    samples = torch.empty(4, 3, device="meta")
    followed = follow_field(samples, samples, samples, field, [1.0])
    assert followed.loss.is_meta and followed.loss.shape == ()


@pytest.mark.parametrize("method", ["auto", "fd", "jvp", "autograd"])
def test_a_penalty_of_a_critic_without_numbers_has_the_shape_of_a_loss(method):
    critic, images = torch.nn.Linear(3, 1, device="meta"), torch.empty(4, 3, device="meta")
    penalty = PENALTIES["r1"].of(lambda x: critic(x)[:, 0], images, images, method=method)
    assert penalty.is_meta and penalty.shape == ()


def test_samples_of_no_features_are_refused():
    nothing = torch.zeros(4, 0)
    with pytest.raises(ValueError, match="give at least one feature"):
        follow_field(nothing, nothing, nothing, "drift", [1.0])
    with pytest.raises(ValueError, match="d at least 1, not"):
        energy_score(torch.zeros(2, 4, 0), nothing)
