"""Do generated images show their captions, and do they copy training images? By the nearest real image."""

import torch
from torch import Tensor

from rope_mm.checks.fields import WholeNumber, read_value
from rope_mm.evaluation.metrics import check_features, squared_distances, squared_radii

CANDIDATES = 50  # real images, the one of the caption included, among which it is found
CHUNK = 64  # generated images compared at once


def caption_retrieval(real: Tensor, fake: Tensor, candidates: int = CANDIDATES) -> float:
    """Share of generated images to which the real image of their caption is the nearest of `candidates`.

    The others are drawn at random, the same at each call. An image as near as the right one makes it wrong.
    Images that say nothing of their caption reach one in `candidates`.

    Args:
        real: features (n, f) of real images, each of another caption.
        fake: features (n, f) of images generated for these captions, in the same order.
        candidates: real images that are compared, the right one included; n at most.

    Raises:
        ValueError: different numbers of images; fewer than two candidates; as from `check_features`.
    """
    real, fake = check_features(real=real, fake=fake)
    if len(real) != len(fake):
        raise ValueError(
            f"each real image needs the one generated for its caption, not {len(real)} and {len(fake)}"
        )
    candidates = read_value("caption_retrieval", "candidates", candidates, WholeNumber)
    if candidates < 2:
        raise ValueError(f"candidates must be 2 or more, not {candidates}: the right image and others")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).to(real.device)
    others = torch.arange(1, min(candidates, len(real)), device=real.device)
    rows = order[(order.argsort()[:, None] + others) % len(real)]
    own, right = (real - fake).square().sum(1), 0
    for part in torch.arange(len(real), device=real.device).split(CHUNK):
        distance = (real[rows[part]] - fake[part, None]).square().sum(2)
        right += int((own[part] < distance.amin(1)).sum())
    return right / len(real)


def copied_share(train: Tensor, fake: Tensor) -> float:
    """Share of images that are nearer to a training image than any other training image is to it.

    They are not authentic, in the words of arXiv 2102.08921, section 3.3. Of new images of the law of the
    training images it is a half in many dimensions, two thirds in one, where the law is smooth; where images
    lie in clusters it may be less, so compare it with that of held-out ones. Of copies it is 1.

    Args:
        train: features (n, f) of the training images.
        fake: features (m, f).

    Raises:
        ValueError: as from `check_features`.
    """
    train, fake = check_features(train=train, fake=fake)
    centre = train.mean(0)  # smaller numbers lose fewer digits
    train, fake = train - centre, fake - centre
    radii, copied = squared_radii(train, 1), 0
    for distance in squared_distances(fake, train):
        nearest = distance.min(1)
        copied += int((nearest.values < radii[nearest.indices]).sum())
    return copied / len(fake)
