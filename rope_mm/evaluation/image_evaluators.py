"""Evaluators of generated images by a classifier trained on real ones: captions, modes, letters.

The distances are in the 64 features of a small classifier trained on the data itself: they compare runs on
one data set, and are no FID. Other features, Inception's or DINOv2's, go to `metrics.frechet`, `kid`, `prdc`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from rope_mm.data.columns import choose_rows
from rope_mm.data.images import CaptionedImages
from rope_mm.evaluation.distribution import (
    FEATURES,
    MIN_SAMPLES,
    distribution_metrics,
    report_missing,
    report_skipped,
)
from rope_mm.evaluation.fitting import fit
from rope_mm.evaluation.letters import prepare_letters
from rope_mm.evaluation.metrics import conditional_accuracy, mode_statistics
from rope_mm.registry import Registry

CLASSIFIER_SAMPLES = 10_000  # images of each split, at most, that the classifier sees
STACKS = 4_000  # whose digits the classifier learns
EPOCHS = 10  # on the digits of stacks


class ImageEvaluator(Protocol):
    """Which held-out captions to generate, metrics of those images, and those of real ones."""

    @property
    def rows(self) -> list[int]:
        """Held-out rows whose captions are to be generated."""
        ...

    @property
    def real_reference(self) -> dict[str, float]:
        """Metrics of real images."""
        ...

    def evaluate(self, images: Tensor) -> dict[str, float]:
        """Metrics of images (n, ch, y, x) in [-1, 1], generated for the captions of `rows` in order."""
        ...


class FeatureClassifier(nn.Module):
    """A small classifier of images, whose last hidden layer serves as features.

    Args:
        inputs: numbers in an image, ch * y * x.
        classes: how many.
    """

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Features (n, 64) of images (n, ch, y, x)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, ch, y, x)."""
        return self.head(self.body(images))


def train_classifier(
    images: Tensor, labels: Tensor, seed: int, epochs: int = 60, batch: int = 64
) -> FeatureClassifier:
    """A classifier trained on real images; the global random state is left as it was.

    Args:
        images: (n, ch, y, x) in [-1, 1].
        labels: (n,), counted from 0.
        seed: of its weights and of the order of images.
        epochs: how often it sees each image.
        batch: images a step.
    """
    return fit(
        lambda: FeatureClassifier(images[0].numel(), int(labels.max()) + 1),
        lambda classifier, rows: cross_entropy(classifier(images[rows]), labels[rows]),
        len(images),
        seed,
        epochs=epochs,
        batch=batch,
        lr=2e-3,
        schedule=CosineAnnealingLR,
    )


@dataclass(frozen=True)
class CaptionEvaluator:
    """What a classifier finds in images, compared with their captions and with real images.

    Attributes:
        classifier: trained on real images.
        real: features (m, 64) of held-out images.
        rows: held-out rows whose captions are to be generated.
        labels: (n,) of those rows; None without captions.
        real_reference: metrics of real training images, and the classifier's accuracy on held-out ones.
    """

    classifier: FeatureClassifier
    real: Tensor
    rows: list[int]
    labels: Tensor | None
    real_reference: dict[str, float]

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, float]:
        """Metrics of images (n, ch, y, x) in [-1, 1], generated for the labels (n,) in order.

        `samples`, how many there are; `conditional_accuracy` where there are captions, and
        `distribution_metrics`, without those that need more samples.
        """
        features = self.classifier.features(images.clamp(-1, 1))
        metrics: dict[str, float] = {"samples": len(images)}
        if self.labels is not None and len(images) >= MIN_SAMPLES["accuracy"]:
            metrics |= conditional_accuracy(self.classifier.head(features).argmax(1), self.labels)
        return metrics | distribution_metrics(self.real, features)


def prepare_captions(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    samples: int,
    seed: int,
    captioned: bool = True,
) -> CaptionEvaluator:
    """An evaluator of generated images by what their captions ask for.

    Image i is to show what held-out image rows[i] shows. Metrics that need more samples are named in the log.

    Args:
        train: real images (n, ch, y, x) in [-1, 1] and labels (n,).
        test: held-out ones.
        samples: how many images are generated.
        seed: of the classifier and of the real images that are the reference.
        captioned: whether the images are generated for captions; else no accuracy is measured.
    """
    images, labels = test
    report_skipped(samples, len(images), captioned)
    classifier = train_classifier(*train, seed)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        real, other = classifier.features(images), classifier.features(train[0][order[:samples]])
        right = conditional_accuracy(classifier(images).argmax(1), labels)["accuracy"]
    reference = {"accuracy": right} if len(images) >= MIN_SAMPLES["accuracy"] else {}
    report_missing(train[1], labels)
    chosen = torch.tensor(choose_rows(len(labels), samples))
    rows = chosen[torch.arange(samples) % len(chosen)]
    reference |= distribution_metrics(real, other)
    return CaptionEvaluator(classifier, real, rows.tolist(), labels[rows] if captioned else None, reference)


def digits_of(numbers: Tensor) -> Tensor:
    """The digits (n, 3) of numbers (n,) below 1000, hundreds first."""
    return numbers[:, None] // torch.tensor([100, 10, 1]) % 10


def mode_probs(numbers: Tensor) -> Tensor:
    """Probabilities (1000,) of numbers whose digits are independent, each as frequent as among these (n,)."""
    hundreds, tens, ones = (digits.bincount(minlength=10).double() for digits in digits_of(numbers).T)
    probs = hundreds[:, None, None] * tens[:, None] * ones
    return probs.flatten() / probs.sum()


def mode_metrics(numbers: Tensor, probs: Tensor) -> dict[str, float]:
    """Of `mode_statistics`: modes with a sample, modes with a tenth of their share, KL to the data.

    Args:
        numbers: which mode (n,) each image shows.
        probs: of the modes (1000,) in the data.
    """
    found = mode_statistics(numbers, probs)
    return {name: found[name] for name in ("modes", "modes_covered", "kl")}


@dataclass(frozen=True)
class ModeCoverageEvaluator:
    """Counts the modes of stacked digits: a classifier of single digits reads each channel by itself.

    Attributes:
        classifier: of single digits.
        probs: of the modes (1000,) in the data.
        rows: held-out rows whose captions are to be generated.
        labels: (n,) of those rows; None without captions.
        real_reference: metrics of as many real training stacks, if there are as many, and the classifier's
            accuracy on held-out ones.
    """

    classifier: FeatureClassifier
    probs: Tensor
    rows: list[int]
    labels: Tensor | None
    real_reference: dict[str, float]

    def evaluate(self, images: Tensor) -> dict[str, float]:
        """Metrics of images (n, 3, y, x) in [-1, 1].

        `samples`; modes and KL to the data, `kl_excess` over that of real stacks; `accuracy` where there are
        captions and samples enough.
        """
        numbers = read_numbers(self.classifier, images)
        found = {"samples": len(images)} | mode_metrics(numbers, self.probs)
        found["kl_excess"] = found["kl"] - self.real_reference["kl"]
        if self.labels is not None and len(images) >= MIN_SAMPLES["accuracy"]:
            found["accuracy"] = conditional_accuracy(numbers, self.labels)["accuracy"]
        return found


@torch.no_grad()
def read_numbers(classifier: FeatureClassifier, images: Tensor) -> Tensor:
    """Numbers (n,) in images (n, 3, y, x): a classifier of digits reads hundreds, tens and ones in turn."""
    parts = (classifier(part.clamp(-1, 1).flatten(0, 1)[:, None]).argmax(1) for part in images.split(1_000))
    return torch.cat([part.view(-1, 3) for part in parts]) @ torch.tensor([100, 10, 1])


def prepare_modes(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    samples: int,
    seed: int,
    captioned: bool = False,
) -> ModeCoverageEvaluator:
    """An evaluator of generated stacks of digits.

    Args:
        train: real stacks (n, 3, y, x) in [-1, 1] and numbers (n,) below 1000.
        test: held-out ones.
        samples: how many images are generated.
        seed: of the classifier.
        captioned: whether images are generated for captions, every number equally often.

    Raises:
        ValueError: images without three channels, labels above 999.
    """
    (images, numbers), (unseen, held_out) = train, test
    channels, most = images.shape[1], max(int(numbers.max()), int(held_out.max()))
    if channels != 3 or most > 999:
        raise ValueError(
            f"modes are counted in stacks of three digits, 3 channels with labels to 999, not {channels} "
            f"with labels to {most}"
        )
    learned = choose_rows(len(images), STACKS)
    singles = images[learned].flatten(0, 1)[:, None]
    classifier = train_classifier(singles, digits_of(numbers[learned]).flatten(), seed, EPOCHS)
    probs = mode_probs(numbers)
    right = conditional_accuracy(read_numbers(classifier, unseen), held_out)["accuracy"]
    real = images[choose_rows(len(images), samples)]
    reference = mode_metrics(read_numbers(classifier, real), probs) | {"accuracy": right}
    first = {number: row for row, number in reversed(list(enumerate(held_out.tolist())))}
    asked = [first[number] for number in sorted(first)]
    rows = [asked[i % len(asked)] for i in range(samples)]
    return ModeCoverageEvaluator(classifier, probs, rows, held_out[rows] if captioned else None, reference)


@dataclass(frozen=True)
class EvaluatorKind:
    """How an evaluator is made, and whether it asks what captions say.

    Attributes:
        prepare: (training images and labels, held-out ones, samples, seed) -> the evaluator.
        captions: "needed", "optional" or "unread"; where they are optional, `prepare` takes `captioned`.
    """

    prepare: Callable[..., ImageEvaluator]
    captions: Literal["needed", "optional", "unread"]

    def make(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        samples: int,
        seed: int,
        captioned: bool = True,
    ) -> ImageEvaluator:
        """The evaluator.

        Args:
            train: real images (n, ch, y, x) in [-1, 1] and labels (n,).
            test: held-out ones.
            samples: how many images are generated.
            seed: of its classifier.
            captioned: whether the images are generated for captions.
        """
        options = {"captioned": captioned} if self.captions == "optional" else {}
        return self.prepare(train, test, samples, seed, **options)


IMAGE_EVALUATORS = Registry(
    "evaluator",
    {
        "caption": EvaluatorKind(prepare_captions, "optional"),
        "modes": EvaluatorKind(prepare_modes, "unread"),
        "captioned-modes": EvaluatorKind(partial(prepare_modes, captioned=True), "needed"),
        "letters": EvaluatorKind(prepare_letters, "needed"),
    },
)


def make_evaluator(
    name: str, images: CaptionedImages, held_out: CaptionedImages, samples: int, seed: int, captioned: bool
) -> tuple[ImageEvaluator, list[str]]:
    """The evaluator of a source with labels, and the held-out captions to generate images of, in order.

    Args:
        name: a key of IMAGE_EVALUATORS.
        images: to train on.
        held_out: the others.
        samples: how many images are generated.
        seed: of its classifier.
        captioned: whether the images are generated for captions.

    Raises:
        ValueError: images without labels; what the evaluator does not read.
    """
    if images.labels is None or held_out.labels is None:
        raise ValueError("an evaluator needs labels; give the column of labels to load_images(..., label=)")
    most = max(CLASSIFIER_SAMPLES, samples)
    train, rows = images.read(choose_rows(len(images), most))
    test, test_rows = held_out.read(choose_rows(len(held_out), CLASSIFIER_SAMPLES))
    seen, unseen = (train, images.labels[rows]), (test, held_out.labels[test_rows])
    evaluator = IMAGE_EVALUATORS[name].make(seen, unseen, samples, seed, captioned)
    return evaluator, [held_out.captions[test_rows[row]] for row in evaluator.rows]
