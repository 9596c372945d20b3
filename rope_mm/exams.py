"""What drawn pictures are judged by: one digit of a caption, or the thousand numbers of stacked digits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rope_mm.choice import Choice
from rope_mm.exam import Judge, prepare_exam, train_judge
from rope_mm.metrics import mode_statistics, recognition

STACKS = 4_000  # whose digits teach the judge
EPOCHS = 10


class Marking(Protocol):
    """An exam: which held-out captions to draw, marks of those pictures, and those of real ones."""

    @property
    def rows(self) -> list[int]:
        """Held-out rows whose captions are to be drawn."""
        ...

    @property
    def floor(self) -> dict[str, float]:
        """What real pictures score."""
        ...

    def mark(self, pictures: Tensor) -> dict[str, float]:
        """Marks of pictures (n, ch, y, x), drawn for the captions of `rows`."""
        ...


def digits_of(numbers: Tensor) -> Tensor:
    """The digits (n, 3) of numbers (n,) below 1000, hundreds first."""
    return numbers[:, None] // torch.tensor([100, 10, 1]) % 10


def law_of(numbers: Tensor) -> Tensor:
    """Probabilities (1000,) of numbers whose digits are independent, each as frequent as among these (n,)."""
    hundreds, tens, ones = (digits.bincount(minlength=10).double() for digits in digits_of(numbers).T)
    law = hundreds[:, None, None] * tens[:, None] * ones
    return law.flatten() / law.sum()


def mode_marks(numbers: Tensor, law: Tensor) -> dict[str, float]:
    """Of `mode_statistics` what is marked: modes hit, modes with a tenth of their share, KL to the law."""
    spread = mode_statistics(numbers, law)
    return {name: spread[name] for name in ("modes", "held", "kl")}


@dataclass(frozen=True)
class Modes:
    """Counts the modes of stacked digits: a judge of single digits reads each channel by itself.

    `floor` are the marks of as many real training stacks, if there are as many, and the share of held-out
    ones that the judge reads rightly. With labels (n,), pictures are also compared with what was asked.
    """

    judge: Judge
    law: Tensor
    rows: list[int]
    labels: Tensor | None
    floor: dict[str, float]

    def mark(self, pictures: Tensor) -> dict[str, float]:
        """Modes and KL to the data's law, the KL less that of real stacks; the share that is as asked."""
        numbers = read_numbers(self.judge, pictures)
        marks = mode_marks(numbers, self.law)
        marks["kl_excess"] = marks["kl"] - self.floor["kl"]
        if self.labels is not None:
            marks["recognised"] = recognition(numbers, self.labels)["recognised"]
        return marks


@torch.no_grad()
def read_numbers(judge: Judge, pictures: Tensor) -> Tensor:
    """Numbers (n,) in pictures (n, 3, y, x): a judge of single digits reads hundreds, tens, ones in turn."""
    parts = (judge(part.clamp(-1, 1).flatten(0, 1)[:, None]).argmax(1) for part in pictures.split(1_000))
    return torch.cat([part.view(-1, 3) for part in parts]) @ torch.tensor([100, 10, 1])


def prepare_modes(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    pictures: int,
    seed: int,
    captioned: bool = False,
) -> Modes:
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
    judge = train_judge(singles, digits_of(numbers[:STACKS]).flatten(), seed, EPOCHS)
    law = law_of(numbers)
    right = recognition(read_numbers(judge, unseen), held_out)["recognised"]
    floor = mode_marks(read_numbers(judge, images[:pictures]), law) | {"recognised": right}
    first = {number: row for row, number in reversed(list(enumerate(held_out.tolist())))}
    asked = [first[number] for number in sorted(first)]
    rows = [asked[i % len(asked)] for i in range(pictures)]
    return Modes(judge, law, rows, held_out[rows] if captioned else None, floor)


EXAMS = Choice[Callable[..., Marking]](
    "exam",
    {
        "caption": prepare_exam,
        "modes": prepare_modes,
        "captioned-modes": partial(prepare_modes, captioned=True),
    },
)
