"""The border to transformers: positions (1 + a, b, s), row 0 counting tokens; inside they are (b, s, a)."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from rope_mm.nn.attention import make_mask_fn
from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme


def pack_position_ids(positions: Tensor, mask: Tensor) -> Tensor:
    """Position ids (1 + a, b, s) of positions (b, s, a) and the mask (b, s) of tokens that are no padding."""
    first = mask.int().argmax(1, keepdim=True)
    count = torch.arange(mask.shape[1], device=mask.device) - first  # through padding too: no token restarts
    return torch.cat([count[None].to(positions), positions.movedim(-1, 0)])


def text_positions(scheme: Scheme, count: Tensor) -> Tensor:
    """Positions (b, s, a) of words that stand at these numbers (b, s) of their row."""
    wide = widest_float(count.device)
    origin, step = (torch.tensor(x, dtype=wide, device=count.device) for x in scheme.word_line)
    return origin + count[..., None].to(wide) * step


def unpack_position_ids(position_ids: Tensor, scheme: Scheme, deltas: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens' numbers (b, s) and positions (b, s, a) of position ids (1 + a, b, s), or (b, s) of words alone.

    `deltas` (b,) is by how much words stand beyond their tokens' number, after pictures.

    Raises:
        ValueError: position ids of any other shape.
    """
    if position_ids.dim() == 2:
        ahead = 0 if deltas is None else deltas.view(-1, 1)
        return position_ids.long(), text_positions(scheme, position_ids + ahead)
    if position_ids.dim() != 3 or len(position_ids) != 1 + len(scheme.axes):
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)} must be (b, s) for words, or (1 + axes, b, s): a row "
            f"of token numbers and one for each of {', '.join(scheme.axes)}"
        )
    return position_ids[0].long(), position_ids[1:].movedim(0, -1)


def count_tokens(x: Tensor, mask: Tensor | None, past: int | Tensor) -> Tensor:
    """Tokens' numbers (b, s) or (1, s) of the stream x, from the mask (b, past + s) where there is one."""
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    return torch.arange(x.shape[1], device=x.device)[None] + past


def document_ids(count: Tensor, mask: Tensor | None, ends: Tensor | None) -> Tensor | None:
    """Numbers (b, s) of packed documents, None where each row is one.

    `ends` are their lengths summed up, (n + 1,); without, a document begins where the count does not go on.
    """
    if ends is not None:
        tokens = torch.arange(count.shape[-1], device=count.device)
        return torch.searchsorted(ends.to(tokens), tokens, right=True)[None]
    if count.shape[-1] < 2 or torch.compiler.is_compiling():
        return None
    begins = count.diff(dim=1) != 1
    if mask is not None and mask.dim() == 2:
        there = mask[:, -count.shape[1] :].bool()
        begins = begins & there[:, 1:] & there[:, :-1]
    if not begins.any():
        return None
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0))


def make_mask(
    config: PreTrainedConfig,
    x: Tensor,
    mask: Any,
    cache: Cache | None,
    rank: Tensor | None,
    document: Tensor | None,
) -> Any:
    """The mask that the chosen backend takes, from ranks (b, s) and the mask (b, past + s) of padding.

    Raises:
        ValueError: a mask without the cached tokens; pictures for a backend that looks back alone.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask  # somebody made it already
    past, size, start = 0, x.shape[1], 0
    if cache is not None:
        past, (size, start) = cache.get_seq_length(), cache.get_mask_sizes(x.shape[1], 0)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
    if mask is not None and isinstance(past, int) and mask.shape[1] < past + x.shape[1]:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {past} cached and {x.shape[1]} new tokens; it "
            "must tell of all of them"
        )
    backend = config._attn_implementation or "sdpa"
    plain = rank is None and document is None
    if not plain and "flash" in backend and rank is not None and bool((rank.diff(dim=1) == 0).any()):
        raise ValueError(f"{backend} cannot let patches see each other; take sdpa, eager or flex_attention")
    order = torch.arange(x.shape[1], device=x.device)[None] if rank is None else rank
    whole = [t.expand(len(x), -1) for t in (order, document) if t is not None]
    return ALL_MASK_ATTENTION_FUNCTIONS[backend](
        batch_size=len(x),
        q_length=x.shape[1],
        kv_length=size,
        q_offset=past,
        kv_offset=start,
        mask_function=causal_mask_function if plain else make_mask_fn(whole[0], *whole[1:], past=past),
        attention_mask=None if mask is None else mask.to(x.device, torch.bool),
        allow_is_causal_skip=plain and not (getattr(cache, "is_compileable", False) and x.shape[1] == 1),
        dtype=x.dtype,
        device=x.device,
        config=config,
    )
