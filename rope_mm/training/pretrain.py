"""A model that learns from packs to write and to draw, and the critic beside it where the head has one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.modeling_rope_mm import RopeMMCritic, RopeMMForConditionalGeneration
from rope_mm.training.gan import GANConfig
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.packing import PackedBatch
from rope_mm.training.prepare import precision, prepare_model
from rope_mm.training.rival import CriticTrainer
from rope_mm.training.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class PretrainOptim:
    """AdamW; rates rise over `warm_up` steps and go along the schedule to `final` of themselves."""

    lr: float = 2e-3
    critic_lr: float = 2e-3
    warm_up: int = 100
    schedule: str = "cosine"
    final: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    critic_betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0  # the longest gradient; 0 for any


class BatchTotals(NamedTuple):
    """What a step has of all processes: words to predict, patches to draw, documents with some."""

    words: float
    patches: float
    documents: float


class PretrainTrainer:
    """The model, its optimiser and what it loses; `rival` is None where the head needs no critic.

    Raises:
        ValueError: an unknown head, schedule or loss, a penalty's method that does not fit, mixed fp16.
    """

    def __init__(
        self,
        model: RopeMMForConditionalGeneration,
        head: str,
        optim: PretrainOptim,
        objective: GANConfig,
        accelerator: Accelerator,
        picture_weight: float = 1.0,
        compile: str = "",
        checkpointing: bool = False,
    ):
        self.name, self.head, self.optim, self.weight = head, IMAGE_HEADS[head], optim, picture_weight
        self.accelerator, self.schedule = accelerator, SCHEDULES[optim.schedule]
        how: dict[str, Any] = {
            "weight_decay": optim.weight_decay,
            "compile": compile,
            "checkpointing": checkpointing,
        }
        critic = RopeMMCritic(cast(RopeMMConfig, model.config)) if self.head.critical else None
        self.model, self.optimizer = prepare_model(model, accelerator, optim.betas, **how)
        self.rival = None
        if critic is not None:
            players = prepare_model(critic, accelerator, optim.critic_betas, **how)
            self.rival = CriticTrainer(*players, objective, accelerator, bool(compile), checkpointing)

    def set_rates(self, step: int, steps: int) -> None:
        """The learning rates of a step."""
        factor = min(1.0, (step + 1) / max(self.optim.warm_up, 1))
        factor *= self.schedule(1.0, self.optim.final, step / steps)
        rates = [(self.optimizer, self.optim.lr)]
        rates += [(self.rival.optimizer, self.optim.critic_lr)] if self.rival else []
        for optimizer, rate in rates:
            optimizer.param_groups[0]["lr"] = rate * factor

    def learn(
        self, packs: Sequence[PackedBatch], totals: BatchTotals, probes: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """An update of the critic, and of the model, by packs one after another; this process's part of it.

        The parts of all processes add up to the losses of the step.
        """
        # of several, the graphs would lie in memory together
        kept = self.read(packs[0], totals) if len(packs) == 1 else None
        seen = [] if self.rival is None else self.challenge(self.rival, packs, kept, totals, probes)
        lost = []
        for number, pack in enumerate(packs, start=1):
            with self.alone(self.model, number < len(packs)):
                terms = self.terms(pack, self.read(pack, totals) if kept is None else kept, totals)
                total = terms["words"] + self.weight * terms[self.name]
                self.accelerator.backward(total * self.accelerator.num_processes)  # DDP takes the mean
            lost.append({name: term.detach() for name, term in terms.items()})
        if self.optim.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return add_up(lost) | add_up(seen)

    def challenge(
        self,
        rival: CriticTrainer,
        packs: Sequence[PackedBatch],
        kept: Any,
        totals: BatchTotals,
        probes: torch.Generator | None,
    ) -> list[dict[str, Tensor]]:
        """The critic's update against what the model draws now."""
        seen = []
        for number, pack in enumerate(packs, start=1):
            with torch.no_grad():
                out = self.read(pack, totals) if kept is None else kept
            whole, part = pack.critical, pack.critical.count / max(totals.documents, 1)
            with self.alone(rival.critic, last := number < len(packs)):
                drawn = out.patches[pack.draft].detach()
                found = rival.update(whole, drawn, part * self.accelerator.num_processes, probes, not last)
            seen.append({name: term.detach() * part for name, term in found.items()})
        return seen

    def read(self, pack: PackedBatch, totals: BatchTotals) -> Any:
        """What the model makes of a pack."""
        with precision(self.accelerator):
            words = max(totals.words, 1)
            out = self.model(**pack.inputs(), labels=pack.labels, num_items_in_batch=words)
        out.patches = out.patches.float()
        return out

    def terms(self, pack: PackedBatch, out: Any, totals: BatchTotals) -> dict[str, Tensor]:
        """A pack's part of the losses of words and of pictures."""
        drawn = out.patches[pack.draft]
        if self.rival is None:
            pictures = self.head.loss(drawn, pack.target) / max(totals.patches, 1)
        else:
            part = pack.critical.count / max(totals.documents, 1)
            pictures = self.rival.judge(pack.critical, drawn) * part
        return {"words": out.loss, self.name: pictures}

    def alone(self, model: nn.Module, wanted: bool) -> AbstractContextManager:
        """Context in which gradients add up in this process, and do not yet go to the others."""
        return self.accelerator.no_sync(model) if wanted else nullcontext()


def add_up(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    return {name: torch.stack([each[name] for each in terms]).sum(0) for name in (terms[0] if terms else ())}
