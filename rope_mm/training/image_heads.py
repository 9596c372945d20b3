"""Heads for pictures: how drafts begin, what is lost on what they became, and in how many steps one draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.registry import Registry
from rope_mm.training.packing import SampleTime


@dataclass(frozen=True)
class ImageHead:
    """What the model learns to do with a draft; it predicts the patch itself, whatever the draft.

    `times` (blocks,) tell how far drafts have come when they are read, `steps` are those of drawing;
    `critical` heads leave the loss to a critic.
    """

    times: SampleTime
    steps: int
    source: str
    critical: bool = False

    def loss(self, drawn: Tensor, target: Tensor) -> Tensor:
        """Squared errors of patches (m, p), each the mean of its numbers, summed up."""
        if self.critical:
            raise ValueError("the loss of this head is a critic's, not a distance; see `CriticTrainer`")
        return (drawn.float() - target).square().mean(1).sum()


def from_noise(blocks: int, generator: torch.Generator) -> Tensor:
    """All drafts begin as nothing but noise."""
    return torch.zeros(blocks)


def near_noise(blocks: int, generator: torch.Generator) -> Tensor:
    """Drafts are anywhere on the way, half of them in its first eighth.

    Only there must words be read: later the draft itself tells what it becomes, as its many pixels agree.
    For the same reason errors are not divided by (1 - time)²: that would weigh the last details most.
    """
    return torch.rand(blocks, generator=generator) ** 3


IMAGE_HEADS = Registry(
    "head",
    {
        "mse": ImageHead(from_noise, 1, "the mean of all pictures that fit, in one pass"),
        "flow": ImageHead(
            near_noise, 8, "arXiv 2210.02747; ‖x̂ - x‖² by x̂, arXiv 2511.13720; no time, arXiv 2502.13129"
        ),
        "adversarial": ImageHead(
            from_noise, 1, "a critic of the document with what was drawn, arXiv 1406.2661", critical=True
        ),
    },
)
