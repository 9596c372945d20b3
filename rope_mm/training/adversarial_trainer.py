"""Adversarial training of an image head on captioned images: steps of the critic and of the generator."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import record_function

from rope_mm.losses import transport_cost
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.training.adversarial_loss import AdversarialLoss, CriticBatch, GANConfig, make_critic
from rope_mm.training.config import check_options, option
from rope_mm.training.distributed import grad_norm, no_sync_if, prepare_model
from rope_mm.training.rotary_profile import ANGLES
from rope_mm.training.schedule import SCHEDULES

SharedBatch = TypeVar("SharedBatch", bound=CriticBatch)


@dataclass(frozen=True, kw_only=True)
class AdversarialOptim:
    """AdamW of both players; rates, beta2, gammas and transport follow the schedule to their final values."""

    lr: float = option(1e-3, "learning rate of the generator", minimum=0)
    critic_lr: float = option(1e-3, "learning rate of the critic", minimum=0)
    betas: tuple[float, float] = option((0.0, 0.99), "of AdamW", minimum=0, below=1)
    weight_decay: float = option(0.0, "of AdamW", minimum=0)
    schedule: str = option("linear", "from the first values to the final ones", choices=SCHEDULES)
    decay_until: float = option(1.0, "part of the run at which they are reached", above=0, maximum=1)
    final_lr_ratio: float = option(1.0, "final rates over the first ones", minimum=0)
    final_beta2: float | None = option(None, "null: beta2 stays", minimum=0, below=1)
    final_gamma: float = option(1.0, "final gammas of penalties over the first ones", minimum=0)
    final_transport: float = option(1.0, "final weight of transport over the first one", minimum=0)

    def __post_init__(self):
        check_options(self, "optim.")

    @property
    def constant(self) -> bool:
        """Whether nothing changes along the schedule, so that the number of steps changes no step."""
        same = self.final_lr_ratio == self.final_gamma == self.final_transport == 1
        return same and self.final_beta2 in (None, self.betas[1])

    def unread(self, loss: GANConfig) -> dict[str, str]:
        """The keys that nothing reads beside this loss, with the reason.

        Args:
            loss: the objective.
        """
        keys: dict[str, str] = {}
        if not loss.penalised:
            keys["optim.final_gamma"] = "loss.penalties has no gamma above 0"
        if not loss.transport:
            keys["optim.final_transport"] = "loss.transport is 0"
        if self.constant:
            reason = "no rate, beta2, gamma or transport has another final value"
            keys |= dict.fromkeys(("optim.schedule", "optim.decay_until"), reason)
        return keys


@dataclass(frozen=True)
class AdversarialBatch(CriticBatch):
    """Captions with places for patches, their real patches, and noise from which to generate.

    Attributes:
        noise: patches (b, n, p).
    """

    noise: Tensor = field(default_factory=Tensor)


class CriticTrainer:
    """A critic, its optimizer, and the loss by which it trains and is trained against.

    Args:
        critic: reads token ids and patches; wrapped where there are several processes.
        optimizer: of its weights.
        loss: of critic and generator.
        accelerator: devices and processes.
    """

    def __init__(
        self,
        critic: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: AdversarialLoss,
        accelerator: Accelerator,
    ):
        self.critic, self.optimizer, self.loss, self.accelerator = critic, optimizer, loss, accelerator

    def step(
        self,
        batch: CriticBatch,
        fake: Tensor,
        *,
        weight: float = 1.0,
        gamma_scale: float = 1.0,
        last: bool = True,
    ) -> dict[str, Tensor]:
        """One step of the critic; its loss, penalties and mean scores.

        Args:
            batch: sequences and their real patches.
            fake: generated patches (b, n, p).
            weight: factor of the loss, such that the mean over processes of the sum of a step's batches is
                the mean over all sequences.
            gamma_scale: factor of the gammas of penalties.
            last: whether this is the step's last batch; gradients accumulate until then.
        """
        self.accelerator.unwrap_model(self.critic).requires_grad_(True)
        no_sync = no_sync_if(self.accelerator, self.critic, not last)
        with no_sync, self.loss.penalties.attention(), parametrize.cached():
            total, terms = self.loss.critic_loss(self.critic, batch, fake.detach(), weight, gamma_scale)
            self.accelerator.backward(total * weight)
        if last:
            terms["grad_norm/critic"] = grad_norm(self.critic)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: term.detach() for name, term in terms.items()}

    def generator_loss(self, batch: CriticBatch, fake: Tensor) -> Tensor:
        """The loss of generated patches (b, n, p); its gradient goes to them, not to the critic's weights."""
        # frozen, so that no gradient of the critic is made or synchronised
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        with parametrize.cached():
            return self.loss.generator_loss(critic, batch, fake)


class AdversarialTrainer:
    """A generator and a critic of one configuration, and their optimizers.

    Args:
        model: the configuration of both.
        loss: the objective.
        optim: rates and their schedule.
        accelerator: devices, processes and bf16.
        compile: a backend of torch.compile, such as "inductor"; "" compiles nothing.
        checkpointing: whether blocks are recomputed in the backward pass instead of kept.

    Raises:
        ValueError: an unknown loss, penalty, distance or schedule, a method that does not fit, mixed fp16.
    """

    def __init__(
        self,
        model: RopeMMConfig,
        loss: GANConfig,
        optim: AdversarialOptim,
        accelerator: Accelerator,
        compile: str = "",
        checkpointing: bool = False,
    ):
        self.accelerator, self.optim, self.compiled = accelerator, optim, bool(compile)
        self.schedule, self.gamma_scale = SCHEDULES[optim.schedule], 1.0
        self.transport, self.transport_scale = loss.transport, 1.0
        generator = RopeMMForConditionalGeneration(model)
        critic = make_critic(model, loss, accelerator, compiled=bool(compile), checkpointing=checkpointing)
        objective = AdversarialLoss(
            loss, critic, accelerator, compiled=bool(compile), checkpointing=checkpointing, gather=True
        )
        if not model.tie_word_embeddings:
            generator.lm_head.requires_grad_(False)  # not trained here; processes would wait for its gradient
        settings = accelerator, optim.betas, optim.weight_decay, compile, checkpointing
        self.generator, self.optimizer = prepare_model(generator, *settings)
        self.critic = CriticTrainer(*prepare_model(critic, *settings), objective, accelerator)

    @property
    def unwrapped_generator(self) -> RopeMMForConditionalGeneration:
        """The generator without the wrapper of several processes."""
        return cast(RopeMMForConditionalGeneration, self.accelerator.unwrap_model(self.generator))

    def update_schedules(self, progress: float) -> None:
        """Set rates, beta2 and the factors of gammas and transport for a part, from 0 to 1, of the run."""
        optim, progress = self.optim, min(1.0, progress / self.optim.decay_until)
        beta1, beta2 = optim.betas
        final_beta2 = beta2 if optim.final_beta2 is None else optim.final_beta2
        for optimizer, rate in ((self.optimizer, optim.lr), (self.critic.optimizer, optim.critic_lr)):
            group = optimizer.param_groups[0]
            group["lr"] = rate * self.schedule(1.0, optim.final_lr_ratio, progress)
            group["betas"] = beta1, self.schedule(beta2, final_beta2, progress)
        self.gamma_scale = self.schedule(1.0, optim.final_gamma, progress)
        self.transport_scale = self.schedule(1.0, optim.final_transport, progress)

    def train_step(self, critic_batches: Sequence[Sequence[AdversarialBatch]]) -> dict[str, Tensor]:
        """Steps of the critic and then one of the generator; the losses of the last ones.

        Args:
            critic_batches: for each step of the critic the batches whose gradients accumulate. The generator
                steps by the last ones.
        """
        if not self.compiled:
            critic_batches = [[share_angles(b, self.unwrapped_generator) for b in x] for x in critic_batches]
        *earlier, last = critic_batches
        for batches in earlier:
            self.critic_step(batches, map(self.generate_detached, batches))
        # the graphs of several would be in memory together
        fakes = list(map(self.generate if len(last) == 1 else self.generate_detached, last))
        terms = self.critic_step(last, fakes)
        return terms | self.generator_step(last, fakes)

    def critic_step(self, batches: Sequence[AdversarialBatch], fakes: Iterable[Tensor]) -> dict[str, Tensor]:
        """One step of the critic by the mean loss of batches with fake patches (b, n, p) for each."""
        weight, found = 1 / len(batches), []
        for number, (batch, fake) in enumerate(zip(batches, fakes, strict=True), start=1):
            last = number == len(batches)
            found.append(
                self.critic.step(batch, fake, weight=weight, gamma_scale=self.gamma_scale, last=last)
            )
        return mean_terms(found)

    def generator_step(
        self, batches: Sequence[AdversarialBatch], fakes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One step of the generator by the mean loss of batches.

        Args:
            batches: captions, noise and real patches.
            fakes: generated patches (b, n, p) of each; those without a gradient are generated again.
        """
        found, last = [], len(batches) - 1
        for number, (batch, fake) in enumerate(zip(batches, fakes, strict=True)):
            with no_sync_if(self.accelerator, self.generator, number < last):
                fake = fake if fake.requires_grad else self.generate(batch)
                terms = {"loss/generator": self.critic.generator_loss(batch, fake)}
                total = terms["loss/generator"]
                if self.transport:
                    terms["transport"] = transport_cost(batch.noise, fake)
                    total = total + self.transport * self.transport_scale * terms["transport"]
                self.accelerator.backward(total / len(batches))
            found.append({name: term.detach() for name, term in terms.items()})
        found[-1]["grad_norm/generator"] = grad_norm(self.generator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean_terms(found)

    def generate(self, batch: AdversarialBatch) -> Tensor:
        """Patches (b, n, p) for the batch's captions, from its noise."""
        with self.accelerator.autocast():
            out = self.generator(**batch.inputs(), patches=batch.noise, return_logits=False)
        return batch.insert(out.patches.float())

    @torch.no_grad()
    def generate_detached(self, batch: AdversarialBatch) -> Tensor:
        """The same patches without a gradient."""
        return self.generate(batch)


def share_angles(batch: SharedBatch, model: Any) -> SharedBatch:
    """The batch with the rotary angles of its positions, made once for all passes of both players.

    Args:
        batch: what a critic reads.
        model: of the scheme of both. With a learned Omega each has its own angles, and the batch stays.
    """
    rotary = model.model.rotary
    if rotary.omega_param is not None:
        return batch
    with record_function(ANGLES):
        return replace(batch, angles=rotary.angles(batch.sequences.positions))


def mean_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each term over the batches that have it."""
    names = dict.fromkeys(name for each in terms for name in each)
    return {name: torch.stack([each[name] for each in terms if name in each]).mean() for name in names}
