"""The loss and the penalties of an objective, between what is real and what a model has drawn."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rope_mm.losses import DISTANCES, GAN_LOSSES
from rope_mm.losses.gradients import Critic
from rope_mm.training.gan import CriticBatch, GANConfig, LeCamEMA, Penalties, supports_double_backward
from rope_mm.training.prepare import precision, sharded

Rows = Callable[[Tensor], Tensor]


class AdversarialLoss:
    """What two players play for; LeCam's anchors are part of a checkpoint.

    Args:
        objective: the loss, the penalties and how they are taken.
        critic: not wrapped for several processes.
        accelerator: devices, processes and bf16.
        compiled: whether the critic is compiled.
        checkpointing: whether its blocks are computed anew in the backward.

    Raises:
        ValueError: an unknown loss, penalty or distance, a method that does not fit.
    """

    def __init__(
        self,
        objective: GANConfig,
        critic: PreTrainedModel,
        accelerator: Accelerator,
        compiled: bool,
        checkpointing: bool,
    ):
        self.loss, self.distance = GAN_LOSSES[objective.name], DISTANCES[objective.distance]
        self.strength, self.accelerator = objective.strength, accelerator
        twice = supports_double_backward(critic, compiled, sharded(accelerator))
        self.penalties, self.anchors = Penalties(objective, twice, checkpointing), LeCamEMA()
        accelerator.register_for_checkpointing(self.anchors)

    def of_critic(
        self,
        critic: Critic,
        plain: Critic,
        real: Tensor,
        fake: Tensor,
        probes: torch.Generator | None,
        everyone: Rows,
        means: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        part: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic minimises, and its terms with the mean scores; under `penalties.attention()`.

        Args:
            critic: scores (r,) of patches (r, n, p), real and fake in one pass.
            plain: the same without augmentation.
            real: patches (b, n, p).
            fake: drawn ones, detached.
            probes: of finite differences and their like.
            everyone: rows of all processes from those here, of scores and distances.
            means: from those scores the two means that LeCam's anchors follow.
            part: of the penalties' gammas.
        """
        pair = torch.cat([real, fake]).requires_grad_(self.penalties.shares)
        with precision(self.accelerator, full=self.penalties.shares):
            scores = critic(pair)
        halves = scores.chunk(2)
        seen = everyone(halves[0]), everyone(halves[1])
        extra = (everyone(self.distance(real, fake)), self.strength) if self.loss.needs_distance else ()
        terms = {"critic": self.loss.critic(*seen, *extra)}
        self.anchors.update(*means(*seen))
        judged = CriticBatch(critic, plain, real, fake, halves[0], halves[1], probes)
        with precision(self.accelerator, full=True):
            terms |= self.penalties(judged, pair, scores, self.anchors)
        total = terms["critic"]
        for name, gamma in self.penalties.gammas.items():
            total = total + gamma * part * terms[name]
        return total, terms | {"real": seen[0].mean(), "fake": seen[1].mean()}

    def of_model(self, critic: Critic, real: Tensor, fake: Tensor, everyone: Rows) -> Tensor:
        """What the model minimises that has drawn the fake patches (b, n, p)."""
        with precision(self.accelerator):
            scores = critic(fake)
            seen = scores  # a loss that is not relativistic does not look at the real ones
            if self.loss.relativistic:
                with torch.no_grad():
                    seen = critic(real)
        return self.loss.generator(everyone(seen), everyone(scores))
