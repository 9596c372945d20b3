"""Distances that no pair of images has are refused by gan-qp, and never made into other numbers."""

import math

import pytest
import torch

from rope_mm.losses import GAN_LOSSES

CRITIC = GAN_LOSSES["gan-qp"].critic


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_distance_that_is_negative_or_not_finite_is_refused(wrong):
    real, fake, distance = torch.randn(3), torch.randn(3), torch.tensor([1.0, wrong, 2.0])
    with pytest.raises(ValueError, match="a distance must be finite and at least 0, but one is"):
        CRITIC(real, fake, distance)


def test_where_nobody_looks_a_negative_distance_makes_a_loss_that_is_no_number():
    real, fake, distance = torch.randn(3), torch.randn(3), torch.tensor([1.0, -1.0, 2.0])
    unseen = torch.func.vmap(lambda d: CRITIC(real, fake, d))(distance[None])
    assert unseen.isnan().all()


def test_pairs_that_coincide_have_a_finite_loss():
    assert CRITIC(torch.zeros(3), torch.zeros(3), torch.zeros(3)).isfinite()
