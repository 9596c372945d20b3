"""Sequences of strings and segments -> the tensors that the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rope_mm.models.position_ids import count_tokens, pack_position_ids
from rope_mm.models.tokenizers import IMAGE_TOKEN
from rope_mm.nn.attention import make_block_ids
from rope_mm.positions.grids import merge_order
from rope_mm.rotary.definition import widest_float
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Segment, Text

LAST_BLOCK = torch.iinfo(torch.int32).max  # the block of padding, which no token sees
PADDING = 0, 0.0, LAST_BLOCK, False  # of input ids, positions, block ids and the mask


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences side by side, padded to the longest; their patches are given beside them.

    Attributes:
        input_ids: (b, s), the image token where a patch stands.
        positions: (b, s, a), of the scheme's axes.
        block_ids: (b, s), see `make_block_ids`.
        mask: (b, s), true at tokens that are no padding.
        rope_deltas: (b,), by how much the next text token stands beyond the number of tokens before it.
    """

    input_ids: Tensor
    positions: Tensor
    block_ids: Tensor
    mask: Tensor
    rope_deltas: Tensor

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same on another device, positions in float32 where it has no float64."""
        wide = widest_float(device)
        columns = (getattr(self, field.name) for field in fields(self))
        return SequenceBatch(*(x.to(device, wide if x.is_floating_point() else x.dtype) for x in columns))

    def repeat_rows(self, rows: int) -> "SequenceBatch":
        """This number of rows: the first ones, or all and then again from the top."""
        order = torch.arange(rows, device=self.mask.device) % len(self.mask)
        return SequenceBatch(*(getattr(self, field.name)[order] for field in fields(self)))

    def inputs(self, angles: RotaryAngles | None = None) -> dict[str, Any]:
        """Keyword arguments of a forward or of `generate`.

        Args:
            angles: `model.rotary.angles(positions)` of these rows, where several models or passes share them;
                then position_ids (b, s) only number the tokens, and this is for forwards alone.
        """
        shared = {
            "input_ids": self.input_ids,
            "attention_mask": self.mask.long(),
            "block_ids": self.block_ids,
        }
        if angles is not None:
            return shared | {"position_ids": count_tokens(self.mask), "angles": angles}
        position_ids = pack_position_ids(self.positions, self.mask)
        return shared | {"position_ids": position_ids, "rope_deltas": self.rope_deltas}


def require_list(name: str, given: object) -> None:
    """Refuse a string where a list is meant: it would be read letter by letter.

    Raises:
        ValueError: with the list to write instead.
    """
    if isinstance(given, str):
        raise ValueError(f"{name} must be a list, not the string {given!r}; write [{given!r}]")


class EncodedSequence(NamedTuple):
    """One sequence's tokens.

    Attributes:
        input_ids: (s,), the image token where a patch stands.
        positions: (s, a), of the scheme's axes.
        block_ids: (s,), see `make_block_ids`.
        rope_delta: by how much the next text token stands beyond the number of tokens.
    """

    input_ids: Tensor
    positions: Tensor
    block_ids: Tensor
    rope_delta: float


def encode(
    sequences: Sequence[Sequence[str | Segment]],
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    add_end: bool = False,
    full_video: bool = False,
) -> list[EncodedSequence]:
    """Tokens, positions and blocks of sequences such as ["a handwritten seven", Image(4, 4)].

    Args:
        sequences: strings become text tokens; an Image or Video becomes one image token for each patch.
        tokenizer: it has the image token.
        scheme: places the tokens.
        add_end: whether a sequence that ends in text gets the tokenizer's end after it.
        full_video: see `make_block_ids`.

    Raises:
        ValueError: a string where a list is meant.
    """
    require_list("sequences", sequences)
    image, end = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.eos_token_id
    texts = {part for sequence in sequences for part in sequence if isinstance(part, str)}
    text_ids = {
        text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    }
    rows, placed = [], {}
    for sequence in sequences:
        require_list("a sequence", sequence)
        last = [[end]] if add_end and end is not None and isinstance(sequence[-1], str) else []
        ids = [text_ids[part] if isinstance(part, str) else [image] * part.tokens for part in sequence] + last
        parts = [*sequence, *[""] * len(last)]
        segments = tuple(
            Text(len(i)) if isinstance(part, str) else part for part, i in zip(parts, ids, strict=True) if i
        )
        if segments not in placed:  # captions of one length and image size stand at the same positions
            positions, cursor = scheme.place(segments)
            rope_delta = cursor.next - cursor.tokens
            placed[segments] = positions, make_block_ids(segments, full_video), rope_delta
        rows.append(EncodedSequence(torch.tensor([i for part in ids for i in part]), *placed[segments]))
    return rows


def build_batch(
    sequences: Sequence[Sequence[str | Segment]],
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    padding_side: str = "right",
    full_video: bool = False,
) -> SequenceBatch:
    """A batch of sequences, padded to the longest.

    Args:
        sequences: see `encode`.
        tokenizer: it has the image token.
        scheme: places the tokens.
        padding_side: "right", or "left" as `generate` wants it.
        full_video: see `make_block_ids`.
    """
    return collate(encode(sequences, tokenizer, scheme, full_video=full_video), padding_side)


def collate(rows: Sequence[EncodedSequence], padding_side: str = "right") -> SequenceBatch:
    """Encoded sequences as one batch, padded to the longest on the "right" or the "left"."""
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    *columns, deltas = (list(column) for column in zip(*rows, strict=True))
    valid = [torch.ones(len(row.input_ids), dtype=torch.bool) for row in rows]
    padded = (pad(x, padding_value=fill) for x, fill in zip([*columns, valid], PADDING, strict=True))
    return SequenceBatch(*padded, rope_deltas=torch.tensor(deltas, dtype=torch.float64))


def token_order(segment: Segment, scheme: Scheme) -> Tensor:
    """Which patch (n,), in raster order, each token of a segment is: a merging layout goes block by block."""
    raster = torch.arange(segment.tokens)[:, None]
    return merge_order(raster, segment, dict(scheme.options).get("merge", 1))[:, 0]
