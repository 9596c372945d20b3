"""Zero-centred gradient penalties on a critic: ½ E‖gradient of the score by the image‖², times gamma outside.

Their gradient is a second derivative, which fused attention lacks: make the scores under
`twice_differentiable`.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rope_mm.choice import Choice

FUSED = (
    "ScaledDotProductFlash",
    "ScaledDotProductEfficient",
    "ScaledDotProductCudnn",
    "FlashAttn",
    "FlexAttention",
)


def twice_differentiable():
    """Context in which scaled_dot_product_attention runs as plain matrix products."""
    return sdpa_kernel(SDPBackend.MATH)


def fused_attention(scores: Tensor) -> str | None:
    """Name of a node without second derivative on the way from the inputs to the scores, if there is one."""
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith(FUSED):
            return node.name()
        stack.extend(parent for parent, _ in node.next_functions)
    return None


def input_gradients(scores: Tensor, images: Tensor) -> Tensor:
    """Gradient (b, ...) of each score (b,) by its own image (b, ...), itself differentiable.

    Raises:
        ValueError: scores that came through an attention kernel without second derivative.
    """
    if kernel := fused_attention(scores):
        raise ValueError(
            f"a gradient penalty needs second derivatives, which {kernel} lacks; make the scores under "
            "`with twice_differentiable():` and with sdpa or eager attention"
        )
    return torch.autograd.grad(scores.sum(), images, create_graph=True)[0]


def half_square(gradient: Tensor) -> Tensor:
    """½ E‖g‖²: the sum over a sample's entries, the mean over samples."""
    return gradient.flatten(1).square().sum(1).mean() / 2


def r1(real_gradient: Tensor, fake_gradient: Tensor) -> Tensor:
    """On real images (Mescheder et al., arXiv 1801.04406, equation 9)."""
    return half_square(real_gradient)


def r2(real_gradient: Tensor, fake_gradient: Tensor) -> Tensor:
    """On generated images (arXiv 1801.04406, equation 10)."""
    return half_square(fake_gradient)


PENALTIES = Choice("penalty", {"r1": r1, "r2": r2})
