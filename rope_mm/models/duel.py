"""Image head against critic: one step of each on real and drawn patches of the same captions."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.losses import DISTANCES, GAN_LOSSES, PENALTIES, input_gradients, twice_differentiable
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMCritic, RopeMMForConditionalGeneration
from rope_mm.models.stories import Sequences


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A key of GAN_LOSSES, gammas of PENALTIES (0 leaves one out), the distance and strength of gan-qp."""

    name: str = "rpgan"
    penalties: dict[str, float] = field(default_factory=lambda: {"r1": 1.0, "r2": 1.0})
    distance: str = "l2"
    strength: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW for each player; the rate falls linearly to `final` of itself."""

    lr: float = 1e-3
    critic_lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    final: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Captions as sequences, with real patches and noise (b, n, p) for them."""

    sequences: Sequences
    real: Tensor
    noise: Tensor


class Duel:
    """Two players of one configuration, their optimisers, and the loss that they play for.

    Raises:
        ValueError: an unknown loss, penalty or distance.
    """

    def __init__(self, model: RopeMMConfig, objective: Objective, optim: Optim, accelerator: Accelerator):
        self.accelerator, self.optim, self.strength = accelerator, optim, objective.strength
        self.loss, self.distance = GAN_LOSSES[objective.name], DISTANCES[objective.distance]
        penalties = [(name, PENALTIES[name], gamma) for name, gamma in objective.penalties.items()]
        self.penalties = [penalty for penalty in penalties if penalty[-1]]
        generator, critic = RopeMMForConditionalGeneration(model), RopeMMCritic(model)
        if not model.tie_word_embeddings:
            generator.lm_head.requires_grad_(False)  # it is not trained here, and processes would wait for it
        self.generator, self.generator_optim = self.prepare(generator)
        self.critic, self.critic_optim = self.prepare(critic)

    def prepare(self, player: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A player and its optimiser, on their devices."""
        adam = torch.optim.AdamW(
            player.parameters(), betas=self.optim.betas, weight_decay=self.optim.weight_decay
        )
        return self.accelerator.prepare(player, adam)

    @property
    def unwrapped_generator(self) -> RopeMMForConditionalGeneration:
        """The generator without what several processes wrap it in."""
        return cast(RopeMMForConditionalGeneration, self.accelerator.unwrap_model(self.generator))

    def set_rates(self, progress: float) -> None:
        """Learning rates after this part, from 0 to 1, of the training."""
        rates = (self.generator_optim, self.optim.lr), (self.critic_optim, self.optim.critic_lr)
        for optimizer, rate in rates:
            optimizer.param_groups[0]["lr"] = rate * (1 - (1 - self.optim.final) * progress)

    def draw(self, batch: Batch) -> Tensor:
        """Patches (b, n, p) of the batch's captions, from its noise."""
        drawn = self.generator(**batch.sequences.inputs(), patches=batch.noise, words=False)
        return drawn.patches.view_as(batch.real)

    def update_critic(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        """One step of the critic; its loss, the penalties and the mean scores."""
        self.accelerator.unwrap_model(self.critic).requires_grad_(True)
        pair = torch.cat([batch.real, fake]).requires_grad_(bool(self.penalties))
        with twice_differentiable() if self.penalties else nullcontext():
            scores = self.critic(**batch.sequences.twice().inputs(), patches=pair).float()
        real_scores, fake_scores = scores.chunk(2)
        extra = (self.distance(batch.real, fake), self.strength) if self.loss.needs_distance else ()
        terms = {"critic": self.loss.critic(real_scores, fake_scores, *extra)}
        total = terms["critic"]
        if self.penalties:
            gradients = input_gradients(scores, pair).chunk(2)
            for name, penalty, gamma in self.penalties:
                terms[name] = penalty(*gradients)
                total = total + gamma * terms[name]
        self.critic_optim.zero_grad()
        self.accelerator.backward(total)
        self.critic_optim.step()
        return terms | {"real": real_scores.mean(), "fake": fake_scores.mean()}

    def update_generator(self, batch: Batch, fake: Tensor) -> Tensor:
        """One step of the generator by the critic's gradient at what it has drawn; its loss."""
        # no gradient to the critic's weights is wanted, so it is neither made nor synchronised
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        fake_scores = critic(**batch.sequences.inputs(), patches=fake).float()
        real_scores = fake_scores  # a loss that is not relativistic does not look at them
        if self.loss.relativistic:
            with torch.no_grad():
                real_scores = critic(**batch.sequences.inputs(), patches=batch.real).float()
        loss = self.loss.generator(real_scores, fake_scores)
        self.generator_optim.zero_grad()
        self.accelerator.backward(loss)
        self.generator_optim.step()
        return loss
