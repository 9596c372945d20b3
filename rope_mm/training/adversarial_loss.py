"""The objective of adversarial training: a loss on the critic's scores, and penalties on the critic.

Both trainers use it, and it is all that they share with the critic: `AdversarialTrainer` for captioned images
and `PretrainTrainer` for packed documents.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import PreTrainedModel

from rope_mm.losses import DISTANCES, GAN_LOSSES, METHODS, PENALTIES, input_gradients, twice_differentiable
from rope_mm.losses.penalties import GradientPenalty
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMCritic
from rope_mm.models.sequences import SequenceBatch
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.training.config import check_options, option
from rope_mm.training.distributed import all_gather_with_grad, is_sharded, precision, weighted_means

DOUBLE_BACKWARD = "eager", "sdpa"  # attention with second derivatives, sdpa as plain matrix products


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """What critic and generator optimise: loss + sum of gamma * penalty, and loss + transport."""

    name: str = option("rpgan", "adversarial loss", choices=GAN_LOSSES)
    penalties: dict[str, float] = option(
        {"r1": 1.0, "r2": 1.0}, "penalty -> gamma, those given replace these", keys=PENALTIES, minimum=0
    )
    distance: str = option("l2", "distance of a real and a fake image, of gan-qp", choices=DISTANCES)
    qp_lambda: float = option(10.0, "lambda of gan-qp", above=0)
    method: str = option(
        "auto",
        "estimator of gradient penalties; auto: autograd where the critic has second derivatives, else fd",
        choices=METHODS,
    )
    fraction: float = option(1.0, "of the batch that penalties are taken on", above=0, maximum=1)
    sigma: float = option(0.01, "step of finite differences, fd", above=0)
    spectral_norm: bool = option(
        False, "whether each matrix of the critic is divided by its largest singular value, as in SN-GAN"
    )
    transport: float = option(
        0.0, "weight of the mean square by which the generator moves its noise, in its loss", minimum=0
    )

    def __post_init__(self):
        check_options(self, "loss.")

    @property
    def penalised(self) -> list[str]:
        """The penalties that have a gamma."""
        return [name for name, gamma in self.penalties.items() if gamma]

    def unread(self) -> dict[str, str]:
        """The keys that this loss and its penalties do not read, with the reason."""
        keys: dict[str, str] = {}
        if not GAN_LOSSES[self.name].needs_distance:
            keys |= dict.fromkeys(("loss.distance", "loss.qp_lambda"), f"loss.name {self.name} reads none")
        if not any(isinstance(PENALTIES[name], GradientPenalty) for name in self.penalised):
            reason = "loss.penalties holds no penalty of gradients with a gamma above 0"
            keys |= dict.fromkeys(("loss.method", "loss.fraction", "loss.sigma"), reason)
        elif self.method not in ("auto", "fd"):
            keys["loss.sigma"] = f"loss.method {self.method} takes no finite differences"
        return keys


def as_it_is(patches: Tensor) -> Tensor:
    """Patches without augmentation."""
    return patches


@dataclass(frozen=True)
class CriticBatch:
    """Sequences that a critic reads, with the real patches; fake ones take their places.

    Attributes:
        sequences: token ids, positions and blocks of b sequences.
        real: patches (b, n, p), padded where sequences have fewer than n.
        valid: (b, n), which patches are no padding; None: all.
        generated: (b, n), which patches the generator makes, the others being context; None: all. Only these
            receive a gradient.
        augment: changes patches (r, n, p) before the critic; it treats row i as row i modulo b.
        generator: random numbers of the penalties that need some.
        angles: of the sequences' positions, made once for all passes of both players; None: each pass makes
            its own.
    """

    sequences: SequenceBatch
    real: Tensor
    valid: Tensor | None = None
    generated: Tensor | None = None
    augment: Callable[[Tensor], Tensor] = as_it_is
    generator: torch.Generator | None = None
    angles: RotaryAngles | None = None

    @property
    def count(self) -> int:
        """How many sequences have something to generate."""
        return len(self.real) if self.generated is None else int(self.generated.any(1).sum())

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """Keyword arguments of a forward but patches and angles, made once for all passes of a step."""
        inputs = self.sequences.inputs(self.angles)
        inputs.pop("angles", None)
        return {name: x.movedim(1, 0) if x.dim() == 3 else x for name, x in inputs.items()}

    def inputs(self, rows: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of a forward but patches, of all sequences or of rows (r,) of them."""
        columns = self.columns if rows is None else {name: x[rows] for name, x in self.columns.items()}
        inputs: dict[str, Any] = {n: x.movedim(0, 1) if x.dim() == 3 else x for n, x in columns.items()}
        if self.angles is not None:
            inputs["angles"] = self.angles if rows is None else self.angles.select_rows(rows)
        return inputs

    def score(self, critic: nn.Module, patches: Tensor, augmented: bool = True) -> Tensor:
        """Scores (r,) in float32.

        Args:
            critic: reads token ids and patches.
            patches: (r, n, p) for the first r sequences, or for all of them twice, r = 2 b.
            augmented: whether `augment` is applied first.
        """
        patches = self.augment(patches) if augmented else patches
        rows = torch.arange(len(patches), device=patches.device) % len(self.real)
        if self.generated is not None:
            patches = torch.where(self.generated[rows, :, None], patches, patches.detach())
        if self.valid is not None:
            patches = patches[self.valid[rows]]
        return critic(**self.inputs(rows), patches=patches).float()

    def insert(self, generated: Tensor) -> Tensor:
        """The real patches (b, n, p) with generated ones (m, p) in their places."""
        if self.generated is None:
            return generated.view_as(self.real)
        return self.real.masked_scatter(self.generated[..., None], generated)


class LeCamEMA:
    """Running mean scores of real and fake images for LeCam: a <- d a + (1 - d) mean, d at most 0.99.

    After n batches d is at most n / (n + 1), the plain mean, so that the start leaves no trace.
    """

    def __init__(self):
        self.means, self.batches = torch.zeros(2), torch.zeros(())

    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Take in the mean scores of a batch, if they are finite."""
        fresh = torch.stack([real_mean, fake_mean]).detach()
        means, batches = self.means.to(fresh.device), self.batches.to(fresh.device)
        decay, finite = (batches / (batches + 1)).clamp(max=0.99), fresh.isfinite().all()
        self.means = torch.where(finite, torch.lerp(fresh, means, decay), means)
        self.batches = batches + finite

    def state_dict(self) -> dict[str, Any]:
        """The means and the number of batches behind them."""
        return {"means": self.means, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.means, self.batches = state["means"], state["batches"]


@dataclass(frozen=True)
class Scored:
    """A batch after the critic's pass over real and fake patches, from which penalties are computed.

    Attributes:
        critic: the module that made the scores.
        batch: what it read.
        pair: patches (2 b, n, p), real then fake, before augmentation.
        scores: (2 b,), of the pair after augmentation.
        lecam: the running means.
    """

    critic: nn.Module
    batch: CriticBatch
    pair: Tensor
    scores: Tensor
    lecam: LeCamEMA


def consistency(scored: Scored) -> Tensor:
    """Scores of augmented against plain patches, of real and of fake ones: bCR, arXiv 2002.04724."""
    plain = scored.batch.score(scored.critic, scored.pair.detach(), augmented=False).chunk(2)
    penalty = PENALTIES["consistency"]
    real, fake = (penalty(*sides) for sides in zip(plain, scored.scores.chunk(2), strict=True))
    return real + fake


SCORE_PENALTIES: dict[str, Callable[[Scored], Tensor]] = {
    "consistency": consistency,
    "centring": lambda scored: PENALTIES["centring"](*scored.scores.chunk(2)),
    "lecam": lambda scored: PENALTIES["lecam"](
        *scored.scores.chunk(2), *scored.lecam.means.to(scored.scores.device)
    ),
}


def supports_double_backward(critic: PreTrainedModel, compiled: bool, sharded: bool) -> bool:
    """Whether a critic has second derivatives.

    FSDP frees the weights that a second derivative needs (pytorch issue 172543).

    Args:
        critic: with its attention in the config.
        compiled: whether it is compiled.
        sharded: whether its weights are sharded (FSDP).
    """
    return not compiled and not sharded and critic.config._attn_implementation in DOUBLE_BACKWARD


def make_critic(
    model: RopeMMConfig, loss: GANConfig, accelerator: Accelerator, *, compiled: bool, checkpointing: bool
) -> RopeMMCritic:
    """A critic of random weights.

    With `spectral_norm` a step of power iteration improves the estimates of the largest singular values
    (SN-GAN, arXiv 1802.05957, algorithm 1). Both players' steps run under torch's `parametrize.cached`, so
    that all forwards of a step have the same matrices: finite differences of two forwards need that.

    Args:
        model: its configuration.
        loss: says whether its matrices are normalised.
        accelerator: devices and processes.
        compiled: whether it is compiled.
        checkpointing: whether its blocks are recomputed in the backward pass.

    Raises:
        ValueError: normalised matrices of a compiled, recomputed or sharded critic.
    """
    critic = RopeMMCritic(model)
    if not loss.spectral_norm:
        return critic
    if compiled or checkpointing or is_sharded(accelerator):
        raise ValueError(
            "loss.spectral_norm needs whole matrices and one estimate a step; take it without compile, "
            "gradient checkpointing and sharding (FSDP)"
        )
    for layer in [module for module in critic.modules() if isinstance(module, nn.Linear)]:
        spectral_norm(layer)
    return critic


class Penalties:
    """The penalties of an objective, with the estimator that the critic allows.

    Args:
        config: gammas and how gradients are estimated.
        double_backward: whether the critic has second derivatives.
        checkpointing: whether the critic's blocks are recomputed in the backward pass.

    Attributes:
        gammas: penalty -> its weight.
        method: the estimator.
        from_scores: r1 and r2 are taken from the pass that makes the scores, so its patches need a gradient.

    Raises:
        ValueError: a method that a penalty or the critic does not allow.
    """

    def __init__(self, config: GANConfig, double_backward: bool, checkpointing: bool = False):
        if checkpointing and config.method == "jvp":
            raise ValueError("loss.method jvp does not work with gradient checkpointing; use autograd or fd")
        if config.method == "head":
            raise ValueError(
                "loss.method 'head' is for a critic with a frozen backbone, and this one trains as a whole; "
                "use autograd, fd or jvp"
            )
        self.gammas = {name: config.penalties[name] for name in config.penalised}
        self.method = config.method if config.method != "auto" else "autograd" if double_backward else "fd"
        self.fraction, self.sigma = config.fraction, config.sigma
        of_gradients = [p for p in map(PENALTIES.__getitem__, self.gammas) if isinstance(p, GradientPenalty)]
        for penalty in of_gradients:
            penalty.check(self.method, self.fraction, self.sigma)
        self.exact = bool(of_gradients) and self.method != "fd"
        if self.exact and not double_backward:
            raise ValueError(
                f"loss.method {self.method!r} differentiates the critic twice, which a compiled or sharded "
                "(FSDP) critic or its attention does not allow; use fd, or sdpa attention without either"
            )
        at_pair = any(penalty.at != "between" for penalty in of_gradients)
        self.from_scores = at_pair and self.method == "autograd" and self.fraction == 1

    def attention(self) -> AbstractContextManager:
        """Context of the critic's update, its backward pass included: attention with second derivatives."""
        return twice_differentiable() if self.exact else nullcontext()

    def __call__(self, scored: Scored) -> dict[str, Tensor]:
        """Each penalty, not yet multiplied by its gamma."""
        gradients = input_gradients(scored.scores, scored.pair).chunk(2) if self.from_scores else None
        return {name: self.compute(name, scored, gradients) for name in self.gammas}

    def compute(self, name: str, scored: Scored, gradients: tuple[Tensor, ...] | None) -> Tensor:
        """One penalty.

        Args:
            name: its key in PENALTIES.
            scored: the critic and what it has scored.
            gradients: of the scores by real and by fake patches (b, n, p), where they were made already.
        """
        penalty = PENALTIES[name]
        if not isinstance(penalty, GradientPenalty):
            return SCORE_PENALTIES[name](scored)
        if gradients is not None and penalty.at != "between":
            return penalty(*gradients)
        real, fake = scored.pair.detach().chunk(2)
        return penalty.of(
            lambda patches: scored.batch.score(scored.critic, patches),
            real,
            fake,
            method=self.method,
            fraction=self.fraction,
            sigma=self.sigma,
            generator=scored.batch.generator,
        )


class AdversarialLoss:
    """The loss of the critic and the loss of the generator on one batch.

    Args:
        config: loss, penalties and how they are estimated.
        critic: the critic before it is wrapped for several processes.
        accelerator: devices, processes and bf16.
        compiled: whether the critic is compiled.
        checkpointing: whether its blocks are recomputed in the backward pass.
        gather: whether scores of all processes are compared, as one batch; all must have equally many. False:
            each process compares its own, and weighs its loss.

    Raises:
        ValueError: a configuration out of range, a method that the critic does not allow.
    """

    def __init__(
        self,
        config: GANConfig,
        critic: PreTrainedModel,
        accelerator: Accelerator,
        *,
        compiled: bool = False,
        checkpointing: bool = False,
        gather: bool = False,
    ):
        self.loss, self.distance, self.qp_lambda = (
            GAN_LOSSES[config.name],
            DISTANCES[config.distance],
            config.qp_lambda,
        )
        self.accelerator, self.gather, self.lecam = accelerator, gather, LeCamEMA()
        twice = supports_double_backward(critic, compiled, is_sharded(accelerator))
        self.penalties = Penalties(config, twice, checkpointing)

    def critic_loss(
        self,
        critic: nn.Module,
        batch: CriticBatch,
        fake: Tensor,
        weight: float = 1.0,
        gamma_scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic minimises, and its terms; call it under `penalties.attention()`.

        Args:
            critic: scores sequences with patches.
            batch: the sequences and their real patches.
            fake: generated patches (b, n, p), detached.
            weight: of this process's scores among those of all, for LeCam's running means.
            gamma_scale: factor of all gammas.
        """
        pair = torch.cat([batch.real, fake]).requires_grad_(self.penalties.from_scores)
        with precision(self.accelerator, full=self.penalties.from_scores):
            scores = batch.score(critic, pair)
        real_scores, fake_scores = map(self.all_rows, scores.chunk(2))
        extra = ()
        if self.loss.needs_distance:
            extra = self.all_rows(self.distance(batch.real, fake)), self.qp_lambda
        loss = self.loss.critic(real_scores, fake_scores, *extra)
        means = real_scores.mean(), fake_scores.mean()
        shared = means if self.gather else weighted_means(self.accelerator, means, weight)
        self.lecam.update(*shared)
        with precision(self.accelerator, full=True):
            penalties = self.penalties(Scored(critic, batch, pair, scores, self.lecam))
        total = loss
        for name, gamma in self.penalties.gammas.items():
            total = total + gamma * gamma_scale * penalties[name]
        named = {f"penalty/{name}": penalty for name, penalty in penalties.items()}
        scores = {"score/real": means[0], "score/fake": means[1]}
        return total, {"loss/critic": loss} | named | scores

    def generator_loss(self, critic: nn.Module, batch: CriticBatch, fake: Tensor) -> Tensor:
        """What the generator minimises.

        Args:
            critic: scores sequences with patches; freeze its weights, which need no gradient here.
            batch: the sequences and their real patches.
            fake: generated patches (b, n, p), with a gradient.
        """
        with precision(self.accelerator):
            real_scores = fake_scores = batch.score(critic, fake)
            if self.loss.relativistic:  # the other losses ignore the real scores
                with torch.no_grad():
                    real_scores = batch.score(critic, batch.real)
        return self.loss.generator(self.all_rows(real_scores), self.all_rows(fake_scores))

    def all_rows(self, rows: Tensor) -> Tensor:
        """Rows (b, ...) of all processes where scores are gathered, else this process's."""
        return all_gather_with_grad(rows, self.accelerator) if self.gather else rows
