"""Heads for pictures: how drafts begin, what is lost on what they became, and in how many steps one draws."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.choice import Choice
from rope_mm.models.packing import Times

NEAR = 0.05  # the least part of the way that a flow's loss takes to be left: it divides by its square


@dataclass(frozen=True)
class Head:
    """What the model learns to do with a draft; it predicts the patch itself, whatever the draft.

    `times` (blocks,) tell how far drafts have come when they are read; `weigh` is the weight (m, 1) of each
    patch's squared error at such times, and None leaves the loss to a critic. `steps` are those of drawing.
    """

    times: Times
    weigh: Callable[[Tensor], Tensor] | None
    steps: int
    source: str

    def loss(self, drawn: Tensor, target: Tensor, time: Tensor) -> Tensor:
        """Weighted squared errors of patches (m, p), each the mean of its numbers, summed up."""
        if self.weigh is None:
            raise ValueError("the loss of this head is a critic's, not a distance; see `Rival`")
        return (self.weigh(time) * (drawn.float() - target).square()).mean(1).sum()


def from_noise(blocks: int, generator: torch.Generator) -> Tensor:
    """All drafts begin as nothing but noise."""
    return torch.zeros(blocks)


def anywhere(blocks: int, generator: torch.Generator) -> Tensor:
    """Drafts are anywhere on the way."""
    return torch.rand(blocks, generator=generator)


HEADS = Choice(
    "head",
    {
        "mse": Head(from_noise, torch.ones_like, 1, "the mean of all pictures that fit, in one pass"),
        "flow": Head(
            anywhere,
            lambda time: (1 - time).clamp(min=NEAR) ** -2,
            16,
            "arXiv 2210.02747; ‖v̂ - v‖² of v = x - noise by x̂, arXiv 2511.13720; no time, arXiv 2502.13129",
        ),
        "adversarial": Head(
            from_noise, None, 1, "a critic of the document with what was drawn, arXiv 1406.2661"
        ),
    },
)
