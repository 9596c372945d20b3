"""Attention masks of blocks and packed documents, in the form that each backend of transformers takes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from rope_mm.models.varlen import make_varlen_mask
from rope_mm.nn.attention import make_mask_fn
from rope_mm.nn.patches import has_values


def find_document_ids(numbers: Tensor, mask: Tensor | None, ends: Tensor | None) -> Tensor | None:
    """Which packed document each token belongs to, (b, s) or (1, s); None where each row is one document.

    Args:
        numbers: token numbers (b, s); a document begins where they do not rise by one.
        mask: (b, past + s), 0 at padding, which begins no document.
        ends: cumulative lengths of the documents (n + 1,), used instead of the numbers where given.
    """
    if ends is not None:
        tokens = torch.arange(numbers.shape[-1], device=numbers.device)
        return torch.searchsorted(ends.to(tokens), tokens, right=True)[None]
    if numbers.shape[-1] < 2 or not has_values(numbers):
        return None
    begins = numbers.diff(dim=1) != 1
    if mask is not None and mask.dim() == 2:
        valid = mask[:, -numbers.shape[1] :].bool()
        begins = begins & valid[:, 1:] & valid[:, :-1]
    return pad(begins.cumsum(1), (1, 0)) if begins.any() else None


def is_flash(config: PreTrainedConfig) -> bool:
    """Whether a config names a flash attention backend, a package's or a hub kernel's."""
    return "flash" in (config._attn_implementation or "")


def count_cached(cache: Cache | None, new: int) -> tuple[int | Tensor, int, int]:
    """Cached tokens, keys that `new` tokens attend to, and the number of the first of these keys."""
    if cache is None:
        return 0, new, 0
    past, (size, start) = cache.get_seq_length(), cache.get_mask_sizes(new, 0)
    return past.clone() if isinstance(past, Tensor) else past, size, start  # a static cache counts in place


def check_columns(mask: Tensor | None, past: int | Tensor, new: int) -> None:
    """Refuse a mask (b, columns) that lacks cached or new tokens."""
    if mask is not None and isinstance(past, int) and mask.shape[1] < past + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {past} cached and {new} new tokens; give one "
            "for each of them"
        )


def make_mask(
    config: PreTrainedConfig,
    x: Tensor,
    mask: Any,
    cache: Cache | None,
    block_ids: Tensor | None,
    document_ids: Tensor | None,
) -> Any:
    """The mask that the config's attention backend takes.

    Args:
        config: names the backend.
        x: the stream (b, s, c).
        mask: (b, past + s), 0 at padding, or None; a mask of any other form is returned as it is.
        cache: of the past tokens.
        block_ids: (b, s), see `make_mask_fn`; None where each token is its own block.
        document_ids: (b, s), or None where each row is one document.

    Raises:
        ValueError: a mask without the cached tokens, a mask of another form for flash attention.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if is_flash(config):
            raise ValueError(
                f"{config._attn_implementation} takes no attention_mask of another form than (b, s); take "
                "flex_attention"
            )
        return mask  # the caller has made it already
    past, size, start = count_cached(cache, x.shape[1])
    check_columns(mask, past, x.shape[1])
    backend = config._attn_implementation or "sdpa"
    causal = block_ids is None and document_ids is None
    blocks = torch.arange(x.shape[1], device=x.device)[None] if block_ids is None else block_ids
    rows = [ids.expand(len(x), -1) for ids in (blocks, document_ids) if ids is not None]
    if is_flash(config) and not causal:
        return make_varlen_mask(rows[0], (*rows[1:], None)[0], mask, int(past), size)
    return ALL_MASK_ATTENTION_FUNCTIONS[backend](
        batch_size=len(x),
        q_length=x.shape[1],
        kv_length=size,
        q_offset=past,
        kv_offset=start,
        mask_function=causal_mask_function if causal else make_mask_fn(rows[0], *rows[1:], past=past),
        attention_mask=None if mask is None else mask.to(x.device, torch.bool),
        allow_is_causal_skip=causal
        and has_values(x)
        and not (getattr(cache, "is_compileable", False) and x.shape[1] == 1),
        dtype=x.dtype,
        device=x.device,
        config=config,
    )
