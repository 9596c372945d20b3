"""How close samples come to real ones, in features (n, f): distances, neighbourhoods, modes, captions."""

import torch
from torch import Tensor

ROWS = 1000  # of a matrix of distances at a time


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


def kid(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (n, f) and (m, f) under (x·y / f + 1)³ (arXiv 1801.01401)."""
    a, b = a.double(), b.double()

    def kernel(products: Tensor) -> Tensor:
        return (products / a.shape[1] + 1) ** 3

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([kernel(rows @ y.T).sum() for rows in x.split(ROWS)]).sum()

    def within(x: Tensor) -> Tensor:  # without the pairs of a sample and itself
        return (total(x, x) - kernel(x.square().sum(1)).sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def sliced_wasserstein(
    a: Tensor, b: Tensor, directions: int = 256, generator: torch.Generator | None = None
) -> float:
    """Squared W2 of features (n, f) on a line, averaged over random directions (Bonneel et al., 2015).

    Raises:
        ValueError: unequal numbers of samples.
    """
    if len(a) != len(b):
        raise ValueError(
            f"the sliced distance pairs sorted samples and wants as many, not {len(a)} and {len(b)}"
        )
    lines = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    lines = (lines / lines.norm(dim=0)).to(a.device)
    gap = (a.double() @ lines).sort(0).values - (b.double() @ lines).sort(0).values
    return float(gap.square().mean())


NEIGHBOURS = 5


def radii(points: Tensor, k: int) -> Tensor:
    """Distance (n,) of each of the points (n, f) to its k-th neighbour.

    Raises:
        ValueError: no more than k points.
    """
    if len(points) <= k:
        raise ValueError(f"{k} neighbours want more than {k} samples, not {len(points)}")
    # the nearest of all is the point itself
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(ROWS)])


def prdc(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of features (n, f) and (m, f).

    A ball reaches to a sample's k-th neighbour of its kind. Precision: share of fakes in some real's ball;
    density: the mean number of such balls, over k. Recall: share of reals in some fake's ball; coverage:
    share of reals with a fake in theirs (arXiv 1904.06991; 2002.09797). For fakes of the real law the mean
    density is 1 and the mean coverage 1 - Π_i<k (n - 1 - i) / (n + m - 1 - i).

    Raises:
        ValueError: no more than k reals or fakes.
    """
    real, fake = real.double(), fake.double()
    of_fake, recalled, covered = radii(fake, k), [], []
    balls = torch.zeros(len(fake), dtype=real.dtype, device=real.device)
    for rows, of_real in zip(real.split(ROWS), radii(real, k).split(ROWS), strict=True):
        distance = torch.cdist(rows, fake)
        inside = distance < of_real[:, None]
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance < of_fake).any(1))
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(balls.mean() / k),
        "coverage": float(torch.cat(covered).double().mean()),
    }


COVERED_SHARE = 0.1  # of its weight is what a mode must have of the samples, to count as held


def mode_statistics(labels: Tensor, weights: Tensor) -> dict[str, float]:
    """How samples of these labels (n,) spread over modes 0 .. K-1 of true weights (K,), up to a factor.

    `modes` have a sample, `held` at least a tenth of their weight, `least` is the smallest share over weight.
    `kl` is KL(shares‖weights); `kl_floor`, (K - 1) / 2n, is what n true samples have of it on average.

    Raises:
        ValueError: no labels, one that is no mode, a weight that is not positive.
    """
    if not (weights > 0).all():
        raise ValueError(f"every mode needs a positive weight, and {int((weights <= 0).sum())} have none")
    if not len(labels) or labels.min() < 0 or labels.max() >= len(weights):
        raise ValueError(f"labels must be some of 0..{len(weights) - 1}, not {labels.tolist()[:5]}...")
    shares = labels.bincount(minlength=len(weights)).double() / len(labels)
    ratio = shares * weights.sum() / weights.double()
    return {
        "modes": int((shares > 0).sum()),
        "held": int((ratio >= COVERED_SHARE).sum()),
        "least": float(ratio.min()),
        "kl": float(torch.xlogy(shares, ratio).sum()),
        "kl_floor": (len(weights) - 1) / (2 * len(labels)),
    }


QUALITY_SIGMAS = 3.0  # from the centre of its mode, a sample is of high quality (PacGAN, arXiv 1712.04086)


def gaussian_modes(samples: Tensor, centres: Tensor, sigma: float) -> dict[str, float]:
    """How samples (n, f) spread over equal Gaussians at centres (K, f), each sample counted for the nearest.

    As `mode_statistics`, but `modes`, `held` and `least` count samples of high quality alone, so that no blur
    holds a mode. `quality` is the share of such samples, `spread` their deviation from their mode's mean over
    that of true ones (both within the 3 sigma); nan where no mode has two.
    """
    samples, centres, f = samples.double(), centres.double(), samples.shape[1]
    distance, labels = torch.cdist(samples, centres).min(1)
    near = distance <= QUALITY_SIGMAS * sigma
    best, mode = samples[near], labels[near]
    counts = mode.bincount(minlength=len(centres)).double()
    ratio = counts * len(centres) / len(samples)
    means = torch.zeros_like(centres).index_add_(0, mode, best) / counts.clamp_min(1)[:, None]
    variance = (best - means[mode]).square().sum() / (f * (counts - 1).clamp_min(0).sum())
    half, edge = torch.tensor(f / 2), torch.tensor(QUALITY_SIGMAS**2 / 2)
    truth = sigma**2 * torch.special.gammainc(half + 1, edge) / torch.special.gammainc(half, edge)
    return mode_statistics(labels, torch.ones(len(centres))) | {
        "modes": int((counts > 0).sum()),
        "held": int((ratio >= COVERED_SHARE).sum()),
        "least": float(ratio.min()),
        "quality": float(near.double().mean()),
        "spread": float((variance / truth).sqrt()),
    }


def conditional_accuracy(found: Tensor, asked: Tensor) -> dict[str, float]:
    """Share of samples found to be what their captions asked for, in every attribute: labels (n,) or (n, a).

    `recognised` is that share of all samples, `worst` of the caption that fares worst.
    """
    right = (found == asked).view(len(asked), -1).all(1).double()
    _, caption = asked.unique(dim=0, return_inverse=True)
    each = torch.zeros(int(caption.max()) + 1, dtype=right.dtype, device=right.device)
    return {
        "recognised": float(right.mean()),
        "worst": float((each.index_add(0, caption, right) / caption.bincount()).min()),
    }
