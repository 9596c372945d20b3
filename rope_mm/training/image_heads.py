"""Image heads: how noisy the copies of images start, the loss of what they become, the steps of sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.losses import energy_distance, energy_score, follow_field
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


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """The fields that generated images follow, of the drift and wflow heads."""

    widths: list[float] = option(
        [], "of the kernels, over the mean distance of images; empty: those of the head", above=0
    )
    iterations: int = option(10, "of Sinkhorn's algorithm, of wflow", minimum=1)

    def __post_init__(self):
        check_options(self, "field.")


def squared_error(generated: Tensor, batch: PackedBatch, settings: Any) -> Tensor:
    """Squared errors of patches (m, p), averaged over each patch and summed over patches."""
    return (generated.float() - batch.target).square().mean(1).sum()


def image_sizes(batch: PackedBatch) -> list[int]:
    """How many patches each image or frame to generate has."""
    return batch.image[batch.sample == 0].bincount().tolist()


def image_vectors(patches: Tensor, batch: PackedBatch, sample: int) -> Tensor:
    """The images (n, d) of a sample among patches (m, p), with zeros after the shorter ones."""
    return pad_sequence(list(patches[batch.sample == sample].split(image_sizes(batch))), True).flatten(1)


def image_energy(generated: Tensor, batch: PackedBatch, settings: EnergyConfig | None = None) -> Tensor:
    """The energy score of each image's samples, its distances over sqrt(d), summed over patches (m, p).

    An image or frame is one vector, whose zeros at the end add to no distance: of patches by themselves only
    their own laws would be learned, and not what they have to do with one another.
    """
    if not len(generated):
        return generated.sum()
    settings, count = settings or EnergyConfig(), int(batch.sample.max()) + 1
    samples = torch.stack([image_vectors(generated.float(), batch, sample) for sample in range(count)])
    targets = image_vectors(batch.target, batch, 0)
    score = energy_score(samples, targets, settings.exponent, settings.repulsion)
    patches = score.new_tensor(image_sizes(batch))
    side = (patches * generated.shape[1]).sqrt()
    return (score / side**settings.exponent * patches * count).sum()


def follow_images(
    generated: Tensor, batch: PackedBatch, settings: FieldConfig | None = None, *, field: str
) -> Tensor:
    """The loss of images that follow a field towards the real images of their condition, summed over patches.

    Each sample of the images of a condition follows the field of the real ones and of its other samples; an
    image that is alone in its condition has no part. The value is the energy distance of generated and real
    images over sqrt(d), which falls towards 0. The gradient is that of `follow_field`, times its scale, over
    the d numbers of an image, so that it has the same size for all conditions.

    Args:
        generated: patches (m, p).
        batch: packed with `conditions`.
        settings: widths and iterations.
        field: a key of FIELD_HEADS.

    Raises:
        ValueError: a batch packed without conditions; widths at which the field is zero for all images.
    """
    if batch.condition is None:
        raise ValueError("a field needs images of one condition; pack them by Packer(..., conditions=True)")
    if not len(generated):
        return generated.sum()
    sizes, count = image_sizes(batch), int(batch.sample.max()) + 1
    samples = [image_vectors(generated.float(), batch, sample) for sample in range(count)]
    targets, total = image_vectors(batch.target, batch, 0), generated.float().sum() * 0
    settings, seen = settings or FieldConfig(), []
    widths = settings.widths or FIELD_HEADS[field].widths
    options = {name: getattr(settings, name) for name in FIELD_HEADS[field].options}
    for number in batch.condition[~batch.alone].unique():
        rows = (batch.condition == number).nonzero()[:, 0]
        patches = sizes[int(rows[0])]
        numbers = patches * generated.shape[1]
        near, real = [sample[rows, :numbers] for sample in samples], targets[rows, :numbers]
        for mine in range(count):
            others = torch.cat(near[:mine] + near[mine + 1 :]).detach()
            followed = follow_field(near[mine], real, others, field, widths, allow_zero=True, **options)
            value = energy_distance(near[mine].detach(), others, real) / numbers**0.5
            gradient = followed.loss * followed.scale / numbers
            total = total + (value + gradient - gradient.detach()) * patches * len(rows)
            seen.append((followed.size, value))
    if seen and all(float(size) == 0 and float(value) > EQUAL for size, value in seen):
        raise ValueError(
            f"the {field} field is zero at field.widths {widths} for all images of a batch, which are far "
            "from real ones; give wider ones"
        )
    return total


EQUAL = 1e-4  # energy distance over sqrt(d) of images that are as good as equal


@dataclass(frozen=True)
class FieldHead:
    """What a head that follows a field takes for it.

    Attributes:
        source: what it is, and where from.
        widths: of the kernels, where none are given.
        options: fields of `FieldConfig` that this field alone reads.
    """

    source: str
    widths: Sequence[float]
    options: Sequence[str] = ()


FIELD_HEADS = {
    "drift": FieldHead("images drift to real ones of their text, arXiv 2602.04770", [0.02, 0.05, 0.2]),
    "wflow": FieldHead(
        "images flow to real ones of their text by Sinkhorn plans, arXiv 2605.11755", [0.01], ["iterations"]
    ),
}


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
        settings: the key of the configuration that this kind of head alone reads; "" where there is none.
        conditions: whether the loss compares images of one condition.
    """

    timing: Callable[[FlowConfig], SampleTime]
    steps: int
    source: str
    distance: Callable[[Tensor, PackedBatch, Any], Tensor] | None = squared_error
    samples: int = 1
    settings: str = ""
    conditions: bool = False

    @property
    def sample_time(self) -> SampleTime:
        """The times of default settings."""
        return self.timing(FlowConfig())

    @property
    def needs_critic(self) -> bool:
        """Whether a critic gives the loss."""
        return self.distance is None

    def loss(self, generated: Tensor, batch: PackedBatch, settings: Any = None) -> Tensor:
        """The loss, summed over patches.

        Args:
            generated: patches (m, p) that the model makes of the batch's noisy copies.
            batch: with the target of each.
            settings: of the head, as `settings` names them; None: its defaults.

        Raises:
            ValueError: a head whose loss is a critic's.
        """
        if self.distance is None:
            raise ValueError("the loss of this head is a critic's, not a distance; see `CriticTrainer`")
        return self.distance(generated, batch, settings)


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
        **{
            field: ImageHead(
                all_noise,
                1,
                head.source,
                partial(follow_images, field=field),
                samples=2,
                settings="field",
                conditions=True,
            )
            for field, head in FIELD_HEADS.items()
        },
    },
)


def check_company(image_head: str, images: int, alone: int) -> None:
    """Refuse a first step most of whose images have no others of their text to be compared with.

    Args:
        image_head: a key of IMAGE_HEADS.
        images: of all processes.
        alone: how many of them are the only ones of their text.
    """
    if 2 * alone > images:
        raise ValueError(
            f"{alone} of {images} images or frames of the first step are the only ones of their text in "
            f"their batch, and the {image_head} head compares those of one text; group rows by the column "
            "that makes the text, as by data.group_by label, with one text for each of its values, or take "
            "another image_head"
        )


def unread_settings(image_head: str) -> dict[str, str]:
    """The keys of other image heads, which this one does not read, with the reason.

    Args:
        image_head: a key of IMAGE_HEADS.
    """
    others = {name: field for name, field in FIELD_HEADS.items() if name != image_head}
    keys = {f"field.{option}": name for name, field in others.items() for option in field.options}
    keys = {key: f"image_head is {image_head}, not {name}" for key, name in keys.items()}
    own = IMAGE_HEADS[image_head].settings
    for name in sorted({head.settings for head in IMAGE_HEADS.values()} - {"", own}):
        readers = [other for other, head in IMAGE_HEADS.items() if head.settings == name]
        keys[name] = f"image_head is {image_head}, not {' or '.join(readers)}"
    return keys
