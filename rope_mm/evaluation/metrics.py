"""How close samples come to real ones, in features (n, f): distances, neighbourhoods, modes, captions.

Features may be float of any width or whole numbers; every metric is computed in float64, in blocks of rows.
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from rope_mm.checks.fields import Real, Whole, WholeNumber, read_value
from rope_mm.checks.tensors import check_generator, check_real_tensors

ROWS = 128  # of a matrix of distances at a time: blocks that stay in the cache
NEIGHBOURS = 5
Directions = Annotated[int, Whole(at_least=1, at_most=2**20)]
Sigma = Annotated[float, Real(above=0, at_most=1e100)]  # its square is a number
LARGEST = torch.finfo(torch.float32).max  # of a feature: its sixth power is finite in float64


def check_readable(**tensors: Tensor) -> None:
    """Refuse what is no tensor of real numbers, and tensors without numbers, on the meta device."""
    check_real_tensors(**tensors)
    for name, x in tensors.items():
        if x.is_meta:
            raise ValueError(f"{name} is on the meta device, without numbers; give it on a CPU or a GPU")


def check_features(least: int = 2, /, **features: Tensor) -> list[Tensor]:
    """The features (n, f) in float64.

    Args:
        least: how many samples there must be at least.
        features: by the name that a message calls them.

    Raises:
        ValueError: no real tensors (n, f) with n >= least, of different width, not all finite, or too large.
    """
    check_readable(**features)
    for name, x in features.items():
        if x.dim() != 2 or len(x) < least or not x.shape[1]:
            raise ValueError(
                f"{name} must be features (n, f) of at least {least} samples, not {tuple(x.shape)}; "
                "one feature is (n, 1)"
            )
        if not x.isfinite().all():
            rows = int((~x.isfinite()).any(1).sum())
            raise ValueError(f"{name} has {rows} of {len(x)} samples with nan or infinite features")
        if x.dtype == torch.float64 and x.abs().max() > LARGEST:
            raise ValueError(
                f"{name} reaches past {LARGEST:.1e}, where powers of it overflow; divide all features by "
                "one number"
            )
    widths = {name: x.shape[1] for name, x in features.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"features must be equally wide, not {widths}")
    return [x.detach().double() for x in features.values()]


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features, in float64.

    ‖mean difference‖² + tr(A + B - 2 (A^½ B A^½)^½), A and B the covariances (arXiv 1706.08500, equation 6).

    Args:
        a: features (n, f); f + 1 samples or more give a full covariance.
        b: features (m, f).

    Raises:
        ValueError: as from `check_features`.
    """
    a, b = check_features(a=a, b=b)
    width = a.shape[1]
    cov_a, cov_b = a.T.cov().view(width, width), b.T.cov().view(width, width)
    root = symmetric_root(cov_a)
    cross = symmetric_root(root @ cov_b @ root)
    return float((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * cross).trace())


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix (f, f)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def kid(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features under the kernel (x·y / f + 1)³ (KID, arXiv 1801.01401).

    Args:
        a: features (n, f).
        b: features (m, f).

    Raises:
        ValueError: as from `check_features`.
    """
    a, b = check_features(a=a, b=b)

    def kernels(products: Tensor) -> float:
        base = products.div_(a.shape[1]).add_(1)
        return float(torch.dot((base * base).flatten(), base.flatten()))

    def total(x: Tensor, y: Tensor) -> float:
        return math.fsum(kernels(block) for block in blocks(x, y))

    def within(x: Tensor) -> float:  # without the pairs of a sample and itself
        return (total(x, x) - kernels(x.square().sum(1))) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def blocks(a: Tensor, b: Tensor, beside: Tensor | None = None, alpha: float = 1.0) -> Iterator[Tensor]:
    """alpha a b^T + beside, in blocks (rows, m) of ROWS rows; a block lives until the next one.

    Args:
        a: points (n, f).
        b: points (m, f).
        beside: a number (m,) for each of b.
        alpha: factor of the products.
    """
    room = a.new_empty(min(ROWS, len(a)), len(b))  # one for all: new ones would leave holes in the memory
    zero = a.new_zeros(()) if beside is None else beside
    for rows in a.split(ROWS):
        yield torch.addmm(zero, rows, b.T, alpha=alpha, out=room[: len(rows)])


def sliced_wasserstein(
    a: Tensor, b: Tensor, directions: int = 256, generator: torch.Generator | None = None
) -> float:
    """Squared W2 of features on a line, averaged over random directions (Bonneel et al., 2015).

    Args:
        a: features (n, f).
        b: features (n, f), as many.
        directions: how many lines.
        generator: of the directions.

    Raises:
        ValueError: unequal numbers of samples; as from `check_features`.
    """
    a, b = check_features(a=a, b=b)
    if len(a) != len(b):
        raise ValueError(
            f"the sliced distance pairs sorted samples and wants as many, not {len(a)} and {len(b)}"
        )
    check_generator(generator)
    directions = read_value("sliced_wasserstein", "directions", directions, Directions)
    lines = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    lines = (lines / lines.norm(dim=0)).to(a.device)
    gap = (a @ lines).sort(0).values - (b @ lines).sort(0).values
    return float(gap.square().mean())


def squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances (rows, m) of the points a (n, f) to the points b (m, f), in blocks; see `blocks`.

    Those within the rounding error of 0 are 0, so that copies of a point are copies.
    """
    of_a, of_b = a.square().sum(1), b.square().sum(1)
    rounding = 64 * torch.finfo(b.dtype).eps * float(torch.maximum(of_a.max(), of_b.max()))
    for distance, own in zip(blocks(a, b, of_b, -2.0), of_a.split(ROWS), strict=True):
        yield torch.threshold_(distance.add_(own[:, None]), rounding, 0.0)


def squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (n,) of each of the points (n, f) to its k-th neighbour."""
    radii = points.new_empty(len(points))
    for radius, distance in zip(radii.split(ROWS), squared_distances(points, points), strict=True):
        radius.copy_(distance.topk(k + 1, largest=False).values[:, k])  # the nearest is the point itself
    return radii


def prdc(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of features (arXiv 1904.06991; 2002.09797).

    A ball reaches to a sample's k-th neighbour of its kind. Precision: share of fakes in some real's ball;
    density: the mean number of such balls, over k. Recall: share of reals in some fake's ball; coverage:
    share of reals with a fake in theirs. For fakes of the real law the mean density is 1 and the mean
    coverage 1 - Π_i<k (n - 1 - i) / (n + m - 1 - i).

    Args:
        real: features (n, f).
        fake: features (m, f).
        k: which neighbour bounds a ball.

    Raises:
        ValueError: no more than k reals or fakes, or k < 1; as from `check_features`.
    """
    real, fake = check_features(real=real, fake=fake)
    k = read_value("prdc", "k", k, WholeNumber)
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{k} neighbours need k >= 1 and more than {k} samples, "
            f"not {len(real)} reals and {len(fake)} fakes"
        )
    centre = real.mean(0)  # smaller numbers lose fewer digits
    real, fake = real - centre, fake - centre
    of_real, of_fake = squared_radii(real, k), squared_radii(fake, k)
    balls, recalled, covered = torch.zeros(len(fake), dtype=torch.long, device=real.device), 0, 0
    for distance, radius in zip(squared_distances(real, fake), of_real.split(ROWS), strict=True):
        balls += (distance < radius[:, None]).sum(0)
        covered += int((distance.amin(1) < radius).sum())
        recalled += int((distance < of_fake).any(1).sum())
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(balls.double().mean() / k),
        "coverage": covered / len(real),
    }


COVERED_SHARE = 0.1  # of its weight is what a mode must have of the samples, to count as covered


def mode_statistics(labels: Tensor, weights: Tensor) -> dict[str, float]:
    """How samples spread over modes 0 .. K-1.

    Args:
        labels: the mode (n,) of each sample.
        weights: true shares (K,) of the modes, up to a common factor.

    Returns:
        `modes` with a sample; `modes_covered` with at least a tenth of their weight; `min_mode_share`, the
        smallest share over weight; `kl`, KL(shares‖weights); `kl_floor`, (K - 1) / 2n, what n true samples
        have of it on average.

    Raises:
        ValueError: no labels, one that is no mode, a weight that is not a positive number.
    """
    check_readable(labels=labels, weights=weights)
    if weights.dim() != 1:
        raise ValueError(f"weights must be (K,), one for each mode, not {tuple(weights.shape)}")
    right = (weights > 0) & weights.isfinite()
    if not right.all() or not len(weights):
        raise ValueError(f"every mode needs a positive weight, and {int((~right).sum())} have none")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers (n,), not {labels.dtype} {tuple(labels.shape)}")
    if not len(labels) or labels.min() < 0 or labels.max() >= len(weights):
        raise ValueError(f"labels must be some of 0..{len(weights) - 1}, not {labels.tolist()[:5]}...")
    shares = labels.bincount(minlength=len(weights)).double() / len(labels)
    ratio = shares * weights.sum() / weights.double()
    return {
        "modes": int((shares > 0).sum()),
        "modes_covered": int((ratio >= COVERED_SHARE).sum()),
        "min_mode_share": float(ratio.min()),
        "kl": float(torch.xlogy(shares, ratio).sum()),
        "kl_floor": (len(weights) - 1) / (2 * len(labels)),
    }


QUALITY_SIGMAS = 3.0  # from the centre of its mode, a sample is of high quality (PacGAN, arXiv 1712.04086)


def gaussian_modes(samples: Tensor, centres: Tensor, sigma: float) -> dict[str, float]:
    """How samples spread over equal Gaussians, each sample counted for the nearest centre.

    As `mode_statistics`, but `modes`, `modes_covered` and `min_mode_share` count samples of high quality
    alone, so that no blur covers a mode.

    Args:
        samples: points (n, f).
        centres: means (K, f) of the Gaussians.
        sigma: their standard deviation.

    Returns:
        Also `quality`, the share of samples within 3 sigma of a centre, and `spread`, their deviation from
        their mode's mean over that of true ones (both within the 3 sigma); nan where no mode has two.

    Raises:
        ValueError: a sigma that is no positive number, no centres; as from `check_features` of the samples.
    """
    sigma = read_value("gaussian_modes", "sigma", sigma, Sigma)
    check_features(samples=samples)
    samples, centres = check_features(1, samples=samples, centres=centres)
    f = samples.shape[1]
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
        "modes_covered": int((ratio >= COVERED_SHARE).sum()),
        "min_mode_share": float(ratio.min()),
        "quality": float(near.double().mean()),
        "spread": float((variance / truth).sqrt()),
    }


def conditional_accuracy(found: Tensor, asked: Tensor) -> dict[str, float]:
    """How often samples are what their captions asked for, in every attribute.

    Args:
        found: labels (n,), or (n, a) of a attributes each, that a classifier gave.
        asked: the same of the captions.

    Returns:
        `accuracy` of all samples; `worst_class_accuracy` of the caption with the smallest.

    Raises:
        ValueError: no labels, labels of different shapes, or not all finite.
    """
    check_readable(found=found, asked=asked)
    if found.shape != asked.shape or found.dim() not in (1, 2) or not found.numel():
        raise ValueError(
            "accuracy compares labels (n,) or (n, a), one for each sample, with as many, "
            f"not {tuple(found.shape)} with {tuple(asked.shape)}"
        )
    if not (found.isfinite() & asked.isfinite()).all():
        raise ValueError("labels must be finite numbers, but some are nan or infinite, which equal no label")
    right = (found == asked).view(len(asked), -1).all(1).double()
    _, caption = asked.unique(dim=0, return_inverse=True)
    each = torch.zeros(int(caption.max()) + 1, dtype=right.dtype, device=right.device)
    return {
        "accuracy": float(right.mean()),
        "worst_class_accuracy": float((each.index_add(0, caption, right) / caption.bincount()).min()),
    }
