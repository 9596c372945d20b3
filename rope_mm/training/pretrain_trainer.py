"""A step of pretraining on packed documents: text loss, image loss, and a critic where the head has one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from rope_mm.losses import transport_cost
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.training.adversarial_loss import AdversarialLoss, CriticBatch, GANConfig, make_critic
from rope_mm.training.adversarial_trainer import CriticTrainer, share_angles
from rope_mm.training.collator import PackedBatch
from rope_mm.training.config import check_options, option
from rope_mm.training.distributed import grad_norm, no_sync_if, precision, prepare_model, whole
from rope_mm.training.image_heads import IMAGE_HEADS, EnergyConfig, FieldConfig
from rope_mm.training.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class PretrainOptim:
    """AdamW; rates rise over the first steps and then follow the schedule to a part of themselves."""

    lr: float = option(2e-3, "learning rate of the model", minimum=0)
    critic_lr: float = option(2e-3, "learning rate of the critic", minimum=0)
    warmup_steps: int = option(100, "over which rates rise from 0", minimum=0)
    schedule: str = option("cosine", "of the rates", choices=SCHEDULES)
    final_lr_ratio: float = option(0.05, "final rates over the first ones", minimum=0)
    betas: tuple[float, float] = option((0.9, 0.99), "of the model's AdamW", minimum=0, below=1)
    critic_betas: tuple[float, float] = option((0.0, 0.99), "of the critic's AdamW", minimum=0, below=1)
    weight_decay: float = option(0.0, "of AdamW", minimum=0)
    max_grad_norm: float = option(1.0, "a longer gradient is clipped to this length; 0: none is", minimum=0)

    def __post_init__(self):
        check_options(self, "optim.")

    @property
    def constant(self) -> bool:
        """Whether rates stay after the first steps, so that the number of steps changes no step."""
        return self.final_lr_ratio == 1


class BatchTotals(NamedTuple):
    """Sums over all processes and micro-batches of a step, by which losses are divided.

    Attributes:
        predicted: text tokens to predict.
        patches: patches to generate.
        documents: documents that have such patches.
    """

    predicted: float
    patches: float
    documents: float


class PretrainTrainer:
    """The model, its optimizer and its losses; `critic` is None where the image head needs none.

    Args:
        model: not yet on its device.
        image_head: a key of IMAGE_HEADS.
        optim: rates and their schedule.
        loss: the objective of the adversarial head.
        accelerator: devices, processes and bf16.
        image_loss_weight: of the image loss, that of the text loss being 1.
        compile: a backend of torch.compile; "" compiles nothing.
        checkpointing: whether blocks are recomputed in the backward pass instead of kept.
        head_settings: of the image head, an `EnergyConfig` or a `FieldConfig`; None: its defaults.

    Raises:
        ValueError: an unknown head, schedule or loss, a penalty's method that does not fit, mixed fp16.
    """

    def __init__(
        self,
        model: RopeMMForConditionalGeneration,
        image_head: str,
        optim: PretrainOptim,
        loss: GANConfig,
        accelerator: Accelerator,
        image_loss_weight: float = 1.0,
        compile: str = "",
        checkpointing: bool = False,
        head_settings: EnergyConfig | FieldConfig | None = None,
    ):
        self.head_settings, self.transport = head_settings, loss.transport
        self.head, self.optim, self.image_loss_weight = IMAGE_HEADS[image_head], optim, image_loss_weight
        self.accelerator, self.schedule = accelerator, SCHEDULES[optim.schedule]
        self.compiled = bool(compile)
        settings: dict[str, Any] = {"compile": compile, "checkpointing": checkpointing}
        settings["weight_decay"] = optim.weight_decay
        critic = None
        if self.head.needs_critic:
            critic = make_critic(
                cast(RopeMMConfig, model.config),
                loss,
                accelerator,
                compiled=bool(compile),
                checkpointing=checkpointing,
            )
        self.model, self.optimizer = prepare_model(model, accelerator, optim.betas, **settings)
        self.critic = None
        if critic is not None:
            objective = AdversarialLoss(
                loss, critic, accelerator, compiled=bool(compile), checkpointing=checkpointing
            )
            prepared = prepare_model(critic, accelerator, optim.critic_betas, **settings)
            self.critic = CriticTrainer(*prepared, objective, accelerator)

    def update_schedules(self, step: int, steps: int) -> None:
        """Set the learning rates of a step.

        Args:
            step: from 0.
            steps: of the whole run.
        """
        factor = min(1.0, (step + 1) / max(self.optim.warmup_steps, 1))
        factor *= self.schedule(1.0, self.optim.final_lr_ratio, step / steps)
        rates = [(self.optimizer, self.optim.lr)]
        rates += [(self.critic.optimizer, self.optim.critic_lr)] if self.critic else []
        for optimizer, rate in rates:
            optimizer.param_groups[0]["lr"] = rate * factor

    def train_step(
        self, batches: Sequence[PackedBatch], totals: BatchTotals, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A step of the critic, and a step of the model; this process's part of the losses.

        The parts of all processes add up to the losses of the step, and so do those of `grad_norm/...` to
        the norms.

        Args:
            batches: what this process reads, micro-batch by micro-batch.
            totals: of all processes.
            generator: random numbers of the critic's penalties.
        """
        if self.critic:
            documents = [self.for_critic(batch, generator) for batch in batches]
            batches = [replace(b, critic_batch=d) for b, d in zip(batches, documents, strict=True)]
        # the graphs of several micro-batches would be in memory together
        outputs = self.forward(batches[0], totals) if len(batches) == 1 else None
        found = self.critic_step(self.critic, batches, outputs, totals) if self.critic else []
        losses = []
        for number, batch in enumerate(batches, start=1):
            with no_sync_if(self.accelerator, self.model, number < len(batches)):
                out = self.forward(batch, totals) if outputs is None else outputs
                terms = self.losses(batch, out, totals)
                total = terms["loss/text"] + self.image_loss_weight * terms["loss/image"]
                self.accelerator.backward(total * self.accelerator.num_processes)  # DDP takes the mean
            losses.append({name: term.detach() for name, term in terms.items()})
        norm = {"grad_norm": self.clip_gradients() / self.accelerator.num_processes}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum_terms(losses) | sum_terms(found) | norm

    def for_critic(self, batch: PackedBatch, generator: torch.Generator | None) -> CriticBatch:
        """What the critic reads of a batch, with random numbers for its penalties."""
        documents = replace(batch.for_critic, generator=generator)
        if self.critic is None or self.compiled:
            return documents
        return share_angles(documents, self.accelerator.unwrap_model(self.critic.critic))

    def clip_gradients(self) -> Tensor:
        """Limit the gradient norm of the model to `max_grad_norm`.

        Returns:
            The norm before.
        """
        if self.optim.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm)
            return whole(cast(Tensor, norm).detach())
        return grad_norm(self.model)

    def critic_step(
        self,
        critic: CriticTrainer,
        batches: Sequence[PackedBatch],
        outputs: Any,
        totals: BatchTotals,
    ) -> list[dict[str, Tensor]]:
        """One step of the critic against what the model generates now; this process's terms by micro-batch.

        Args:
            critic: what learns.
            batches: packed documents.
            outputs: of the model for the only batch, or None for several.
            totals: of all processes.
        """
        found, processes = [], self.accelerator.num_processes
        for number, batch in enumerate(batches, start=1):
            with torch.no_grad():
                out = self.forward(batch, totals) if outputs is None else outputs
            documents = batch.for_critic
            share = documents.count / max(totals.documents, 1)
            terms = critic.step(
                documents,
                documents.insert(out.patches[batch.noisy].detach()),
                weight=share * processes,
                last=number == len(batches),
            )
            norms = {name: term / processes for name, term in terms.items() if name.startswith("grad_norm")}
            found.append({name: term * share for name, term in terms.items()} | norms)
        return found

    def forward(self, batch: PackedBatch, totals: BatchTotals) -> Any:
        """The model's output for a batch, its patches in float32."""
        with precision(self.accelerator):
            count = max(totals.predicted, 1)
            out = self.model(**batch.inputs(), labels=batch.labels, num_items_in_batch=count)
        out.patches = out.patches.float()
        return out

    def losses(self, batch: PackedBatch, out: Any, totals: BatchTotals) -> dict[str, Tensor]:
        """A batch's part of the text loss and of the image loss.

        Args:
            batch: what the model has read.
            out: the model's output for it.
            totals: of all processes, by which sums are divided.
        """
        generated = out.patches[batch.noisy]
        if self.critic is None:
            image_loss = self.head.loss(generated, batch, self.head_settings) / max(totals.patches, 1)
        else:
            documents = batch.for_critic
            share = documents.count / max(totals.documents, 1)
            image_loss = self.critic.generator_loss(documents, documents.insert(generated)) * share
            if self.transport and len(generated):
                cost = transport_cost(batch.noise, generated) * len(generated) / totals.patches
                image_loss = image_loss + self.transport * cost
        return {"loss/text": out.loss, "loss/image": image_loss}


def sum_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of each term over the batches that have it."""
    names = dict.fromkeys(name for each in terms for name in each)
    return {name: torch.stack([each[name] for each in terms if name in each]).sum() for name in names}
