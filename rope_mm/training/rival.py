"""The critic beside a model in pretraining: it reads documents with true or with drawn patches."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.training.contest import AdversarialLoss
from rope_mm.training.gan import GANConfig
from rope_mm.training.packing import CriticInputs


def own(rows: Tensor) -> Tensor:
    """This process's rows alone: shares of documents differ in size, and are weighed."""
    return rows


class CriticTrainer:
    """A critic that has second derivatives, its optimiser, and the loss that it and a model play for.

    Raises:
        ValueError: an unknown loss, penalty or distance.
    """

    def __init__(
        self,
        critic: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: GANConfig,
        accelerator: Accelerator,
        compiled: bool = False,
        checkpointing: bool = False,
    ):
        self.critic, self.optimizer, self.accelerator = critic, optimizer, accelerator
        plain = accelerator.unwrap_model(critic)
        self.contest = AdversarialLoss(objective, plain, accelerator, compiled, checkpointing)

    def score(self, critic: nn.Module, whole: CriticInputs, patches: Tensor) -> Tensor:
        """Scores (r,) of the documents with drawn ones among their patches (r, n, p), or of all twice.

        Patches that are padding or only read have no gradient: they are no move of the model's.
        """
        order = torch.arange(len(patches), device=patches.device) % len(whole.there)
        there, drawn = whole.there[order], whole.drawn[order]
        moves = torch.where(drawn[..., None], patches, patches.detach())
        return critic(**whole.sequences.repeat_rows(len(patches)).inputs(), patches=moves[there]).float()

    def update(
        self,
        whole: CriticInputs,
        drawn: Tensor,
        share: float = 1.0,
        probes: torch.Generator | None = None,
        last: bool = True,
    ) -> dict[str, Tensor]:
        """One step of the critic against drawn patches (m, p); its loss, penalties and mean scores.

        `share` is this process's part of all documents, times the number of processes: what makes the mean
        over processes that of the documents. `probes` draws what some penalties need. Gradients add up until
        the `last` update of a step.
        """
        self.accelerator.unwrap_model(self.critic).requires_grad_(True)
        fake = whole.patches.masked_scatter(whole.drawn[..., None], drawn)
        critic = lambda patches: self.score(self.critic, whole, patches)  # noqa: E731
        with self.contest.penalties.attention():
            means = lambda real, fakes: self.means(real, fakes, share)  # noqa: E731
            total, terms = self.contest.of_critic(critic, critic, whole.patches, fake, probes, own, means)
            self.accelerator.backward(total * share)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return terms

    def judge(self, whole: CriticInputs, drawn: Tensor) -> Tensor:
        """The loss of the model for drawn patches (m, p), with a gradient to them alone."""
        # no gradient of the critic's weights is wanted, so none is made nor synchronised, in the backward too
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        fake = whole.patches.masked_scatter(whole.drawn[..., None], drawn)
        score = lambda patches: self.score(critic, whole, patches)  # noqa: E731
        return self.contest.of_model(score, whole.patches, fake, own)

    def means(self, real_scores: Tensor, fake_scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The two mean scores of all processes' documents."""
        means = torch.stack([real_scores.detach().mean(), fake_scores.detach().mean()])
        if self.accelerator.num_processes == 1:
            return means[0], means[1]
        parts = torch.cat([means * share, torch.full_like(means[:1], share)])
        *sums, all_parts = cast(Tensor, self.accelerator.reduce(parts, "sum"))
        real, fake = torch.stack(sums) / all_parts.clamp(min=1e-9)
        return real, fake
