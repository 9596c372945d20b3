"""position_ids (1 + a, b, s) as transformers takes them: token positions first, then one row per axis."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from rope_mm.checks.arguments import ALIASES, parameters_of, read
from rope_mm.hf.image_grids import (
    IMAGES,
    PACES,
    SIZES,
    VIDEOS,
    close_rows,
    newest,
    read_grids,
    takes_images,
    token_kinds,
)
from rope_mm.hf.packing.leaks import VARLEN
from rope_mm.hf.rotary_embedding import scheme_of
from rope_mm.positions.grids import Cursor
from rope_mm.positions.packing import check_cu_seqlens
from rope_mm.positions.place import PlacedBatch, check_rows
from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Segment, segments_from_token_types

ENDS_IN_IMAGE = (
    "the prompt ends in an image, and the token behind it does not stand one step further on; end it with a "
    "text token, such as the one that closes an image"
)
# arguments of get_rope_index that say nothing about positions of ours: audio stands as text does
HARMLESS = {"audio_seqlens", "audio_feature_lengths", *ALIASES["cache"]}
Row = str | Sequence[Segment] | Sequence[str | Sequence[Segment]]


class Conversation(NamedTuple):
    """Where a cache's rows go on; it belongs to the cache, for one model may hold several.

    Attributes:
        next: the position of each row's next token (b,); NaN where that is not known, behind an image.
        tokens: how many tokens the cache held then.
    """

    next: Tensor
    tokens: int


class Placed(NamedTuple):
    """Tokens that were placed.

    Attributes:
        positions: (b, s, a).
        mask: (b, s), which tokens are no padding.
        next: (b,), the position of each row's next token.
        begins: (b, s), at which tokens a document begins behind another one.
    """

    positions: Tensor
    mask: Tensor
    next: Tensor
    begins: Tensor

    @property
    def numbers(self) -> Tensor:
        """Numbers (b, s) of tokens in their documents, padding not counted."""
        return count_tokens(self.mask, self.begins)


def positions_for(
    model: nn.Module,
    inputs: Sequence[Row] | Mapping[str, Any],
    padding_side: str = "right",
) -> Tensor:
    """position_ids of segments, or of what a processor made, by the scheme that a model runs.

    A row that ends where the next token is not one step ahead, as behind an image, says so by a quarter in
    its last token position, so that `generate`, which takes one step, can be refused.

    Args:
        model: a model that `set_rope` gave a scheme.
        inputs: segments for each row, as text or as a list, or a dict with input_ids, grids and, of padded
            rows, attention_mask, as a processor makes it. A row of several documents is a list of them; in a
            dict, cu_seq_lens_q (counted over all rows) or position_ids (b, s) say where documents begin.
        padding_side: "right" or "left", where segments make rows of unequal lengths.

    Returns:
        (1 + a, b, s): token positions, from 0 in each document, then the position on each axis.

    Raises:
        ValueError: a model without a scheme of ours, tokens that do not match their grids, or an argument
            that the model does not take.
    """
    scheme = scheme_of(model)
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        known = {*parameters_of(type(model)), "mm_token_type_ids", *PACES, *VARLEN}
        refuse_unknown(inputs, known, type(model).__name__)
        placed = place_inputs(getattr(model, "config", None), scheme, **inputs)
    elif isinstance(inputs, Mapping) or any(isinstance(x, Segment) for x in inputs):
        raise ValueError(
            f"{inputs!r} is neither a list of rows of segments, as [[Text(3), Image(2, 2)]], nor what a "
            "processor makes, which has input_ids"
        )
    else:
        placed = place_documents(inputs, scheme, padding_side)
    tokens = placed.numbers.to(placed.positions)
    off_step = off_text_step(placed.positions[:, -1] + 1, placed.next[:, None])
    tokens[:, -1] += 0.25 * (placed.mask[:, -1] & off_step)
    return torch.cat((tokens[None], placed.positions.movedim(-1, 0)))


def position_ids_of(positions: Tensor | PlacedBatch, document_ids: Tensor | None = None) -> Tensor:
    """position_ids as transformers takes them, of positions that were placed without a model.

        position_ids_of(*pack(["text:3 image:2x2", "text:4"]))

    Args:
        positions: (s, a), as `pack` and `place` give them, (b, s, a), or what `place_rows` gives.
        document_ids: (s,) or (b, s), the number of each token's document, as `pack` gives it; None where
            each row is one document.

    Returns:
        (1 + a, b, s): token positions, from 0 in each document, then the position on each axis.

    Raises:
        ValueError: document_ids that do not fit the positions.
    """
    mask = None
    if isinstance(positions, PlacedBatch):
        positions, mask = positions.positions, positions.mask
    positions = positions.view(-1, *positions.shape[-2:])
    b, s = positions.shape[:2]
    mask = torch.ones(b, s, dtype=torch.bool, device=positions.device) if mask is None else mask
    begins = torch.zeros_like(mask)
    if document_ids is not None:
        if document_ids.shape not in ((s,), (b, s)):
            raise ValueError(
                f"document_ids {tuple(document_ids.shape)} do not fit positions of {b} rows of {s} tokens"
            )
        begins[:, 1:] = document_ids.to(mask.device).diff() != 0
    return torch.cat((count_tokens(mask, begins)[None].to(positions), positions.movedim(-1, 0)))


def place_documents(rows: Sequence[Row], scheme: Scheme, padding_side: str) -> Placed:
    """Place rows of segments; a row of several documents starts anew in each.

    Raises:
        ValueError: as `place_rows`.
    """
    check_rows(rows)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    placed = [[scheme.place(document) for document in documents_of(row)] for row in rows]
    blocks = [torch.cat([positions for positions, _ in row]) for row in placed]
    begins = [torch.zeros(len(block), dtype=torch.bool) for block in blocks]
    for row, begin in zip(placed, begins, strict=True):
        ends = torch.tensor([len(positions) for positions, _ in row]).cumsum(0)
        begin[ends[:-1]] = True
    masks = [torch.ones_like(begin) for begin in begins]
    positions, mask, begin = (
        pad_sequence(list(x), batch_first=True, padding_side=padding_side) for x in (blocks, masks, begins)
    )
    return Placed(positions, mask, positions.new_tensor([row[-1][1].next for row in placed]), begin)


def documents_of(row: Row) -> Sequence[Any]:
    """The documents of a row: itself, or those in it."""
    several = not isinstance(row, str) and len(row) and not any(isinstance(x, Segment) for x in row)
    return row if several else [row]


def count_tokens(mask: Tensor, begins: Tensor) -> Tensor:
    """Numbers (b, s) of tokens in their documents.

    Args:
        mask: (b, s), which tokens are no padding.
        begins: (b, s), at which of them a document begins behind another one.
    """
    tokens = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return tokens - (tokens * begins).cummax(-1).values


def off_text_step(step: Tensor, after: Tensor) -> Tensor:
    """Whether one step (b, a) leads elsewhere than to the next token (b, 1), for each row."""
    return ~torch.isclose(step, after.to(step), rtol=0, atol=1e-6).all(-1)


def refuse_unknown(arguments: Mapping[str, Any], known: set[str], name: str) -> None:
    """Refuse arguments with a value that are not known.

    Raises:
        ValueError: with their names.
    """
    given = {key for key, value in arguments.items() if value is not None and value is not False}
    if unknown := sorted(given - known):
        raise ValueError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}")


def place_inputs(
    config: Any,
    scheme: Scheme,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    starts: Sequence[float] | None = None,
    **inputs: Any,
) -> Placed:
    """Place what a processor made.

    Args:
        config: the model's config, which names the tokens of images.
        scheme: its layout places them.
        input_ids: (b, s); None where mm_token_type_ids say what stands where.
        attention_mask: (b, s), 0 at padding.
        starts: where each row's first token stands; 0 if None.
        inputs: mm_token_type_ids, image_grid_thw, video_grid_thw, the seconds of a video's grid, and
            cu_seq_lens_q or position_ids (b, s), which say where documents begin.

    Raises:
        ValueError: tokens of images that do not match their grids, or documents that do not fit the rows.
    """
    kinds = token_kinds(config, input_ids, inputs.get("mm_token_type_ids"))
    if kinds is None:
        raise ValueError(
            "embeddings alone do not say which of them are of an image; give mm_token_type_ids (b, s), "
            "0 for text, 1 for an image, 2 for a video, or position_ids"
        )
    mask = (torch.ones_like(kinds) if getattr(attention_mask, "ndim", 0) != 2 else attention_mask).bool()  # pyright: ignore
    if mask.shape != kinds.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} does not fit tokens {tuple(kinds.shape)}")
    begins = find_begins(mask, inputs.get("cu_seq_lens_q"), inputs.get("position_ids"))
    kinds, inputs = close_rows(config, inputs, kinds * mask, cached=starts is not None)
    seen = read_grids(config, inputs, kinds)
    if starts is not None:
        counts = {kind: int((kinds[mask] == kind).sum()) for kind in seen}
        seen = {kind: newest(seen[kind], counts[kind], lambda image: image.tokens) for kind in seen}
    positions = torch.zeros(*kinds.shape, len(scheme.axes), dtype=torch.float64)
    after = torch.zeros(len(kinds), dtype=torch.float64)
    for row, (kind, there, begin) in enumerate(zip(kinds.cpu(), mask.cpu(), begins.cpu(), strict=True)):
        cursor = Cursor(next=float(starts[row])) if starts is not None else None
        lengths = begin.cumsum(0)[there].unique_consecutive(return_counts=True)[1].tolist()
        blocks = []
        for document in kind[there].split(lengths):
            placed, after_it = scheme.place(segments_from_token_types(document.tolist(), seen), cursor)
            blocks.append(placed)
            after[row], cursor = after_it.next, None
        positions[row, there] = torch.cat(blocks) if blocks else positions[row, there]
    if left := [str(visual) for visuals in seen.values() for visual in visuals]:
        came = ", ".join(left)
        raise ValueError(f"grids came for {came}, but there are no tokens left for them to stand on")
    device, dtype = kinds.device, widest_float(kinds.device)
    return Placed(positions.to(device, dtype), mask, after.to(device, dtype), begins)


def find_begins(mask: Tensor, cu_seqlens: Tensor | None, numbers: Tensor | None) -> Tensor:
    """At which tokens (b, s) a document begins behind another one.

    Args:
        mask: (b, s), which tokens are no padding.
        cu_seqlens: (n + 1,), where documents begin and end, counted over all rows.
        numbers: (b, s) or (1, s), numbers of tokens, which start anew in each document; others count as none.

    Raises:
        ValueError: lengths that do not end with the tokens, or a document in two rows.
    """
    begins = torch.zeros_like(mask)
    if cu_seqlens is not None:
        ends, (b, s) = check_cu_seqlens(cu_seqlens).to(mask.device), mask.shape
        if ends[-1] != b * s or not torch.isin(torch.arange(0, b * s, s, device=mask.device), ends).all():
            raise ValueError(
                f"cu_seq_lens_q {cu_seqlens.tolist()} must count all {b} x {s} tokens, row after row, and no "
                "document may stand in two rows"
            )
        begins.view(-1)[ends[:-1]] = True
    elif numbers is not None and numbers.dim() == 2:
        begins[:, 1:] = (numbers.diff() != 1).to(mask.device) & mask[:, 1:] & mask[:, :-1]
    return begins


def place_forward(
    module: Any, scheme: Any, kwargs: dict[str, Any], cache: Any
) -> tuple[Tensor | None, Tensor | None]:
    """position_ids of a forward that was given none, and where each row's next token stands (b,).

    Args:
        module: the model, whose config names the tokens of images.
        scheme: its layout places them.
        kwargs: the forward's arguments.
        cache: the forward's cache, None without one.

    Returns:
        (1 + a, b, s) and (b,); None twice where the model's own counting will do.

    Raises:
        ValueError: an image whose place or size is not known, or a cache that was filled elsewhere.
    """
    images = [name for name in kwargs if name.startswith("pixel_values") and kwargs[name] is not None]
    if scheme.layout == "flat" and not parameters_of(type(module)):
        return None, None
    if torch.compiler.is_compiling() and not images:
        return None, None
    given = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    tokens = next((x for x in given if x is not None), None)
    if tokens is None:
        return None, None
    s, past = tokens.shape[1], int(cache.get_seq_length()) if cache is not None else 0
    starts = conversation_starts(cache, past, len(tokens)) if past else None
    inputs = {name: kwargs.get(name) for name in SIZES}
    inputs["mm_token_type_ids"] = last_columns(kwargs.get("mm_token_type_ids"), s)
    inputs["cu_seq_lens_q"] = None if past else kwargs.get("cu_seq_lens_q")
    mask = kwargs.get("attention_mask")
    if padded := getattr(mask, "ndim", 0) == 2:
        check_mask(mask, past, s)
    placed = place_inputs(
        module.config,
        scheme,
        kwargs.get("input_ids"),
        last_columns(mask if padded else None, s),
        starts,
        **inputs,
    )
    kinds = token_kinds(module.config, kwargs.get("input_ids"), inputs["mm_token_type_ids"])
    if images and kinds is not None and not kinds.any():
        raise ValueError(
            f"{' and '.join(images)} came, but no token says where the image stands; give input_ids with the "
            "config's image tokens, or position_ids"
        )
    count = token_numbers(mask if padded else None, past, tokens) if past else placed.numbers
    return torch.cat((count[None].to(placed.positions), placed.positions.movedim(-1, 0))), placed.next


def check_mask(mask: Any, past: int, s: int) -> None:
    """Refuse a mask that does not cover the cache and the new tokens.

    Raises:
        ValueError: with both lengths.
    """
    if mask.shape[1] != past + s:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the cache holds {past} tokens and {s} are new; "
            f"give (b, {past + s})"
        )


def conversation_starts(cache: Any, past: int, rows: int) -> list[float]:
    """Where each row goes on from a cache.

    Raises:
        ValueError: a cache that our hooks did not see filled, or that ends in an image of unknown place.
    """
    talk = getattr(cache, "rope_mm_conversation", None)
    if talk is None or talk.tokens != past:
        why = (
            f"this cache holds {past} tokens of unknown positions, as where another model filled it"
            if talk is None
            else f"this cache held {talk.tokens} tokens after the last forward that placed them and holds "
            f"{past} now: it was cropped, or filled elsewhere"
        )
        raise ValueError(
            f"{why}; give position_ids of the new tokens, the last columns of what `positions_for` makes for "
            "the whole sequence, or begin with a new cache"
        )
    starts = talk.next.repeat_interleave(rows // len(talk.next)).tolist()
    if any(start != start for start in starts):
        raise ValueError(ENDS_IN_IMAGE)
    return starts


def last_columns(x: Tensor | None, s: int) -> Tensor | None:
    """The columns of the new tokens."""
    return None if x is None else x[:, -s:]


def token_numbers(mask: Tensor | None, past: int, tokens: Tensor) -> Tensor:
    """Numbers (b, s) of tokens in their rows, padding not counted."""
    b, s = tokens.shape[:2]
    if mask is None:
        return torch.arange(past, past + s, device=tokens.device).expand(b, -1)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -s:]


def next_positions(positions: Tensor, marks: Tensor, mask: Any) -> Tensor:
    """Where each row's next token stands (b,), NaN if that is unknown.

    Args:
        positions: (b, s, a), as they were given.
        marks: (b, s), whether the next token is not one step behind a token, as `positions_for` marks it.
        mask: (b, s) or wider, 0 at padding; any other mask counts as none.
    """
    b, s, _ = positions.shape
    padded = getattr(mask, "ndim", 0) == 2
    there = mask[:, -s:].long() if padded else torch.ones(1, s, dtype=torch.long, device=positions.device)
    last = (there * torch.arange(1, s + 1, device=positions.device)).argmax(-1).expand(b)
    rows = torch.arange(b, device=positions.device)
    after = positions[rows, last].amax(-1).to(widest_float(positions.device)) + 1
    return after.where(~marks.expand(b, s)[rows, last], torch.nan)


def get_rope_index(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Replaces a model's own method: positions (a, b, s) by our layout, and the rope delta (b, 1)."""
    method = type(self).get_rope_index
    bound = inspect.signature(method).bind(self, *args, **kwargs).arguments
    more = bound.pop("kwargs", {})
    inputs = {name: value for name, value in {**bound, **more}.items() if name != "self"}
    known = {"input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw", *PACES}
    ignored = HARMLESS | set(parameters_of(type(self))) - set(parameters_of(type(self), "get_rope_index"))
    refuse_unknown(inputs, known | ignored, f"get_rope_index of {type(self).__name__} under our layout")
    named = {name: value for name, value in inputs.items() if name in known}
    placed = place_inputs(self.config, scheme_of(self), **named)
    count = placed.mask.sum(-1, keepdim=True).to(placed.next)
    return placed.positions.movedim(-1, 0), placed.next[:, None] - count


def prepare_positions(self: Any, inputs: Tensor, given: dict[str, Any]) -> Tensor:
    """Replaces a model's own method: positions of a prompt, if `generate` can go on from them."""
    count = GenerationMixin._prepare_position_ids_for_generation(self, inputs, given)
    tokens = given.get("input_ids")
    tokens = inputs if tokens is None or not tokens.shape[1] else tokens
    cache, scheme = read(given, "cache"), scheme_of(self)
    past = int(cache.get_seq_length()) if cache is not None else 0
    named = {name: given.get(name) for name in SIZES}
    kinds = given.get("mm_token_type_ids")
    ids = tokens if tokens.ndim == 2 else None
    whole = tokens.shape[1] > past
    new = tokens.shape[1] - past * whole
    mask = given.get("attention_mask")
    if past and not grids_cover(self.config, named, token_kinds(self.config, ids, kinds)):
        starts = conversation_starts(cache, past, len(tokens))
        ids, kinds, mask = (last_columns(x, new) for x in (ids, kinds, mask))
    else:
        starts, kinds = None, last_columns(kinds, tokens.shape[1])
    placed = place_inputs(self.config, scheme, ids, mask, starts, mm_token_type_ids=kinds, **named)
    if off_text_step(placed.positions[:, -1] + 1, placed.next[:, None]).any():
        raise ValueError(ENDS_IN_IMAGE)
    positions = placed.positions.movedim(-1, 0)
    count = count.expand(positions.shape[1], -1)
    filled = positions.new_zeros(len(positions), *count.shape)
    filled[..., -positions.shape[-1] :] = positions
    return torch.cat((count[None].to(positions), filled))


def grids_cover(config: Any, inputs: Mapping[str, Any], kinds: Tensor | None) -> bool:
    """Whether grids came for all image and video tokens, those in the cache too."""
    if kinds is None or not kinds.any():
        return False
    try:
        seen = read_grids(config, inputs, kinds)
    except ValueError:
        return False
    return all(sum(x.tokens for x in seen[kind]) == int((kinds == kind).sum()) for kind in (IMAGES, VIDEOS))


METHODS = {"get_rope_index": get_rope_index, "_prepare_position_ids_for_generation": prepare_positions}


def position_methods(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parts of a model that takes images beside text, and the methods with which they place them."""
    found = [(part, name) for part in model.modules() for name in METHODS if hasattr(type(part), name)]
    return [(part, name) for part, name in found if name == "get_rope_index" or takes_images(part)]
