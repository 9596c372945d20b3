"""‖gradient of the score by the image‖² of every sample: exactly, by one probe, or at a head's inputs.

A method takes a critic (images (b, ...) -> scores (b,)), images, the step `sigma` of "fd" and a generator of
random probes, and gives squared norms (b,) that the critic's weights have gradients of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rope_mm.checks.fields import Positive, read_value
from rope_mm.checks.tensors import check_real_tensors
from rope_mm.losses.scores import at_least_float32, check_rows, without_autocast
from rope_mm.registry import Registry

Critic = Callable[..., Tensor]

FUSED = "make the scores under `with twice_differentiable():` and with sdpa or eager attention"
ONCE = {  # nodes of the graph that cannot be differentiated twice, and the cure
    "ScaledDotProduct": FUSED,
    "FlashAttn": FUSED,
    "FlexAttention": FUSED,
    "CheckpointFunction": "checkpoint with use_reentrant=False",
    "CompiledFunction": "call the critic uncompiled",
}
# smallest sigma of a finite difference that rounding does not outweigh, by the coarsest type between images
# and scores: in bfloat16 sigma 0.01 reads 1.4 to 2.5 times the truth, 0.03 up to 1.2 times; in float32 1e-5
# up to 3.5 times, 1e-4 up to 1.03 times
SMALLEST_STEP = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 1e-4, torch.float64: 1e-11}


def twice_differentiable():
    """Context in which scaled_dot_product_attention runs as plain matrix products."""
    return sdpa_kernel(SDPBackend.MATH)


def nodes(scores: Tensor) -> Iterator[Any]:
    """Every node of the graph on the way from the inputs to the scores, once."""
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
            yield node


def once_differentiable(scores: Tensor) -> str | None:
    """What forbids a second derivative of the scores and the cure, or None."""
    for node in nodes(scores):
        for prefix, cure in ONCE.items():
            if node.name().startswith(prefix):
                return f"{node.name()} lacks; {cure}"
    return None


def coarsest_dtype(scores: Tensor, images: Tensor) -> torch.dtype:
    """Of the types on the way from images and weights to the scores, the one that rounds the most."""
    types = {scores.dtype, images.dtype} | {m.dtype for node in nodes(scores) for m in node._input_metadata}
    return max((kind for kind in types if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)


def check_scores(scores: Any, images: Tensor) -> None:
    """Refuse scores that are not one for each image: a mean over images has another gradient.

    Raises:
        ValueError: no scores (b,) of images (b, ...).
    """
    check_rows(scores=scores)
    if len(scores) != len(images):
        raise ValueError(f"a critic gives one score for each image, not {len(scores)} for {len(images)}")


def input_gradients(scores: Tensor, images: Tensor) -> Tensor:
    """Gradient (b, ...) of each score (b,) by its own image (b, ...), itself differentiable.

    Raises:
        ValueError: scores that are not one for each image, do not depend on the images, or came through an
            operation without second derivative.
    """
    check_real_tensors(images=images)
    check_scores(scores, images)
    if reason := once_differentiable(scores):
        raise ValueError(f"a gradient penalty needs second derivatives, which {reason}, or take method='fd'")
    found = None
    if scores.requires_grad and images.requires_grad:
        (found,) = torch.autograd.grad(scores.sum(), images, create_graph=True, allow_unused=True)
    if found is None:
        raise ValueError(
            "the scores have no gradient by the images; make them from these images, with "
            "requires_grad, outside of no_grad() and without detach()"
        )
    return found


def squared_norms(x: Tensor) -> Tensor:
    """Sum of squares (b,) over the entries of each sample (b, ...)."""
    return at_least_float32(x).flatten(1).square().sum(1)


def of_scores(scores: Tensor, images: Tensor) -> Tensor:
    """‖gradient‖² (b,) of scores that were made from the images."""
    # the zero ties the scores' own graph to the result: without it DDP does not synchronise this backward
    return squared_norms(input_gradients(scores, images)) + 0 * scores


def by_autograd(critic: Critic, images: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """The gradient itself, by double backward through plain attention.

    Args:
        critic: images -> scores (n,).
        images: where the gradient is taken, (n, ...).
        sigma: step of finite differences; the other estimators ignore it.
        generator: of random directions; None: torch's own.
    """
    images = images.detach().requires_grad_()
    with twice_differentiable():
        return of_scores(critic(images), images)


def by_difference(critic: Critic, images: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """((D(x + sigma e) - D(x)) / sigma)² with e normal (APT, arXiv 2501.08316).

    Its mean over e is ‖g‖² + sigma² / 4 (2 ‖H‖² + (tr H)²) for a quadratic critic of Hessian H. Both calls
    see the same random numbers (dropout), and run without autocast.

    Args:
        critic: images -> scores (n,).
        images: where the gradient is taken, (n, ...).
        sigma: step of finite differences; the other estimators ignore it.
        generator: of random directions; None: torch's own.

    Raises:
        ValueError: a sigma that is not finite and positive, or that the rounding of the critic outweighs.
    """
    sigma = read_value("finite differences", "sigma", sigma, Positive)
    images = images.detach()
    noise = torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)
    devices = [images.device] if images.is_cuda else []
    with without_autocast(images):
        with torch.random.fork_rng(devices):
            scores = critic(images)
        moved = critic(images + sigma * noise)
    for found in (scores, moved):
        check_scores(found, images)
    coarsest = coarsest_dtype(scores, images)
    if sigma < (smallest := SMALLEST_STEP.get(coarsest, 0.1)):
        raise ValueError(
            f"finite differences of sigma {sigma} are lost in the rounding of a critic in {coarsest}; take a "
            f"sigma of at least {smallest}, or a wider type for its weights and images"
        )
    return ((at_least_float32(moved) - at_least_float32(scores)) / sigma).square()


def by_jvp(critic: Critic, images: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """(∇D·v)² with v normal: one forward derivative, right on average.

    Args:
        critic: images -> scores (n,).
        images: where the gradient is taken, (n, ...).
        sigma: step of finite differences; the other estimators ignore it.
        generator: of random directions; None: torch's own.
    """
    images = images.detach()
    noise = torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)
    with twice_differentiable():
        scores, slopes, *_ = torch.func.jvp(critic, (images,), (noise,))
    check_scores(scores, images)
    return at_least_float32(slopes).square() + 0 * scores  # the zero as in `of_scores`


def by_head(critic: Any, images: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """The gradient of `critic.head` by what the frozen `critic.backbone` gives it (LADD, arXiv 2403.12015).

    Args:
        critic: images -> scores (n,).
        images: where the gradient is taken, (n, ...).
        sigma: step of finite differences; the other estimators ignore it.
        generator: of random directions; None: torch's own.

    Raises:
        ValueError: a critic without the two parts.
    """
    if not (hasattr(critic, "backbone") and hasattr(critic, "head")):
        raise ValueError(
            "method 'head' wants a critic with a frozen .backbone and a .head, which "
            f"{type(critic).__name__} has not; take 'autograd' or 'fd'"
        )
    with torch.no_grad():
        features = critic.backbone(images)
    return by_autograd(critic.head, features, sigma, generator)


def by_best_method(critic: Critic, images: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """`autograd` where the critic has second derivatives, else `fd`.

    Args:
        critic: images -> scores (n,).
        images: where the gradient is taken, (n, ...).
        sigma: step of finite differences; the other estimators ignore it.
        generator: of random directions; None: torch's own.
    """
    leaf = images.detach().requires_grad_()
    with twice_differentiable():
        scores = critic(leaf)
    check_scores(scores, images)
    if once_differentiable(scores):
        return by_difference(critic, images, sigma, generator)
    return of_scores(scores, leaf)


METHODS = Registry(
    "method",
    {"auto": by_best_method, "autograd": by_autograd, "fd": by_difference, "jvp": by_jvp, "head": by_head},
)
