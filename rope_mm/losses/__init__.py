"""Adversarial losses and gradient penalties: scores in, scalar out, lower is better for its owner."""

from rope_mm.losses.adversarial import DISTANCES as DISTANCES
from rope_mm.losses.adversarial import GAN_LOSSES as GAN_LOSSES
from rope_mm.losses.adversarial import GanLoss as GanLoss
from rope_mm.losses.adversarial import transport_cost as transport_cost
from rope_mm.losses.divergences import F_DIVERGENCES as F_DIVERGENCES
from rope_mm.losses.divergences import MONOTONE as MONOTONE
from rope_mm.losses.energy import energy_score as energy_score
from rope_mm.losses.gradients import METHODS as METHODS
from rope_mm.losses.gradients import input_gradients as input_gradients
from rope_mm.losses.gradients import twice_differentiable as twice_differentiable
from rope_mm.losses.penalties import PENALTIES as PENALTIES
from rope_mm.losses.penalties import gamma as gamma

__all__ = [
    "DISTANCES",
    "F_DIVERGENCES",
    "GAN_LOSSES",
    "METHODS",
    "MONOTONE",
    "PENALTIES",
    "GanLoss",
    "energy_score",
    "gamma",
    "input_gradients",
    "transport_cost",
    "twice_differentiable",
]
