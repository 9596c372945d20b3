"""Documents in one row: what keeps them apart in transformers, and the refusal of what does not.

transformers has three ways. Masks (eager, sdpa, flex_attention) begin a document where token positions do not
rise by one, if there is no cache and no mask (b, s). flash-attention takes cumulative lengths, all four
arguments of VARLEN. Without them it reads the token positions of a batch of one row.
"""

import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from rope_mm.checks.arguments import read
from rope_mm.positions.place import place
from rope_mm.schemes.scheme import Scheme

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
TYPES = ("token_type_ids", "mm_token_type_ids")  # what names the tokens of images
STATES = ("conv", "linear_attention", "mamba", "recurrent", "hybrid", "hybrid_sliding")
REMEDY = "rope_mm.hf.PackingCollator makes batches that keep them apart"
MIXED = (
    "does not keep documents with images apart in one row: transformers lays the mask of one document's "
    "images over the places of the next; put one example with images in a row, as with a batch of one and "
    "gradient accumulation, or pad"
)
# documents of one image at the start, where some layouts bring the text behind it back to 0
SHAPES = (
    "image:1x1",
    "image:2x2",
    "image:3x2",
    "image:1x4",
    "image:5x5",
    "image:4x4",
    "video:2x2x4",
    "video:3x2x2",
)
IMAGE_FIRST = [f"{shape} text:3" for shape in SHAPES]


def is_flash(config: Any) -> bool:
    """Whether the text of a model attends by a kernel of flash-attn, a package's or the hub's."""
    return "flash" in (getattr(config.get_text_config(), "_attn_implementation", None) or "")


def takes_lengths(kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward is given all that kernels of variable lengths need."""
    return all(kwargs.get(name) is not None for name in VARLEN)


def caches_by_default(config: Any) -> bool:
    """Whether a model of this config, or the text in it, makes a cache without being asked."""
    return any(getattr(part, "use_cache", False) for part in (config, config.get_text_config()))


def carries_state(module: Any) -> bool:
    """Whether layers of a model carry a state from token to token: Mamba, convolutions, linear attention."""
    layers = getattr(module.config.get_text_config(), "layer_types", None) or ()
    return getattr(type(module), "_is_stateful", False) or any(x in STATES for x in layers)


def real_tokens(mask: Any, s: int) -> Tensor | None:
    """Which of the last s tokens (b, s) are no padding; None where no mask (b, s) says it."""
    return mask[:, -s:].bool() if getattr(mask, "ndim", 0) == 2 else None


def refuse_packing_leak(module: Any, tokens: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Refuse packed rows where transformers would let documents see one another.

    Args:
        module: the model.
        tokens: (b, s), token positions.
        kwargs: the forward's arguments.

    Raises:
        ValueError: token positions that start again where nothing in the forward reads it.
    """
    if tokens.shape[-1] == 1 or torch.compiler.is_compiling() or takes_lengths(kwargs):
        return
    mask: Any = kwargs.get("attention_mask")
    there = real_tokens(mask, tokens.shape[-1])
    use_cache = kwargs.get("use_cache")
    config = getattr(module, "config", None)
    if config is None:  # a layer that holds its rotary module itself; its model's forward was checked
        return
    cached = caches_by_default(config) if use_cache is None else use_cache
    flash = is_flash(config) and len(tokens) > 1
    leaks = cached or flash if mask is None else there is not None or read(kwargs, "cache") is not None
    count = tokens if there is None else tokens.where(there, -1)
    if not (count < count.cummax(-1).values).logical_and(count >= 0).any():
        return
    if carries_state(module):
        raise ValueError(
            f"token positions start again within a row, but layers of {type(module).__name__} carry a state "
            "from one document into the next; put one document in a row, and pad"
        )
    if mask is None and (
        (mixes_image_blocks(type(module), config) and blocks_are_moved(tokens, kwargs))
        or (kwargs.get(TYPES[0]) is not None and joins_prefixes(type(module)))
    ):
        raise ValueError(f"{type(module).__name__} {MIXED}")
    if not leaks:
        return
    if flash and not cached:
        raise ValueError(
            "token positions start again within a row, which flash-attention reads in a batch of one row "
            f"alone, not of {len(tokens)}; put all in one row, or give {', '.join(VARLEN)}: {REMEDY}"
        )
    raise ValueError(
        "token positions start again within a row, and with a cache or a mask (b, s) transformers "
        f"lets the documents see one another; pass use_cache=False and no mask: {REMEDY}"
    )


def mixes_image_blocks(cls: type, config: Any) -> bool:
    """Whether a model of transformers lays blocks of images over places before these are renumbered.

    `create_causal_mask` renumbers the places of packed rows within `or_mask_function`, but not within
    `block_sequence_ids` (transformers, masking_utils.py). Gemma 3 and 4 give blocks of images by the former.
    """
    named = getattr(config.get_text_config(), "use_bidirectional_attention", False)
    function = "or_mask_function=blockwise_overlay"
    return named is not None and not is_flash(config) and source_has(cls.__module__, function)


@cache
def source_has(module: str, text: str) -> bool:
    """Whether the source of a module has a text."""
    with suppress(OSError, TypeError, KeyError):
        return text in inspect.getsource(sys.modules[module])
    return False


def joins_prefixes(cls: type) -> bool:
    """Whether prefixes of all documents are one block that lies over their mask (PaliGemma before 5.24)."""
    return lays_blocks_last() and source_has(cls.__module__, "torch.where(token_type_ids == 0, 0, -1)")


@cache
def lays_blocks_last() -> bool:
    """Whether transformers lays blocks over the mask of documents, as it did before 5.24."""
    source = inspect.getsource(create_causal_mask)
    names = "packed_sequence_mask_function(", "blockwise_overlay("
    return source.rfind(names[0]) < source.rfind(names[1])


def blocks_are_moved(tokens: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether images by token types stand elsewhere in the row than at the same numbers of its documents.

    Args:
        tokens: (b, s), token positions.
        kwargs: the forward's arguments, of which token_type_ids or mm_token_type_ids (b, s) name the images.
    """
    given = next((kwargs[x] for x in TYPES if kwargs.get(x) is not None), None)
    if given is None or given.shape[-1] != tokens.shape[-1]:
        return False
    images = (given > 0) & (given < 3)
    tokens = tokens.to(given.device).expand(len(given), -1)
    follows = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    moved = images.gather(1, tokens.clamp(0, tokens.shape[-1] - 1)) != images
    return bool((moved & ((tokens > 0) | (follows > 0))).any())  # padding is documents of one token


def refuse_hidden_documents(
    scheme: Scheme | None, positions: Tensor, tokens: Tensor | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuse rows whose positions start again where no token number does: documents would see one another.

    Args:
        scheme: that placed them; None where the model keeps its own rope, which is not checked.
        positions: (b, s, a).
        tokens: (b, s), token positions; None where the forward has none.
        kwargs: the forward's arguments.

    Raises:
        ValueError: such a row, if no mask (b, h, s, s) and no lengths keep its documents apart.
    """
    if positions.shape[1] < 3 or torch.compiler.is_compiling() or not shows_restarts(scheme):
        return
    mask: Any = kwargs.get("attention_mask")
    if takes_lengths(kwargs) or getattr(mask, "ndim", 0) > 2 or isinstance(mask, dict):
        return
    starts = (positions[:, 1:-1] == 0).all(-1) & (positions[:, 2:] == 1).all(-1)
    there = real_tokens(mask, positions.shape[1])
    if there is not None:
        starts = starts & there[:, :-2] & there[:, 1:-1] & there[:, 2:]
    if tokens is not None:
        starts = starts & (tokens[:, 1:-1] - tokens[:, :-2] == 1)
    if starts.any():
        place_ = int(starts.any(0).nonzero()[0, 0]) + 1
        raise ValueError(
            f"positions start again at token {place_} of a row, but row 0 of position_ids, the token "
            "positions, does not, so the documents would see one another; let row 0 start at 0 in each "
            f"document, as positions_for and position_ids_of do: {REMEDY}"
        )


def shows_restarts(scheme: Scheme | None) -> bool:
    """Whether positions 0 and then 1 on all axes, behind other tokens, can only be of another document."""
    return scheme is not None and restarts_are_visible(scheme.layout, scheme.options)


@cache
def restarts_are_visible(layout: str, options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether text never goes back to 0 within a document of this layout."""
    placed = []
    for document in IMAGE_FIRST:
        with suppress(ValueError):  # grids that do not divide into a tower's blocks
            placed.append(place(document, layout, **dict(options))[0])
    return bool(placed) and not any(
        ((positions[1:-1] == 0).all(-1) & (positions[2:] == 1).all(-1)).any() for positions in placed
    )
