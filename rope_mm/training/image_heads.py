"""Image heads: how noisy the copies of images start, the loss of what they become, the steps of sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.losses import energy_score
from rope_mm.registry import Registry
from rope_mm.training.collator import PackedBatch, SampleTime
from rope_mm.training.config import check_options, option


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """The loss of the energy head."""

    exponent: float = option(1.0, "of the distances between images", above=0, below=2)
    repulsion: float = option(
        1.0, "of two samples for one text; below 1 images vary less than real ones", minimum=0, maximum=1
    )

    def __post_init__(self):
        check_options(self, "energy.")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How far the noisy copies of the flow head are from noise, 0, to the image, 1."""

    times: Literal["cubic", "logit-normal"] = option(
        "cubic", "cubic: u³ of a uniform u; logit-normal: the sigmoid of a normal number"
    )
    mean: float = option(-1.3, "of that normal number")
    deviation: float = option(1.0, "of that normal number", above=0)

    def __post_init__(self):
        check_options(self, "flow.")

    @property
    def sample_time(self) -> SampleTime:
        """(images, generator) -> the times (images,)."""
        if self.times == "cubic":
            return near_noise
        return partial(logit_normal, mean=self.mean, deviation=self.deviation)


def squared_error(generated: Tensor, batch: PackedBatch, config: EnergyConfig) -> Tensor:
    """Squared errors of patches (m, p), averaged over each patch and summed over patches."""
    return (generated.float() - batch.target).square().mean(1).sum()


def image_energy(generated: Tensor, batch: PackedBatch, config: EnergyConfig) -> Tensor:
    """The energy score of each image's samples, its distances over sqrt(d), summed over patches (m, p).

    An image or frame is one vector: of patches by themselves only their own laws would be learned, and not
    what they have to do with one another.
    """
    if not len(generated):
        return generated.sum()
    sizes = batch.image[batch.sample == 0].bincount().tolist()

    def vectors(patches: Tensor, sample: int) -> Tensor:
        """The images (n, d) of a sample, with zeros after the shorter ones, which add to no distance."""
        return pad_sequence(list(patches[batch.sample == sample].split(sizes)), True).flatten(1)

    count = int(batch.sample.max()) + 1
    samples = torch.stack([vectors(generated.float(), sample) for sample in range(count)])
    score = energy_score(samples, vectors(batch.target, 0), config.exponent, config.repulsion)
    patches = score.new_tensor(sizes)
    side = (patches * generated.shape[1]).sqrt()
    return (score / side**config.exponent * patches * count).sum()


@dataclass(frozen=True)
class ImageHead:
    """What the model learns to make of a noisy copy; it always predicts the patch itself.

    Attributes:
        timing: of the flow's settings: (images, generator) -> (images,), how far copies are from noise, 0, to
            the patch, 1.
        steps: forward passes of sampling an image.
        source: what it is, and where from.
        distance: (patches (m, p) made of the noisy copies, their batch, settings) -> the loss, summed over
            patches; None where a critic gives it.
        samples: noisy copies of an image that the loss needs at least.
        settings: the key of the configuration that this head alone reads; "" where there is none.
    """

    timing: Callable[[FlowConfig], SampleTime]
    steps: int
    source: str
    distance: Callable[[Tensor, PackedBatch, EnergyConfig], Tensor] | None = squared_error
    samples: int = 1
    settings: str = ""

    @property
    def sample_time(self) -> SampleTime:
        """The times of default settings."""
        return self.timing(FlowConfig())

    @property
    def needs_critic(self) -> bool:
        """Whether a critic gives the loss."""
        return self.distance is None

    def loss(self, generated: Tensor, batch: PackedBatch, config: EnergyConfig) -> Tensor:
        """The loss, summed over patches.

        Args:
            generated: patches (m, p) that the model makes of the batch's noisy copies.
            batch: with the target of each.
            config: of the energy head.

        Raises:
            ValueError: a head whose loss is a critic's.
        """
        if self.distance is None:
            raise ValueError("the loss of this head is a critic's, not a distance; see `CriticTrainer`")
        return self.distance(generated, batch, config)


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


def logit_normal(images: int, generator: torch.Generator, mean: float, deviation: float) -> Tensor:
    """Times (images,), the sigmoids of normal numbers (arXiv 2403.03206, section 3.1)."""
    return torch.randn(images, generator=generator).mul(deviation).add(mean).sigmoid()


def all_noise(flow: FlowConfig) -> SampleTime:
    """The times of heads that always start from noise."""
    return from_noise


IMAGE_HEADS = Registry(
    "image head",
    {
        "mse": ImageHead(all_noise, 1, "the mean of all images that fit the text, in one pass"),
        "flow": ImageHead(
            lambda flow: flow.sample_time,
            8,
            "flow matching, arXiv 2210.02747; loss on the image, 2511.13720; time not given, 2502.13129",
            settings="flow",
        ),
        "adversarial": ImageHead(
            all_noise,
            1,
            "a critic of the document with the generated images, arXiv 1406.2661",
            distance=None,
        ),
        "energy": ImageHead(
            all_noise,
            1,
            "the energy score of two samples for one text, EAR, arXiv 2505.07812",
            image_energy,
            samples=2,
            settings="energy",
        ),
    },
)
