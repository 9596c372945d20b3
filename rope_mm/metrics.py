"""How good drawn images are, by features of an independent judge: recognition, Frechet distance, coverage."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features (n, f) and (m, f), in float64.

    ‖mean difference‖² + tr(A + B - 2 (A^½ B A^½)^½), A and B the covariances (arXiv 1706.08500, equation 6).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = symmetric_root(cov_a)
    cross = symmetric_root(root @ cov_b @ root)
    return float((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * cross).trace())


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


NEIGHBOURS = 5


def coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of real features (n, f) with a fake (m, f) nearer than their k-th real one (arXiv 2002.09797)."""
    real, fake = real.double(), fake.double()
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    return float((torch.cdist(real, fake).amin(1) < radius).double().mean())


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

        The share recognised as asked, the same for the worst label, Frechet distance and coverage.
        """
        pictures = pictures.clamp(-1, 1)
        right = (self.judge(pictures).argmax(1) == self.labels).double()
        features = self.judge.features(pictures)
        return {
            "recognised": float(right.mean()),
            "worst": min(float(right[self.labels == label].mean()) for label in self.labels.unique()),
            "frechet": frechet(features, self.real),
            "coverage": coverage(self.real, features),
        }


def prepare_exam(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], pictures: int, seed: int) -> Exam:
    """An exam for that many pictures, from images and labels of real training and held-out data.

    Picture i is to show what held-out image rows[i] shows.

    Raises:
        ValueError: too few held-out images to have neighbours.
    """
    images, labels = test
    if len(images) <= NEIGHBOURS:
        raise ValueError(f"an exam needs more than {NEIGHBOURS} held-out images, not {len(images)}")
    judge = train_judge(*train, seed)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        real, other = judge.features(images), judge.features(train[0][order[:pictures]])
        right = (judge(images).argmax(1) == labels).double().mean()
    floor = {"recognised": float(right), "frechet": frechet(other, real), "coverage": coverage(real, other)}
    rows = torch.arange(pictures) % len(labels)
    return Exam(judge, real, rows.tolist(), labels[rows], floor)
