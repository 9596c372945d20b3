"""How far generated images are from real ones in a classifier's features, where there are samples enough."""

import logging
from collections.abc import Sequence

from torch import Tensor

from rope_mm.evaluation.metrics import NEIGHBOURS, frechet, prdc

FEATURES = 64  # of the classifier
MIN_SAMPLES = {  # below which a metric says nothing
    "accuracy": 20,
    "prdc": 10 * NEIGHBOURS,
    "frechet": FEATURES + 1,  # else the covariances are singular
}

LOG = logging.getLogger(__name__)


def distribution_metrics(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage, as far as there are samples for them.

    Args:
        real: features (n, 64).
        fake: features (m, 64).
    """
    samples = min(len(real), len(fake))
    distance = {"frechet": frechet(fake, real)} if samples >= MIN_SAMPLES["frechet"] else {}
    return distance | (prdc(real, fake) if samples >= MIN_SAMPLES["prdc"] else {})


def report_skipped(images: int, real: int, captioned: bool = True) -> None:
    """Say in the log which metrics are skipped, for want of samples, and how many they need, or of captions.

    Args:
        images: generated ones.
        real: held-out ones that they are compared with.
        captioned: whether the images are generated for captions.
    """
    if not captioned:
        LOG.warning("images are generated without captions: no accuracy")
    samples = {"accuracy": images, "prdc": min(images, real), "frechet": min(images, real)}
    few = [
        f"{name} ({least})"
        for name, least in MIN_SAMPLES.items()
        if samples[name] < least and (captioned or name != "accuracy")
    ]
    if few:
        LOG.warning("%d generated and %d held-out images: too few for %s", images, real, ", ".join(few))


def report_missing(learned: Tensor, asked: Tensor, names: Sequence[str] = ()) -> None:
    """Say in the log which classes a classifier cannot find, as no image that it is trained on has them.

    Args:
        learned: classes (n,) of the images that it is trained on.
        asked: classes (m,) of held-out images.
        names: of the classes; numbers if empty.
    """
    if missing := sorted(set(asked.tolist()) - set(learned.tolist())):
        words = [names[int(number)] if names else str(number) for number in missing[:10]]
        shown = ", ".join(words) + ", ..." * (len(missing) > 10)
        LOG.warning(
            "%d classes of held-out images are on none of the %d images that the classifier is trained on, "
            "so none of their images counts as right: %s",
            len(missing),
            len(learned),
            shown,
        )
