"""An exam of drawn images: a judge, trained on real ones, says what it recognises and how close they come."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rope_mm.metrics import NEIGHBOURS, frechet, prdc, recognition


class Judge(nn.Module):
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


def train_judge(images: Tensor, labels: Tensor, seed: int, epochs: int = 60, batch: int = 64) -> Judge:
    """A judge trained on real images (n, ch, y, x) and labels (n,); the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(images[0].numel(), int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (-(-len(images) // batch)))
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch):
                optimizer.zero_grad()
                cross_entropy(judge(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return judge.eval()


def closeness(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage of features (n, f) and (m, f)."""
    return {"frechet": frechet(fake, real)} | prdc(real, fake)


@dataclass(frozen=True)
class Exam:
    """What drawn pictures are judged by: a judge, features of held-out reals, which of them to draw again.

    `floor` is what real training images score in the same exam, and the judge's accuracy on held-out reals.
    """

    judge: Judge
    real: Tensor
    rows: list[int]
    labels: Tensor
    floor: dict[str, float]

    @torch.no_grad()
    def mark(self, pictures: Tensor) -> dict[str, float]:
        """Marks of pictures (n, ch, y, x), drawn for the labels (n,) in order.

        The share recognised as asked, the same for the worst label, and how close their features come.
        """
        pictures = pictures.clamp(-1, 1)
        features = self.judge.features(pictures)
        found = self.judge.head(features).argmax(1)
        return recognition(found, self.labels) | closeness(self.real, features)


def prepare_exam(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], pictures: int, seed: int) -> Exam:
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
    judge = train_judge(*train, seed)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        real, other = judge.features(images), judge.features(train[0][order[:pictures]])
        right = recognition(judge(images).argmax(1), labels)["recognised"]
    floor = {"recognised": right} | closeness(real, other)
    rows = torch.arange(pictures) % len(labels)
    return Exam(judge, real, rows.tolist(), labels[rows], floor)
