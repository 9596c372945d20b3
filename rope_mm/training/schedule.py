"""How a number goes from its start to its end in the course of a run."""

import math
from collections.abc import Callable

from rope_mm.registry import Registry

Schedule = Callable[[float, float, float], float]


def linear(start: float, end: float, progress: float) -> float:
    """Straight from start to end, as progress goes from 0 to 1.

    Args:
        start: value at progress 0.
        end: value at progress 1.
        progress: from 0 to 1.
    """
    return start - (start - end) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, flat at both (R3GAN, `cosine_decay_with_warmup`).

    Args:
        start: value at progress 0.
        end: value at progress 1.
        progress: from 0 to 1.
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES = Registry("schedule", {"linear": linear, "cosine": cosine})
