"""The critic beside a model in pretraining: it reads documents with true or with drawn patches."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.losses import DISTANCES, GAN_LOSSES
from rope_mm.models.objective import Anchors, Judged, Objective, Penalties, is_smooth
from rope_mm.models.packing import Whole
from rope_mm.run.prepare import precision, sharded


class Rival:
    """A critic that has second derivatives, its optimiser, and the loss that it and a model play for.

    Raises:
        ValueError: an unknown loss, penalty or distance.
    """

    def __init__(
        self,
        critic: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        accelerator: Accelerator,
        compiled: bool = False,
        checkpointing: bool = False,
    ):
        self.critic, self.optimizer, self.accelerator = critic, optimizer, accelerator
        self.loss, self.distance = GAN_LOSSES[objective.name], DISTANCES[objective.distance]
        self.strength = objective.strength
        twice = is_smooth(accelerator.unwrap_model(critic), compiled, sharded(accelerator))
        self.penalties, self.anchors = Penalties(objective, twice, checkpointing), Anchors()
        accelerator.register_for_checkpointing(self.anchors)

    def score(self, critic: nn.Module, whole: Whole, patches: Tensor) -> Tensor:
        """Scores (r,) of the documents with drawn ones among their patches (r, n, p), or of all twice.

        Patches that are padding or only read have no gradient: they are no move of the model's.
        """
        order = torch.arange(len(patches), device=patches.device) % len(whole.there)
        there, drawn = whole.there[order], whole.drawn[order]
        moves = torch.where(drawn[..., None], patches, patches.detach())
        return critic(**whole.sequences.cycle(len(patches)).inputs(), patches=moves[there]).float()

    def update(
        self,
        whole: Whole,
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
        with self.penalties.attention():
            pair = torch.cat([whole.patches, fake]).requires_grad_(self.penalties.shares)
            with precision(self.accelerator, full=self.penalties.shares):
                scores = critic(pair)
            real_scores, fake_scores = scores.chunk(2)
            extra = (self.distance(whole.patches, fake), self.strength) if self.loss.needs_distance else ()
            terms = {"critic": self.loss.critic(real_scores, fake_scores, *extra)}
            self.anchors.update(*self.means(real_scores, fake_scores, share))
            judged = Judged(critic, critic, whole.patches, fake, real_scores, fake_scores, probes)
            with precision(self.accelerator, full=True):
                terms |= self.penalties(judged, pair, scores, self.anchors)
            total = terms["critic"]
            for name, gamma in self.penalties.gammas.items():
                total = total + gamma * terms[name]
            self.accelerator.backward(total * share)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return terms | {"real": real_scores.mean(), "fake": fake_scores.mean()}

    def judge(self, whole: Whole, drawn: Tensor) -> Tensor:
        """The loss of the model for drawn patches (m, p), with a gradient to them alone."""
        # no gradient of the critic's weights is wanted, so none is made nor synchronised, in the backward too
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        fake = whole.patches.masked_scatter(whole.drawn[..., None], drawn)
        with precision(self.accelerator):
            scores = self.score(critic, whole, fake)
            real_scores = scores  # a loss that is not relativistic does not look at them
            if self.loss.relativistic:
                with torch.no_grad():
                    real_scores = self.score(critic, whole, whole.patches)
        return self.loss.generator(real_scores, scores)

    def means(self, real_scores: Tensor, fake_scores: Tensor, share: float) -> Tensor:
        """The mean scores (2,) of all processes' documents."""
        means = torch.stack([real_scores.detach().mean(), fake_scores.detach().mean()])
        if self.accelerator.num_processes == 1:
            return means
        parts = torch.cat([means * share, torch.full_like(means[:1], share)])
        *sums, all_parts = cast(Tensor, self.accelerator.reduce(parts, "sum"))
        return torch.stack(sums) / all_parts.clamp(min=1e-9)
