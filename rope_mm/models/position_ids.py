"""transformers' position ids (1 + a, b, s), whose row 0 counts tokens <-> the model's positions (b, s, a)."""

import torch
from torch import Tensor

from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme


def pack_position_ids(positions: Tensor, mask: Tensor) -> Tensor:
    """Position ids (1 + a, b, s) of positions.

    Args:
        positions: (b, s, a), of the scheme's axes.
        mask: (b, s), true at tokens that are no padding.
    """
    return torch.cat([count_tokens(mask)[None].to(positions), positions.movedim(-1, 0)])


def unpack_position_ids(
    position_ids: Tensor, scheme: Scheme, rope_deltas: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token numbers (b, s) and positions (b, s, a) of position ids.

    Args:
        position_ids: (1 + a, b, s), or (b, s) numbers of text tokens alone.
        scheme: says where text tokens stand.
        rope_deltas: (b,), by how much text tokens stand beyond their numbers, after images.

    Raises:
        ValueError: position ids of any other shape.
    """
    if position_ids.dim() == 2:
        ahead = 0 if rope_deltas is None else rope_deltas.view(-1, 1)
        return position_ids.long(), text_positions(scheme, position_ids + ahead)
    if position_ids.dim() != 3 or len(position_ids) != 1 + len(scheme.axes):
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)} must be (b, s) for text, or (1 + axes, b, s): a row "
            f"of token numbers and one for each of {', '.join(scheme.axes)}"
        )
    return position_ids[0].long(), position_ids[1:].movedim(0, -1)


def text_positions(scheme: Scheme, numbers: Tensor) -> Tensor:
    """Positions (b, s, a) of text tokens with these numbers (b, s) in their row."""
    wide = widest_float(numbers.device)
    origin, step = (torch.tensor(x, dtype=wide, device=numbers.device) for x in scheme.text_line)
    return origin + numbers[..., None].to(wide) * step


def count_tokens(mask: Tensor) -> Tensor:
    """Token numbers (b, s) from 0 at the first token that is no padding; padding counts on, too.

    So no token after the first one restarts the count, which would begin another document.
    """
    first = mask.int().argmax(1, keepdim=True)
    return torch.arange(mask.shape[1], device=mask.device) - first


def default_position_ids(x: Tensor, mask: Tensor | None, past: int | Tensor) -> Tensor:
    """Token numbers (b, s) or (1, s) of text where the caller gave none.

    Args:
        x: the stream (b, s, c).
        mask: (b, past + s), 0 at padding.
        past: number of cached tokens.
    """
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    return torch.arange(x.shape[1], device=x.device)[None] + past
