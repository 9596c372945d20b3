"""q and k rotated by tables of cosines and sines that someone else made."""

import torch
from torch import Tensor

from rope_mm_kernels import norm_rotary, rotary
from rope_mm_kernels.checks import check_table_rotation
from rope_mm_kernels.pairs import block_sizes
from rope_mm_kernels.plan import KernelSpec


def table_inputs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairing: str, blocks: tuple[int, ...], tail: bool
) -> tuple[Tensor, Tensor, KernelSpec]:
    """Tables (b, s, 1, 2r) on the device of q, and their spec; refuses what does not fit together."""
    check_table_rotation(q, k, cos, sin, pairing, blocks, tail)
    (b, _, _, d), width = q.shape, cos.shape[-1]
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("tables get no gradient here; call rotate for the gradient of omega, or detach them")
    sizes = block_sizes(pairing, width // 2, tuple(blocks))
    spec = KernelSpec(1, 0, width // 2, sizes, d - width if tail else 0, "table")
    cos, sin = (x.to(q.device).expand(b, -1, -1).unsqueeze(2) for x in (cos, sin))
    return cos, sin, spec


def rotate_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, s, h, d) and k (b, s, g, d) rotated by given cosines and sines, with gradients to q and k.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        cos: (1, s, 2r) or (b, s, 2r) as in transformers; of a pair, the first channel's entry is read.
        sin: as cos.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.

    Raises:
        ValueError: what does not fit together, an unknown pairing, a table that requires grad.
    """
    return rotary.apply(q, k, *table_inputs(q, k, cos, sin, pairing, blocks, tail))


def norm_rotate_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float = 1e-6, pairing: str = "half", *, blocks: tuple[int, ...] = (), tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rotate_by_table` of q and k, normalised and weighed first as in `norm_rotate`.

    Gradients go to q, k and the weights.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        cos: (1, s, 2r) or (b, s, 2r) as in transformers; of a pair, the first channel's entry is read.
        sin: as cos.
        pairing: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half within each block).
        blocks: pairs in each block, for "block".
        tail: whether the last 2r channels are rotated, not the first.
        q_weight: (d,), for all heads of q; it gets a gradient.
        k_weight: (d,), for all heads of k; it gets a gradient.
        eps: added to the mean square, positive.

    Raises:
        ValueError: as `rotate_by_table`, and of weights and eps as `norm_rotate`.
    """
    cos, sin, spec = table_inputs(q, k, cos, sin, pairing, blocks, tail)
    return norm_rotary.apply(q, k, cos, sin, q_weight, k_weight, eps, spec)
