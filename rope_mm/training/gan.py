"""What image head and critic play for: a loss on scores, and penalties on the critic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rope_mm.losses import METHODS, PENALTIES, input_gradients, twice_differentiable
from rope_mm.losses.gradients import Critic
from rope_mm.losses.penalties import GradientPenalty

TWICE = "eager", "sdpa"  # attention with second derivatives, sdpa as plain matrix products


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """A key of GAN_LOSSES, gammas of PENALTIES (0 leaves one out), the distance and strength of gan-qp.

    The rest says how gradient penalties are estimated, as `GradientPenalty.of` says it.
    """

    name: str = "rpgan"
    penalties: dict[str, float] = field(default_factory=lambda: {"r1": 1.0, "r2": 1.0})
    distance: str = "l2"
    strength: float = 10.0
    method: str = (
        "auto"  # autograd, fd or jvp; auto: autograd where the critic has second derivatives, else fd
    )
    fraction: float = 1.0  # of the batch
    sigma: float = 0.01  # step of fd


@dataclass(frozen=True)
class CriticBatch:
    """A batch before the critic: `critic` scores patches (r, n, p) of the first r captions, or of all twice.

    `plain` does so without augmentation; real and fake (b, n, p) are not augmented, their scores (b,) are.
    """

    critic: Critic
    plain: Critic
    real: Tensor
    fake: Tensor
    real_scores: Tensor
    fake_scores: Tensor
    probes: torch.Generator | None  # of fd, jvp and of the points between real and fake


class LeCamEMA:
    """LeCam's running mean scores of real and fake, a <- d a + (1 - d) mean, d at most 0.99.

    With n batches behind it d is at most n / (n + 1), the plain mean: the start leaves no trace.
    """

    def __init__(self):
        self.means, self.batches = torch.zeros(2), torch.zeros(())

    def update(self, real_scores: Tensor, fake_scores: Tensor) -> None:
        """Take in the scores of a batch, if their means are finite."""
        fresh = torch.stack([real_scores.detach().mean(), fake_scores.detach().mean()])
        means, batches = self.means.to(fresh.device), self.batches.to(fresh.device)
        decay, good = (batches / (batches + 1)).clamp(max=0.99), fresh.isfinite().all()
        self.means = torch.where(good, torch.lerp(fresh, means, decay), means)
        self.batches = batches + good

    def state_dict(self) -> dict[str, Any]:
        """The means and how many batches made them."""
        return {"means": self.means, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.means, self.batches = state["means"], state["batches"]


def consistent(judged: CriticBatch, anchors: LeCamEMA) -> Tensor:
    """Augmented against plain, at real and at fake: bCR, arXiv 2002.04724."""
    real, fake = judged.plain(torch.cat([judged.real, judged.fake])).chunk(2)
    penalty = PENALTIES["consistency"]
    return penalty(real, judged.real_scores) + penalty(fake, judged.fake_scores)


OF_SCORES: dict[str, Callable[[CriticBatch, LeCamEMA], Tensor]] = {
    "consistency": consistent,
    "centring": lambda judged, anchors: PENALTIES["centring"](judged.real_scores, judged.fake_scores),
    "lecam": lambda judged, anchors: PENALTIES["lecam"](
        judged.real_scores, judged.fake_scores, *anchors.means.to(judged.real_scores.device)
    ),
}


def supports_double_backward(critic: PreTrainedModel, compiled: bool, shards: bool) -> bool:
    """Whether a critic is differentiable twice.

    FSDP frees the weights that a second derivative needs (pytorch issue 172543).
    """
    return not compiled and not shards and critic.config._attn_implementation in TWICE


class Penalties:
    """The penalties of an objective on a critic that is differentiable twice, or checkpointed, or not.

    `gammas` are their weights. Where `shares` is true, r1 and r2 are taken exactly from the pass that makes
    the scores of real and fake, so that the pair must require a gradient then.

    Raises:
        ValueError: an unknown penalty, a method that it or the critic does not allow.
    """

    def __init__(self, objective: GANConfig, twice: bool, checkpointing: bool = False):
        if checkpointing and objective.method == "jvp":
            raise ValueError(
                "a forward derivative, jvp, does not go through checkpoints; take autograd or fd"
            )
        self.gammas = {name: gamma for name, gamma in objective.penalties.items() if gamma}
        self.method = ("autograd" if twice else "fd") if objective.method == "auto" else objective.method
        self.fraction, self.sigma = objective.fraction, objective.sigma
        of_gradients = [p for p in map(PENALTIES.__getitem__, self.gammas) if isinstance(p, GradientPenalty)]
        METHODS[self.method]
        for penalty in of_gradients:
            penalty.check(self.method, self.fraction, self.sigma)
        if self.method == "head":
            raise ValueError(
                "loss.method 'head' is for a frozen backbone, and this critic trains as a whole; take "
                "autograd, fd or jvp"
            )
        self.exact = bool(of_gradients) and self.method != "fd"
        if self.exact and not twice:
            raise ValueError(
                f"loss.method {self.method!r} differentiates the critic twice, which one that is compiled or "
                "sharded (FSDP), or its attention, does not allow; take fd, or sdpa attention without either"
            )
        at_pair = any(penalty.at != "between" for penalty in of_gradients)
        self.shares = at_pair and self.method == "autograd" and self.fraction == 1

    def attention(self) -> AbstractContextManager:
        """Context of the critic's whole update: its backward makes anew what is checkpointed."""
        return twice_differentiable() if self.exact else nullcontext()

    def __call__(
        self, judged: CriticBatch, pair: Tensor, scores: Tensor, anchors: LeCamEMA
    ) -> dict[str, Tensor]:
        """Each penalty, without its gamma, of a pair (2b, n, p) and its scores (2b,)."""
        gradients = input_gradients(scores, pair).chunk(2) if self.shares else None
        return {name: self.take(name, judged, gradients, anchors) for name in self.gammas}

    def take(
        self, name: str, judged: CriticBatch, gradients: tuple[Tensor, ...] | None, anchors: LeCamEMA
    ) -> Tensor:
        """One penalty; `gradients` are those at real and fake where somebody has made them."""
        penalty = PENALTIES[name]
        if not isinstance(penalty, GradientPenalty):
            return OF_SCORES[name](judged, anchors)
        if gradients is not None and penalty.at != "between":
            return penalty(*gradients)
        how = {"method": self.method, "fraction": self.fraction, "sigma": self.sigma}
        return penalty.of(judged.critic, judged.real, judged.fake, **how, generator=judged.probes)
