"""Stories of strings and segments -> the tensors that the model reads."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from rope_mm.models.position_ids import pack_position_ids
from rope_mm.models.tokenizers import word_level_tokenizer
from rope_mm.nn.attention import block_ids
from rope_mm.positions.grids import merge_order
from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Segment, Text

IMAGE_TOKEN = "<image>"
OWN: dict[str, Callable[[Iterable[str]], PreTrainedTokenizerBase]] = {
    "bytes": lambda texts: ByT5Tokenizer(extra_ids=0),
    "words": word_level_tokenizer,
}
PADDING = 0, 0.0, torch.iinfo(torch.int32).max, False  # a rank above all, from which all is seen


@dataclass(frozen=True)
class SequenceBatch:
    """Stories side by side, beside their patches: tensors (b, s), positions (b, s, a), padded.

    `mask` is true at tokens that are no padding; `deltas` (b,) is by how much the next word stands beyond the
    number of tokens before it.
    """

    input_ids: Tensor
    positions: Tensor
    rank: Tensor
    mask: Tensor
    deltas: Tensor

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same on another device, positions in float32 where it has no float64."""
        wide = widest_float(device)
        columns = (getattr(self, field.name) for field in fields(self))
        return SequenceBatch(*(x.to(device, wide if x.is_floating_point() else x.dtype) for x in columns))

    def cycle(self, rows: int) -> "SequenceBatch":
        """So many rows: the first ones, or all and then again from the top."""
        order = torch.arange(rows, device=self.mask.device) % len(self.mask)
        return SequenceBatch(*(getattr(self, field.name)[order] for field in fields(self)))

    def inputs(self) -> dict[str, Tensor]:
        """As keyword arguments of a forward or of `generate`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.mask.long(),
            "position_ids": pack_position_ids(self.positions, self.mask),
            "rank": self.rank,
            "rope_deltas": self.deltas,
        }


def load_tokenizer(name: str = "bytes", texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes, which needs no file, of the words of texts, or any of Hugging Face's.

    Args:
        name: "bytes", "words", a folder or a hub name.
        texts: what "words" is made of.

    Raises:
        ValueError: a name that transformers cannot load, or no words.
    """
    if name in OWN:
        tokenizer = OWN[name](texts)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"no tokenizer {name!r}: give bytes, words, a folder or a hub name ({reason})"
            ) from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


class EncodedSequence(NamedTuple):
    """One story's tokens: ids (s,), positions (s, a), ranks (s,), and how far the next word is ahead."""

    ids: Tensor
    positions: Tensor
    rank: Tensor
    ahead: float


def encode(
    stories: Sequence[Sequence[str | Segment]],
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    ended: bool = False,
    full: bool = False,
) -> list[EncodedSequence]:
    """Rows of stories such as ["a handwritten seven", Image(4, 4)].

    Strings become words; an Image or Video becomes that many image tokens, for patches given beside it.
    Where `ended`, a story that ends in words has the tokenizer's end after them; `full`, see `block_ids`.
    """
    image, last = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.eos_token_id
    words = {part for story in stories for part in story if isinstance(part, str)}
    spelt = {
        part: tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in words
    }
    rows, placed = [], {}
    for story in stories:
        end = [[last]] if ended and last is not None and isinstance(story[-1], str) else []
        ids = [spelt[part] if isinstance(part, str) else [image] * part.tokens for part in story] + end
        parts = [*story, *[""] * len(end)]
        shape = tuple(
            Text(len(i)) if isinstance(part, str) else part for part, i in zip(parts, ids, strict=True) if i
        )
        if shape not in placed:
            positions, cursor = scheme.place(shape)
            placed[shape] = positions, block_ids(shape, full), cursor.next - cursor.tokens
        rows.append(EncodedSequence(torch.tensor([i for part in ids for i in part]), *placed[shape]))
    return rows


def build_batch(
    stories: Sequence[Sequence[str | Segment]],
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    padding_side: str = "right",
    full: bool = False,
) -> SequenceBatch:
    """A batch of stories, padded to the longest; see `encode`. `generate` wants the padding on the left."""
    return collate(encode(stories, tokenizer, scheme, full=full), padding_side)


def collate(rows: Sequence[EncodedSequence], padding_side: str = "right") -> SequenceBatch:
    """Rows as one batch, padded to the longest."""
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    *columns, ahead = (list(column) for column in zip(*rows, strict=True))
    there = [torch.ones(len(row.ids), dtype=torch.bool) for row in rows]
    ids, positions, rank, mask = (
        pad(x, padding_value=fill) for x, fill in zip([*columns, there], PADDING, strict=True)
    )
    return SequenceBatch(ids, positions, rank, mask, torch.tensor(ahead, dtype=torch.float64))


def token_order(segment: Segment, scheme: Scheme) -> Tensor:
    """Which patch (n,), in raster order, each token of a segment is: towers' blocks come one by one."""
    raster = torch.arange(segment.tokens)[:, None]
    return merge_order(raster, segment, dict(scheme.options).get("merge", 1))[:, 0]
