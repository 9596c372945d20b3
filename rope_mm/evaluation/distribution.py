"""How far generated images are from real ones in a classifier's features, where there are samples enough."""

import logging

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
