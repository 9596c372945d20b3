"""q and k rotated by tables of cosines and sines that someone else made."""

import torch
from torch import Tensor

from rope_mm_kernels.form import Form, blocks_of, check_heads
from rope_mm_kernels.rotary import turn


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
    return turn(q, k, cos.to(q.device).expand(b, -1, -1), sin.to(q.device).expand(b, -1, -1), form)
