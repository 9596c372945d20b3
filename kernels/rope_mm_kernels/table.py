"""q and k rotated by tables of cosines and sines that someone else made."""

import torch
from torch import Tensor

from rope_mm_kernels import norm_rotary, rotary
from rope_mm_kernels.form import Form, blocks_of, check_heads


def fitting(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairing: str, blocks: tuple[int, ...], tail: bool
) -> tuple[Tensor, Tensor, Form]:
    """Tables (b, s, 1, 2r) on the device of q, and their form; refuses what does not fit together."""
    check_heads(q, k)
    (b, s, _, d), width = q.shape, cos.shape[-1]
    if cos.shape != sin.shape or tuple(cos.shape[:-1]) not in ((1, s), (b, s)) or width > d or width % 2:
        shapes = f"cos {(*cos.shape,)}, sin {(*sin.shape,)}, q {(*q.shape,)}"
        raise ValueError(
            f"cos and sin must be (1, s, 2r) or (b, s, 2r) with 2r of the d channels of q: {shapes}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("tables get no gradient here; call rotate for the gradient of omega, or detach them")
    form = Form(1, 0, width // 2, blocks_of(pairing, width // 2, blocks), d - width if tail else 0, "table")
    cos, sin = (x.to(q.device).expand(b, -1, -1).unsqueeze(2) for x in (cos, sin))
    return cos, sin, form


def rotate_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairing: str = "half", *,
    blocks: tuple[int, ...] = (), tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (b, s, h, d) and k (b, s, g, d) rotated by given cosines and sines, with gradients to q and k.

    Args:
        q, k: as in `rotate`.
        cos, sin: (1, s, 2r) or (b, s, 2r) as in transformers; of a pair, the first channel's entry is read.
        pairing, blocks, tail: as in `rotate`.

    Raises:
        ValueError: what does not fit together, an unknown pairing, a table that requires grad.
    """
    return rotary.turn(q, k, *fitting(q, k, cos, sin, pairing, blocks, tail))


def norm_rotate_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float = 1e-6, pairing: str = "half", *, blocks: tuple[int, ...] = (), tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rotate_by_table` of q and k, normalised and weighed first as in `norm_rotate`.

    Gradients go to q, k and the weights.

    Args:
        q, k, cos, sin, pairing, blocks, tail: as in `rotate_by_table`.
        q_weight, k_weight, eps: as in `norm_rotate`.

    Raises:
        ValueError: as `rotate_by_table`, and of weights and eps as `norm_rotate`.
    """
    cos, sin, form = fitting(q, k, cos, sin, pairing, blocks, tail)
    return norm_rotary.turn(q, k, cos, sin, q_weight, k_weight, eps, form)
