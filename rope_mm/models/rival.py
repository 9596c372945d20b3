"""The critic beside a model in pretraining: it reads documents with true or with drawn patches."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rope_mm.losses import DISTANCES, GAN_LOSSES, PENALTIES, input_gradients, twice_differentiable
from rope_mm.models.duel import Objective
from rope_mm.models.packing import Whole


class Rival:
    """A critic, its optimiser, and the loss that it and a model play for.

    `share` is this process's part of all documents, times the number of processes: what makes the mean over
    processes that of the documents.

    Raises:
        ValueError: an unknown loss, penalty or distance.
    """

    def __init__(
        self,
        critic: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        accelerator: Accelerator,
    ):
        self.critic, self.optimizer, self.accelerator = critic, optimizer, accelerator
        self.loss, self.distance = GAN_LOSSES[objective.name], DISTANCES[objective.distance]
        self.strength = objective.strength
        penalties = [(name, PENALTIES[name], gamma) for name, gamma in objective.penalties.items()]
        self.penalties = [penalty for penalty in penalties if penalty[-1]]

    def update(self, whole: Whole, drawn: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """One step of the critic against drawn patches (m, p); its loss, penalties and mean scores."""
        fake = whole.patches.masked_scatter(whole.drawn[..., None], drawn)
        pair = torch.cat([whole.patches, fake]).requires_grad_(bool(self.penalties))
        there, game = (torch.cat([mask, mask])[..., None] for mask in (whole.there, whole.drawn))
        with twice_differentiable() if self.penalties else nullcontext():
            inputs = whole.sequences.twice().inputs()
            scores = self.critic(**inputs, patches=pair[there[..., 0]]).float()
        real_scores, fake_scores = scores.chunk(2)
        extra = (self.distance(whole.patches, fake), self.strength) if self.loss.needs_distance else ()
        terms = {"critic": self.loss.critic(real_scores, fake_scores, *extra)}
        total = terms["critic"]
        if self.penalties:
            gradients = (input_gradients(scores, pair) * game).chunk(2)  # pictures only read are no move
            for name, penalty, gamma in self.penalties:
                terms[name] = penalty(*gradients)
                total = total + gamma * terms[name]
        self.optimizer.zero_grad()
        self.accelerator.backward(total * share)
        self.optimizer.step()
        return terms | {"real": real_scores.mean(), "fake": fake_scores.mean()}

    def judge(self, whole: Whole, drawn: Tensor) -> Tensor:
        """The loss of the model for drawn patches (m, p), with a gradient to them alone."""
        fake = whole.patches.masked_scatter(whole.drawn[..., None], drawn)
        inputs = whole.sequences.inputs()
        with self.resting() as critic:
            scores = critic(**inputs, patches=fake[whole.there]).float()
            real_scores = scores  # a loss that is not relativistic does not look at them
            if self.loss.relativistic:
                with torch.no_grad():
                    real_scores = critic(**inputs, patches=whole.patches[whole.there]).float()
        return self.loss.generator(real_scores, scores)

    @contextmanager
    def resting(self) -> Iterator[nn.Module]:
        """The critic while no gradient of its weights is wanted, so none is made nor synchronised."""
        critic = self.accelerator.unwrap_model(self.critic).requires_grad_(False)
        yield critic
        critic.requires_grad_(True)
