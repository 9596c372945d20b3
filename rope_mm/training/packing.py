"""Documents packed into rows, and beside each what is to be drawn as a draft of it.

A draft is a block of noise that stands where its picture or frame stands, sees what that sees, and is seen by
nobody: all pictures of a row are drawn in one pass, each after the true ones before it, as `draw_frames`
draws them one by one. A picture or frame that is drawn at the very end of a document is read by nobody, so
only its draft stands there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.data.documents import Document, Visual, first_fit
from rope_mm.models.processing_rope_mm import RopeMMProcessor
from rope_mm.models.sequences import PADDING, EncodedSequence, SequenceBatch, collate, encode
from rope_mm.rotary.definition import widest_float
from rope_mm.training.throughput import count_pairs

SampleTime = Callable[[int, torch.Generator], Tensor]
Batch = TypeVar("Batch")
NONE = -100  # the label of what is no word to predict


@dataclass(frozen=True)
class CriticInputs:
    """Documents with something to draw, one in a row, as a critic reads them.

    Of their patches (b, n, p), padded, `there` (b, n) tells which there are, `drawn` (b, n) which are drawn.
    """

    sequences: SequenceBatch
    patches: Tensor
    there: Tensor
    drawn: Tensor

    @property
    def count(self) -> int:
        """How many documents have something to draw; where none has, a blank stands there."""
        return int(self.drawn.any(1).sum())


@dataclass(frozen=True)
class PackedBatch:
    """Packed documents (b, s), and their patches (n, p), in order, a draft's being what it is to become.

    `draft` (n,) tells which patches are drafts; those begin as `noise` (m, p), and a part `time` (m, 1) of
    the way from there to the patch is already gone. `labels` (b, s) are the words to predict, else -100.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    block_ids: Tensor
    document_ids: Tensor
    labels: Tensor
    patches: Tensor
    draft: Tensor
    noise: Tensor
    time: Tensor
    whole: CriticInputs | None = None

    @property
    def target(self) -> Tensor:
        """What the drafts (m, p) are to become."""
        return self.patches[self.draft]

    @property
    def tokens(self) -> int:
        """How many there are, drafts included, padding not."""
        return int(self.attention_mask.sum())

    @property
    def critical(self) -> CriticInputs:
        """What a critic reads.

        Raises:
            ValueError: a pack that was made for no critic.
        """
        if self.whole is None:
            raise ValueError("a critic reads whole documents; pack them by Packer(..., whole=True)")
        return self.whole

    @property
    def words(self) -> int:
        """How many words are predicted."""
        return int((self.labels != NONE).sum())

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """How many tokens, pairs of them in one document, words, drafts, and documents for a critic."""
        documents = self.whole.count if self.whole else 0
        return (
            self.tokens,
            count_pairs(self.document_ids, self.attention_mask),
            self.words,
            len(self.noise),
            documents,
        )

    def inputs(self) -> dict[str, Tensor]:
        """As keyword arguments of a forward: every draft as it begins."""
        begun = self.noise.lerp(self.target, self.time)
        names = "input_ids", "attention_mask", "position_ids", "block_ids", "document_ids"
        return {name: getattr(self, name) for name in names} | {
            "patches": self.patches.masked_scatter(self.draft[:, None], begun)
        }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """A dataclass of tensors on another device, positions in float32 where it has no float64."""
    wide = widest_float(device)

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device, wide if part.dtype == torch.float64 else part.dtype)
        return part if part is None else to_device(part, device)

    entries = {field.name: move(getattr(batch, field.name)) for field in fields(batch)}  # pyright: ignore
    return replace(batch, **entries)  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True)
class EncodedDocument:
    """One document's row and patches (n, p), which are drawn and which read (n,), and how drafts begin."""

    row: EncodedSequence
    patches: Tensor
    drawn: Tensor
    read: Tensor
    noise: Tensor
    time: Tensor

    @property
    def length(self) -> int:
        """How many tokens it has in a pack, drafts included."""
        return len(self.row.input_ids) - int((~self.read).sum()) + len(self.noise)

    def tokens(self, image: int) -> dict[str, Tensor]:
        """Columns (s, ...) of a pack: the document, then its drafts."""
        ids, positions, block_ids, _ = self.row
        places, kept = (ids == image).nonzero()[:, 0], torch.ones_like(ids, dtype=torch.bool)
        at, kept[places] = places[self.drawn], self.read
        labels = ids.masked_fill(ids == image, NONE)
        labels[:1] = NONE  # nothing of the document comes before it
        return {
            "input_ids": torch.cat([ids[kept], ids[at]]),
            "position_ids": torch.cat([positions[kept], positions[at]]),
            "block_ids": torch.cat([block_ids[kept], -block_ids[at]]),
            "labels": torch.cat([labels[kept], labels[at]]),
            "count": torch.arange(int(kept.sum()) + len(at)),
        }


@dataclass(frozen=True)
class Packer:
    """Documents -> a `PackedBatch` of rows of at most `length` tokens.

    `times` says how far the draft of each picture or frame has come; `whole`, whether a critic will read.
    """

    processor: RopeMMProcessor
    length: int
    times: SampleTime
    whole: bool = False

    def __call__(self, documents: Sequence[Document], generators: Sequence[torch.Generator]) -> PackedBatch:
        """The pack of documents; the drafts of each begin as its own generator says.

        Raises:
            ValueError: a document that is longer than a row.
        """
        return self.pack(self.read(documents, generators))

    def pack(self, drafted: Sequence[EncodedDocument]) -> PackedBatch:
        """The pack of documents that are read.

        Raises:
            ValueError: one that is longer than a row.
        """
        rows = first_fit([d.length for d in drafted], self.length)
        tokens = [d.tokens(cast(int, self.processor.image_token_id)) for d in drafted]
        packed = [join([tokens[number] for number in row]) for row in rows]
        drafted = [drafted[number] for row in rows for number in row]
        fill = dict(zip(("input_ids", "position_ids", "block_ids"), PADDING, strict=False)) | {"labels": NONE}
        columns = {
            name: pad_sequence(
                [row[name] for row in packed], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in packed[0]
        }
        count = columns.pop("count")
        columns["position_ids"] = torch.cat([count[None], columns["position_ids"].movedim(-1, 0)])
        columns["document_ids"] = (
            columns["document_ids"].cummax(1).values
        )  # padding belongs to what it follows
        there = [part for d in drafted for part in (d.patches[d.read], d.patches[d.drawn])]
        draft = [torch.arange(int(d.read.sum()) + len(d.noise)) >= d.read.sum() for d in drafted]
        begun = torch.cat([d.noise for d in drafted]), torch.cat([d.time for d in drafted])
        whole = self.gather(drafted) if self.whole else None
        return PackedBatch(
            **columns,
            patches=torch.cat(there),
            draft=torch.cat(draft),
            noise=begun[0],
            time=begun[1],
            whole=whole,
        )

    def read(
        self, documents: Sequence[Document], generators: Sequence[torch.Generator]
    ) -> list[EncodedDocument]:
        """Every document with its drafts, not yet packed."""
        seen = [
            self.processor.split_document([p if isinstance(p, str) else p.pixels for p in d])
            for d in documents
        ]
        stories = [story for story, _ in seen]
        rows = encode(
            stories,
            self.processor.tokenizer,
            self.processor.scheme,
            True,
            self.processor.full_video_attention,
        )
        none = torch.zeros(0, width := self.processor.patch_width)
        drafted = []
        for row, document, (_, shown), generator in zip(rows, documents, seen, generators, strict=True):
            patches = torch.cat([none, *shown])
            marks = [part.generate for part in document if not isinstance(part, str)]
            sizes = torch.tensor([len(part) for part in shown], dtype=torch.long)
            drawn = torch.tensor(marks, dtype=torch.bool).repeat_interleave(sizes)
            noise = torch.randn(int(drawn.sum()), width, generator=generator)
            blocks = row.block_ids[row.input_ids == self.processor.image_token_id]
            read = ~drawn | (blocks < row.block_ids[-1:])
            _, block = blocks[drawn].unique_consecutive(return_inverse=True)  # one for each picture or frame
            time = self.times(int(block.max()) + 1 if len(block) else 0, generator)[block, None]
            drafted.append(EncodedDocument(row, patches, drawn, read, noise, time))
        return drafted

    def gather(self, drafted: Sequence[EncodedDocument]) -> CriticInputs:
        """The documents with drafts, side by side; where none has any, a blank patch that is only read."""
        drafted = [d for d in drafted if d.drawn.any()]
        if not drafted:  # a critic in several processes has to take part in every update
            blank = torch.zeros(self.processor.num_channels, *(self.processor.patch_size,) * 2)
            drafted = self.read([[Visual(blank)]], [torch.Generator()])
        patches = pad_sequence([d.patches for d in drafted], batch_first=True)
        there = pad_sequence([torch.ones_like(d.drawn) for d in drafted], batch_first=True)
        drawn = pad_sequence([d.drawn for d in drafted], batch_first=True)
        return CriticInputs(collate([d.row for d in drafted]), patches, there, drawn)


def join(documents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of documents one after another, `attention_mask` and their numbers, `document_ids`, added."""
    lengths = torch.tensor([len(d["input_ids"]) for d in documents])
    row = {name: torch.cat([d[name] for d in documents]) for name in documents[0]}
    number = torch.arange(len(documents)).repeat_interleave(lengths)
    return row | {"document_ids": number, "attention_mask": torch.ones_like(number)}
