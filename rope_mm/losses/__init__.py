"""Adversarial losses and gradient penalties: scores in, scalar out, lower is better for its owner."""

from rope_mm.losses.adversarial import DISTANCES as DISTANCES
from rope_mm.losses.adversarial import GAN_LOSSES as GAN_LOSSES
from rope_mm.losses.adversarial import GanLoss as GanLoss
from rope_mm.losses.adversarial import transport_cost as transport_cost
from rope_mm.losses.divergences import F_DIVERGENCES as F_DIVERGENCES
from rope_mm.losses.divergences import MONOTONE as MONOTONE
from rope_mm.losses.drift import FIELDS as FIELDS
from rope_mm.losses.drift import coupled_field as coupled_field
from rope_mm.losses.drift import follow_field as follow_field
from rope_mm.losses.drift import kernel_field as kernel_field
from rope_mm.losses.drift import sinkhorn_field as sinkhorn_field
from rope_mm.losses.energy import energy_distance as energy_distance
from rope_mm.losses.energy import energy_score as energy_score
from rope_mm.losses.gradients import METHODS as METHODS
from rope_mm.losses.gradients import input_gradients as input_gradients
from rope_mm.losses.gradients import twice_differentiable as twice_differentiable
from rope_mm.losses.penalties import PENALTIES as PENALTIES
from rope_mm.losses.penalties import gamma as gamma

__all__ = [
    "DISTANCES",
    "FIELDS",
    "F_DIVERGENCES",
    "GAN_LOSSES",
    "METHODS",
    "MONOTONE",
    "PENALTIES",
    "GanLoss",
    "coupled_field",
    "energy_distance",
    "energy_score",
    "follow_field",
    "gamma",
    "input_gradients",
    "kernel_field",
    "sinkhorn_field",
    "transport_cost",
    "twice_differentiable",
]
