"""Adversarial losses and gradient penalties: scores in, scalar out, lower is better for its owner."""

from rope_mm.losses.adversarial import DISTANCES as DISTANCES
from rope_mm.losses.adversarial import GAN_LOSSES as GAN_LOSSES
from rope_mm.losses.adversarial import GanLoss as GanLoss
from rope_mm.losses.penalties import PENALTIES as PENALTIES
from rope_mm.losses.penalties import input_gradients as input_gradients
from rope_mm.losses.penalties import twice_differentiable as twice_differentiable
