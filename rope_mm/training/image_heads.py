"""Image heads: how noisy the copies of images start, the loss of what they become, the steps of sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.registry import Registry
from rope_mm.training.collator import SampleTime


@dataclass(frozen=True)
class ImageHead:
    """What the model learns to make of a noisy copy; it always predicts the patch itself.

    Attributes:
        sample_time: (images, generator) -> (images,), how far copies are from noise, 0, to the patch, 1.
        steps: forward passes of sampling an image.
        source: what it is, and where from.
        needs_critic: whether a critic gives the loss.
    """

    sample_time: SampleTime
    steps: int
    source: str
    needs_critic: bool = False

    def loss(self, generated: Tensor, target: Tensor) -> Tensor:
        """Squared errors of patches (m, p), averaged over each patch and summed over patches.

        Raises:
            ValueError: a head whose loss is a critic's.
        """
        if self.needs_critic:
            raise ValueError("the loss of this head is a critic's, not a distance; see `CriticTrainer`")
        return (generated.float() - target).square().mean(1).sum()


def from_noise(images: int, generator: torch.Generator) -> Tensor:
    """Times (images,) of 0: all copies are nothing but noise."""
    return torch.zeros(images)


def near_noise(images: int, generator: torch.Generator) -> Tensor:
    """Times (images,) anywhere from 0 to 1, half of them below an eighth.

    Only there the model has to read the text: later the noisy copy itself shows what it becomes, as its many
    pixels agree. For the same reason errors are not divided by (1 - time)²: that would weigh the last details
    most.
    """
    return torch.rand(images, generator=generator) ** 3


IMAGE_HEADS = Registry(
    "image head",
    {
        "mse": ImageHead(from_noise, 1, "the mean of all images that fit the text, in one pass"),
        "flow": ImageHead(
            near_noise,
            8,
            "flow matching, arXiv 2210.02747; loss on the image, 2511.13720; time not given, 2502.13129",
        ),
        "adversarial": ImageHead(
            from_noise,
            1,
            "a critic of the document with the generated images, arXiv 1406.2661",
            needs_critic=True,
        ),
    },
)
