"""Image head against critic: one step of each on real and drawn patches of the same captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMCritic, RopeMMForConditionalGeneration
from rope_mm.models.sequences import SequenceBatch
from rope_mm.training.contest import AdversarialLoss
from rope_mm.training.distributed import all_gather_with_grad
from rope_mm.training.gan import GANConfig
from rope_mm.training.prepare import prepare_model
from rope_mm.training.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class AdversarialOptim:
    """AdamW for each player; rates, beta2 and the gammas of the penalties go along the schedule.

    `final` and `final_gamma` are parts of what they start from; they are reached at `until` of the run.
    """

    lr: float = 1e-3
    critic_lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    schedule: str = "linear"
    until: float = 1.0
    final: float = 1.0
    final_beta2: float | None = None  # None: beta2 stays
    final_gamma: float = 1.0


@dataclass(frozen=True)
class AdversarialBatch:
    """Captions as sequences, with real patches and noise (b, n, p) for them.

    `view` augments patches, row i with draw i modulo b; `probes` draws what penalties need.
    """

    sequences: SequenceBatch
    real: Tensor
    noise: Tensor
    view: Callable[[Tensor], Tensor] = lambda patches: patches
    probes: torch.Generator | None = None


class AdversarialTrainer:
    """Two players of one configuration, their optimisers, and the loss that they play for.

    Args:
        model: the configuration of both.
        objective: what they play for.
        optim: how they learn.
        accelerator: devices, processes, bf16 and how many batches make a step.
        compile: a backend of torch.compile, such as "inductor"; "" leaves both uncompiled.
        checkpointing: whether blocks are computed anew in the backward instead of kept.

    Raises:
        ValueError: an unknown loss, penalty, distance or schedule, a method that does not fit, mixed fp16.
    """

    def __init__(
        self,
        model: RopeMMConfig,
        objective: GANConfig,
        optim: AdversarialOptim,
        accelerator: Accelerator,
        compile: str = "",
        checkpointing: bool = False,
    ):
        self.accelerator, self.optim = accelerator, optim
        self.schedule, self.gamma = SCHEDULES[optim.schedule], 1.0
        generator, critic = RopeMMForConditionalGeneration(model), RopeMMCritic(model)
        self.contest = AdversarialLoss(objective, critic, accelerator, bool(compile), checkpointing)
        if not model.tie_word_embeddings:
            generator.lm_head.requires_grad_(False)  # it is not trained here, and processes would wait for it
        how = accelerator, optim.betas, optim.weight_decay, compile, checkpointing
        self.generator, self.generator_optim = prepare_model(generator, *how)
        self.critic, self.critic_optim = prepare_model(critic, *how)

    @property
    def unwrapped_generator(self) -> RopeMMForConditionalGeneration:
        """The generator without what several processes wrap it in."""
        return cast(RopeMMForConditionalGeneration, self.accelerator.unwrap_model(self.generator))

    def set_rates(self, progress: float) -> None:
        """Learning rates, beta2 and gammas after this part, from 0 to 1, of the training."""
        optim, progress = self.optim, min(1.0, progress / self.optim.until)
        beta1, beta2 = optim.betas
        final_beta2 = beta2 if optim.final_beta2 is None else optim.final_beta2
        rates = (self.generator_optim, optim.lr), (self.critic_optim, optim.critic_lr)
        for optimizer, rate in rates:
            group = optimizer.param_groups[0]
            group["lr"] = rate * self.schedule(1.0, optim.final, progress)
            group["betas"] = beta1, self.schedule(beta2, final_beta2, progress)
        self.gamma = self.schedule(1.0, optim.final_gamma, progress)

    def play(self, rounds: Sequence[Sequence[AdversarialBatch]]) -> dict[str, Tensor]:
        """The critic's updates, each by the mean over a round's batches, and then one of the generator.

        A round has as many batches as the accelerator accumulates gradients of. The
        generator's is by the last round's. What that round lost.
        """
        *earlier, last = rounds
        for batch in (batch for batches in earlier for batch in batches):
            with torch.no_grad():
                fake = self.draw(batch)
            self.update_critic(batch, fake)
        with torch.set_grad_enabled(len(last) == 1):  # the graphs of several would lie in memory together
            fakes = [self.draw(batch) for batch in last]
        lost = [self.update_critic(batch, fake.detach()) for batch, fake in zip(last, fakes, strict=True)]
        for terms, batch, fake in zip(lost, last, fakes, strict=True):
            terms["generator"] = self.update_generator(batch, fake if fake.requires_grad else None)
        return {name: torch.stack([terms[name].detach() for terms in lost]).mean() for name in lost[0]}

    def draw(self, batch: AdversarialBatch) -> Tensor:
        """Patches (b, n, p) of the batch's captions, from its noise."""
        with self.accelerator.autocast():
            drawn = self.generator(**batch.sequences.inputs(), patches=batch.noise, return_logits=False)
        return drawn.patches.float().view_as(batch.real)

    def score(self, critic: nn.Module, sequences: SequenceBatch, patches: Tensor) -> Tensor:
        """Scores (r,), in float32, of patches (r, n, p) for the first r captions, or for all twice."""
        return critic(**sequences.repeat_rows(len(patches)).inputs(), patches=patches).float()

    def update_critic(self, batch: AdversarialBatch, fake: Tensor) -> dict[str, Tensor]:
        """One step of the critic; its loss, the penalties and the mean scores."""
        self.accelerator.unwrap_model(self.critic).requires_grad_(True)
        plain = lambda patches: self.score(self.critic, batch.sequences, patches)  # noqa: E731
        critic = lambda patches: plain(batch.view(patches))  # noqa: E731
        with self.accelerator.accumulate(self.critic), self.contest.penalties.attention():
            sides = batch.real, fake, batch.probes, self.everyone
            total, terms = self.contest.of_critic(critic, plain, *sides, lambda *scores: scores, self.gamma)
            self.accelerator.backward(total)
            self.critic_optim.step()
            self.critic_optim.zero_grad()
        return terms

    def everyone(self, rows: Tensor) -> Tensor:
        """Rows of all processes."""
        return all_gather_with_grad(rows, self.accelerator)

    def update_generator(self, batch: AdversarialBatch, fake: Tensor | None = None) -> Tensor:
        """One step of the generator by the critic's gradient at what it has drawn, or draws; its loss."""
        # no gradient to the critic's weights is wanted, so it is neither made nor synchronised
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        with self.accelerator.accumulate(self.generator):
            fake = self.draw(batch) if fake is None else fake
            score = lambda patches: self.score(critic, batch.sequences, batch.view(patches))  # noqa: E731
            loss = self.contest.of_model(score, batch.real, fake, self.everyone)
            self.accelerator.backward(loss)
            self.generator_optim.step()
            self.generator_optim.zero_grad()
        return loss
