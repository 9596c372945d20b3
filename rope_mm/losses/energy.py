"""The energy score of several samples for one condition: a loss of a generator that needs no critic."""

from typing import Annotated

import torch
from torch import Tensor

from rope_mm.checks.fields import Real, read_value
from rope_mm.checks.tensors import check_real_tensors
from rope_mm.losses.drift import distances
from rope_mm.losses.scores import at_least_float32

Exponent = Annotated[float, Real(above=0, below=2)]
Repulsion = Annotated[float, Real(at_least=0, at_most=1)]
SMALLEST = 1e-12  # a distance whose power below 1 would have no gradient


def energy_score(samples: Tensor, target: Tensor, exponent: float = 1.0, repulsion: float = 1.0) -> Tensor:
    """2 E‖X - y‖^a - r E‖X - X'‖^a of each row (n,); its mean over rows is lowest where X has y's law.

    For two samples it is ‖x1 - y‖^a + ‖x2 - y‖^a - r‖x1 - x2‖^a, the loss of EAR (arXiv 2505.07812); without
    bias for any number of them. Strictly proper for a in (0, 2) and r = 1; for r < 1 samples have less
    spread than the targets: on a line, for a = 1 and a normal law, r / sqrt(2 - r²) of theirs.

    Args:
        samples: m >= 2 independent samples (m, n, d) for each of n conditions.
        target: the one true vector (n, d) of each condition.
        exponent: a, in (0, 2).
        repulsion: r, in [0, 1], how much samples for one condition are driven apart.

    Raises:
        ValueError: shapes that do not fit, less than two samples, an exponent or repulsion out of range.
    """
    check_real_tensors(samples=samples, target=target)
    fits = samples.dim() == 3 and samples.shape[1:] == target.shape
    if not fits or len(samples) < 2 or not target.shape[1]:
        raise ValueError(
            "the energy score takes 2 samples or more (m, n, d) of targets (n, d), d at least 1, "
            f"not {tuple(samples.shape)} of {tuple(target.shape)}"
        )
    exponent = read_value("energy_score", "exponent", exponent, Exponent)
    repulsion = read_value("energy_score", "repulsion", repulsion, Repulsion)
    samples, target = at_least_float32(samples), at_least_float32(target)
    first, second = torch.triu_indices(len(samples), len(samples), 1).unbind()
    attraction = distance_power(samples - target, exponent).mean(0)
    apart = distance_power(samples[first] - samples[second], exponent).mean(0)
    return 2 * attraction - repulsion * apart


def energy_distance(x: Tensor, other: Tensor, real: Tensor) -> Tensor:
    """2 E‖X - Y‖ - E‖X - X'‖ - E‖Y - Y'‖ without bias: 0 where X and Y have one law, and above for any other.

    Székely and Rizzo, Energy statistics, 2013. Of few samples of one law it is near 0 on either side.

    Args:
        x: samples (n, d).
        other: samples (k, d) of the same law, independent of x.
        real: samples (m, d), m >= 2, of the law that they are compared with.

    Raises:
        ValueError: shapes that do not fit, fewer than two real samples.
    """
    check_real_tensors(x=x, other=other, real=real)
    if any(part.dim() != 2 or part.shape[1] != x.shape[1] for part in (x, other, real)) or len(real) < 2:
        shapes = ", ".join(str(tuple(part.shape)) for part in (x, other, real))
        raise ValueError(
            f"the energy distance takes samples (n, d) of one d, two real ones or more, not {shapes}"
        )
    x, other, real = map(at_least_float32, (x, other, real))
    among = distances(real, real).sum() / (len(real) * (len(real) - 1))
    return 2 * distances(x, real).mean() - distances(x, other).mean() - among


def distance_power(gap: Tensor, exponent: float) -> Tensor:
    """‖gap‖^exponent over the last dimension, with gradient 0 where the gap is 0."""
    norm = torch.linalg.vector_norm(gap, dim=-1)
    return norm if exponent == 1 else norm.clamp_min(SMALLEST) ** exponent
