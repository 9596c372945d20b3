"""Exams of drawn images by a judge that learned from real ones: what a caption asks, or stacked digits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rope_mm.evaluation.metrics import NEIGHBOURS, conditional_accuracy, frechet, mode_statistics, prdc
from rope_mm.registry import Registry

STACKS = 4_000  # whose digits teach the judge
EPOCHS = 10


class ImageEvaluator(Protocol):
    """An exam: which held-out captions to draw, marks of those pictures, and those of real ones."""

    @property
    def rows(self) -> list[int]:
        """Held-out rows whose captions are to be drawn."""
        ...

    @property
    def real_reference(self) -> dict[str, float]:
        """What real pictures score."""
        ...

    def evaluate(self, pictures: Tensor) -> dict[str, float]:
        """Marks of pictures (n, ch, y, x), drawn for the captions of `rows`."""
        ...


class FeatureClassifier(nn.Module):
    """A small classifier of images; `features` (n, 64) are what its last layer reads."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_classifier(
    images: Tensor, labels: Tensor, seed: int, epochs: int = 60, batch: int = 64
) -> FeatureClassifier:
    """A judge trained on real images (n, ch, y, x) and labels (n,); the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = FeatureClassifier(images[0].numel(), int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (-(-len(images) // batch)))
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch):
                optimizer.zero_grad()
                cross_entropy(judge(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return judge.eval()


def distribution_metrics(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage of features (n, f) and (m, f)."""
    return {"frechet": frechet(fake, real)} | prdc(real, fake)


@dataclass(frozen=True)
class CaptionEvaluator:
    """What drawn pictures are judged by: a judge, features of held-out reals, which of them to draw again.

    `real_reference` is what real training images score, and the classifier's accuracy on held-out ones.
    """

    judge: FeatureClassifier
    real: Tensor
    rows: list[int]
    labels: Tensor
    real_reference: dict[str, float]

    @torch.no_grad()
    def evaluate(self, pictures: Tensor) -> dict[str, float]:
        """Marks of pictures (n, ch, y, x), drawn for the labels (n,) in order.

        The share recognised as asked, the same for the worst label, and how close their features come.
        """
        pictures = pictures.clamp(-1, 1)
        features = self.judge.features(pictures)
        found = self.judge.head(features).argmax(1)
        return conditional_accuracy(found, self.labels) | distribution_metrics(self.real, features)


def prepare_captions(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], pictures: int, seed: int
) -> CaptionEvaluator:
    """An exam for that many pictures, from images and labels of real training and held-out data.

    Picture i is to show what held-out image rows[i] shows.

    Raises:
        ValueError: too few pictures or held-out images to have neighbours.
    """
    images, labels = test
    if min(len(images), pictures) <= NEIGHBOURS:
        raise ValueError(
            f"an exam needs more than {NEIGHBOURS} pictures and as many held-out images, "
            f"not {pictures} and {len(images)}"
        )
    judge = train_classifier(*train, seed)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        real, other = judge.features(images), judge.features(train[0][order[:pictures]])
        right = conditional_accuracy(judge(images).argmax(1), labels)["recognised"]
    floor = {"recognised": right} | distribution_metrics(real, other)
    rows = torch.arange(pictures) % len(labels)
    return CaptionEvaluator(judge, real, rows.tolist(), labels[rows], floor)


def digits_of(numbers: Tensor) -> Tensor:
    """The digits (n, 3) of numbers (n,) below 1000, hundreds first."""
    return numbers[:, None] // torch.tensor([100, 10, 1]) % 10


def mode_probs(numbers: Tensor) -> Tensor:
    """Probabilities (1000,) of numbers whose digits are independent, each as frequent as among these (n,)."""
    hundreds, tens, ones = (digits.bincount(minlength=10).double() for digits in digits_of(numbers).T)
    law = hundreds[:, None, None] * tens[:, None] * ones
    return law.flatten() / law.sum()


def mode_metrics(numbers: Tensor, law: Tensor) -> dict[str, float]:
    """Of `mode_statistics` what is marked: modes hit, modes with a tenth of their share, KL to the law."""
    spread = mode_statistics(numbers, law)
    return {name: spread[name] for name in ("modes", "held", "kl")}


@dataclass(frozen=True)
class ModeCoverageEvaluator:
    """Counts the modes of stacked digits: a judge of single digits reads each channel by itself.

    `real_reference` holds the metrics of as many real training stacks, if there are as many, and the
    share of held-out ones that the classifier reads rightly. With labels (n,), images are also compared
    with what was asked.
    """

    judge: FeatureClassifier
    law: Tensor
    rows: list[int]
    labels: Tensor | None
    real_reference: dict[str, float]

    def evaluate(self, pictures: Tensor) -> dict[str, float]:
        """Modes and KL to the data's law, the KL less that of real stacks; the share that is as asked."""
        numbers = read_numbers(self.judge, pictures)
        marks = mode_metrics(numbers, self.law)
        marks["kl_excess"] = marks["kl"] - self.real_reference["kl"]
        if self.labels is not None:
            marks["recognised"] = conditional_accuracy(numbers, self.labels)["recognised"]
        return marks


@torch.no_grad()
def read_numbers(judge: FeatureClassifier, pictures: Tensor) -> Tensor:
    """Numbers (n,) in pictures (n, 3, y, x): a judge of single digits reads hundreds, tens, ones in turn."""
    parts = (judge(part.clamp(-1, 1).flatten(0, 1)[:, None]).argmax(1) for part in pictures.split(1_000))
    return torch.cat([part.view(-1, 3) for part in parts]) @ torch.tensor([100, 10, 1])


def prepare_modes(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    pictures: int,
    seed: int,
    captioned: bool = False,
) -> ModeCoverageEvaluator:
    """An exam for that many pictures of stacked digits; `captioned`, every number is asked equally often.

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
    singles = images[:STACKS].flatten(0, 1)[:, None]
    judge = train_classifier(singles, digits_of(numbers[:STACKS]).flatten(), seed, EPOCHS)
    law = mode_probs(numbers)
    right = conditional_accuracy(read_numbers(judge, unseen), held_out)["recognised"]
    floor = mode_metrics(read_numbers(judge, images[:pictures]), law) | {"recognised": right}
    first = {number: row for row, number in reversed(list(enumerate(held_out.tolist())))}
    asked = [first[number] for number in sorted(first)]
    rows = [asked[i % len(asked)] for i in range(pictures)]
    return ModeCoverageEvaluator(judge, law, rows, held_out[rows] if captioned else None, floor)


IMAGE_EVALUATORS = Registry[Callable[..., ImageEvaluator]](
    "exam",
    {
        "caption": prepare_captions,
        "modes": prepare_modes,
        "captioned-modes": partial(prepare_modes, captioned=True),
    },
)
