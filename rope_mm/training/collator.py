"""Documents -> encoded documents -> one packed batch, with noisy copies of each image to generate.

Each image or frame to generate gets a noisy copy, or several, at the same positions. A copy attends to all
earlier tokens; nothing attends to it. So all images of a row train in one pass, each after the true ones
before it, just as `sample_frames` generates them one by one. No token attends to an image at the very end of
a document, so only its noisy copies are in the batch. Several copies share the context of their image: they
cost less than as many documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_mm.data.documents import Document, Visual
from rope_mm.models.processing_rope_mm import RopeMMProcessor
from rope_mm.models.sequences import PADDING, EncodedSequence, collate, encode
from rope_mm.positions.packing import first_fit
from rope_mm.rotary.definition import widest_float
from rope_mm.training.adversarial_loss import CriticBatch
from rope_mm.training.throughput import count_pairs

SampleTime = Callable[[int, torch.Generator], Tensor]
Batch = TypeVar("Batch")
IGNORED = -100  # the label of a token that is not predicted


@dataclass(frozen=True)
class EncodedDocument:
    """One document of s tokens and n patches, m of which are generated.

    Attributes:
        sequence: its token ids (s,), positions (s, a) and blocks (s,).
        patches: (n, p), in the order of their tokens.
        generated: (n,), which patches are generated.
        context: (n,), which patches later tokens read; all but those of an image at the very end.
        noise: (c, p), from which the noisy copies start, one sample of all m patches after another.
        time: (c, 1), how far each copy is on its way from noise, 0, to its patch, 1.
        image: (m,), the number of the image or frame of each patch that is generated.
        samples: c / m, noisy copies of each image.
        predict_prompts: whether text is predicted that stands before an image to generate.
    """

    sequence: EncodedSequence
    patches: Tensor
    generated: Tensor
    context: Tensor
    noise: Tensor
    time: Tensor
    image: Tensor
    samples: int = 1
    predict_prompts: bool = True

    @property
    def length(self) -> int:
        """How many tokens it has in a packed batch, noisy copies included."""
        return len(self.sequence.input_ids) - int((~self.context).sum()) + len(self.noise)

    @property
    def sample(self) -> Tensor:
        """Which sample each noisy copy (c,) is of."""
        return torch.arange(self.samples).repeat_interleave(len(self.image))

    def conditions(self, image_token_id: int) -> list[tuple[bytes, ...]]:
        """What the model knows of each image or frame to generate, in bytes: all before it, and its place.

        Args:
            image_token_id: of the token at each patch.
        """
        ids, positions, _, _ = self.sequence
        places, order = (ids == image_token_id).nonzero()[:, 0], self.generated.nonzero()[:, 0]
        found = []
        for number in range(int(self.image.max()) + 1 if len(self.image) else 0):
            mine = order[self.image == number]
            end = int(places[mine[-1]]) + 1
            parts = ids[:end], positions[:end], self.patches[: mine[0]]
            found.append(tuple(part.numpy().tobytes() for part in parts))
        return found

    def columns(self, image_token_id: int) -> dict[str, Tensor]:
        """Its columns (length, ...) of a packed batch: the document, then the noisy copies."""
        ids, positions, blocks, _ = self.sequence
        places, kept = (ids == image_token_id).nonzero()[:, 0], torch.ones_like(ids, dtype=torch.bool)
        copies, kept[places] = places[self.generated].repeat(self.samples), self.context
        # a number of its own for every copy of a block, above all that the block sees
        blocks = blocks * self.samples
        labels = ids.masked_fill(ids == image_token_id, IGNORED)
        labels[:1] = IGNORED  # nothing of the document comes before it
        if not self.predict_prompts and len(copies):
            labels[: copies.max()] = IGNORED
        return {
            "input_ids": torch.cat([ids[kept], ids[copies]]),
            "position_ids": torch.cat([positions[kept], positions[copies]]),
            "block_ids": torch.cat([blocks[kept], self.sample - blocks[copies]]),
            "labels": torch.cat([labels[kept], labels[copies]]),
            "count": torch.arange(int(kept.sum()) + len(copies)),
        }


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into rows: what a step of pretraining reads.

    Attributes:
        input_ids: (b, s).
        attention_mask: (b, s), 0 at padding.
        position_ids: (1 + a, b, s), row 0 counts the tokens of each document.
        block_ids: (b, s), blocks whose tokens see each other; negative at noisy copies.
        document_ids: (b, s), the number of the document in its row.
        labels: (b, s), tokens to predict, else -100.
        patches: (n, p), in the order of their tokens; a noisy copy's is its target.
        noisy: (n,), which patches are noisy copies.
        noise: (m, p), from which they start.
        time: (m, 1), how far each is on its way from noise, 0, to its target, 1.
        image: (m,), the number of the image or frame that each is of.
        sample: (m,), which noisy copy of its image it is of, from 0.
        condition: of each image or frame a number, the same for those that follow the same text and images;
            None where the packer was not asked for it.
        critic_batch: what a critic reads, where there is one.
        skipped: why documents of this batch are missing, a sentence for each.
        stream_state: where a stream stands after this batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    block_ids: Tensor
    document_ids: Tensor
    labels: Tensor
    patches: Tensor
    noisy: Tensor
    noise: Tensor
    time: Tensor
    image: Tensor
    sample: Tensor
    condition: Tensor | None = None
    critic_batch: CriticBatch | None = None
    skipped: tuple[str, ...] = ()
    stream_state: Any = None

    @property
    def target(self) -> Tensor:
        """What the noisy copies (m, p) should become."""
        return self.patches[self.noisy]

    @property
    def tokens(self) -> int:
        """The number of tokens, noisy copies included, padding not."""
        return int(self.attention_mask.sum())

    @property
    def predicted(self) -> int:
        """The number of text tokens that are predicted."""
        return int((self.labels != IGNORED).sum())

    @cached_property
    def alone(self) -> Tensor:
        """Which images or frames (i,) are the only ones of their condition, and so in no comparison."""
        if self.condition is None:
            return torch.zeros_like(self.image[self.sample == 0].bincount(), dtype=torch.bool)
        _, inverse, counts = self.condition.unique(return_inverse=True, return_counts=True)
        return counts[inverse] == 1

    @property
    def learned_patches(self) -> int:
        """The number of noisy patches that the image loss is the mean over: all but those of images alone."""
        return int((~self.alone[self.image]).sum())

    @property
    def for_critic(self) -> CriticBatch:
        """What a critic reads.

        Raises:
            ValueError: a batch that was packed for no critic.
        """
        if self.critic_batch is None:
            raise ValueError("a critic reads whole documents; pack them by Packer(..., for_critic=True)")
        return self.critic_batch

    @property
    def images(self) -> int:
        """The number of noisy copies of images and frames."""
        return torch.stack([self.image, self.sample]).unique(dim=1).shape[1]

    @property
    def counts(self) -> tuple[int, int, int, int, int, int, int]:
        """Tokens, their pairs, images, those alone, predicted tokens, learned patches, critic's documents.

        Pairs are of tokens of one document; noisy copies count as images.
        """
        documents = self.critic_batch.count if self.critic_batch else 0
        pairs = count_pairs(self.document_ids, self.attention_mask)
        alone = int(self.alone.sum()) * (int(self.sample.max()) + 1) if len(self.sample) else 0
        return self.tokens, pairs, self.images, alone, self.predicted, self.learned_patches, documents

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a forward; noisy copies are between noise and target, at their time."""
        copies = self.noise.lerp(self.target, self.time)
        names = "input_ids", "attention_mask", "position_ids", "block_ids", "document_ids"
        return {name: getattr(self, name) for name in names} | {
            "patches": self.patches.masked_scatter(self.noisy[:, None], copies)
        }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """A dataclass of tensors on another device, positions in float32 where it has no float64.

    Args:
        batch: a dataclass; dataclasses in it are moved too, other fields stay.
        device: where to.
    """
    wide = widest_float(device)

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device, wide if part.dtype == torch.float64 else part.dtype)
        return to_device(part, device) if is_dataclass(part) and has_tensors(part) else part

    entries = {field.name: move(getattr(batch, field.name)) for field in fields(batch)}  # pyright: ignore
    return replace(batch, **entries)  # pyright: ignore[reportArgumentType, reportCallIssue]


def has_tensors(part: Any) -> bool:
    """Whether a dataclass has a tensor among its fields."""
    return any(isinstance(getattr(part, field.name), Tensor) for field in fields(part))


@dataclass(frozen=True)
class Packer:
    """Packs documents into rows.

    Attributes:
        processor: tokens, positions and patches of documents.
        max_length: tokens of a row, noisy copies included.
        sample_time: (images, generator) -> (images,), how far each noisy copy is from noise.
        for_critic: whether a critic reads the documents too.
        samples: noisy copies of each image or frame to generate, which do not see one another; each has its
            own noise and time.
        predict_prompts: whether text is predicted that stands before an image to generate; else it is only
            read, as a caption is from which an image is generated.
        conditions: whether batches say which of their images follow the same text and images.
    """

    processor: RopeMMProcessor
    max_length: int
    sample_time: SampleTime
    for_critic: bool = False
    samples: int = 1
    predict_prompts: bool = True
    conditions: bool = False

    def __call__(self, documents: Sequence[Document], generators: Sequence[torch.Generator]) -> PackedBatch:
        """The packed batch of documents.

        Args:
            documents: texts, images and videos.
            generators: one for each document, for its noise.

        Raises:
            ValueError: a document that is longer than a row.
        """
        return self.pack(self.encode(documents, generators))

    def encode(
        self, documents: Sequence[Document], generators: Sequence[torch.Generator]
    ) -> list[EncodedDocument]:
        """Every document with its noisy copies; see `__call__` for the arguments."""
        split = [
            self.processor.split_document([p if isinstance(p, str) else p.pixels for p in d])
            for d in documents
        ]
        segments = [segments for segments, _ in split]
        options = self.processor.tokenizer, self.processor.scheme, True, self.processor.full_video_attention
        encoded = []
        for sequence, document, (_, patches), generator in zip(
            encode(segments, *options), documents, split, generators, strict=True
        ):
            visuals = [part for part in document if not isinstance(part, str)]
            encoded.append(self.add_noise(sequence, visuals, patches, generator))
        return encoded

    def add_noise(
        self,
        sequence: EncodedSequence,
        visuals: Sequence[Visual],
        patches: Sequence[Tensor],
        generator: torch.Generator,
    ) -> EncodedDocument:
        """A document with the noise of its images to generate.

        Args:
            sequence: its tokens.
            visuals: its images and videos.
            patches: (n, p) of each of them.
            generator: of the noise and its times.
        """
        width = self.processor.patch_width
        sizes = torch.tensor([len(part) for part in patches], dtype=torch.long)
        flags = torch.tensor([visual.generate for visual in visuals], dtype=torch.bool)
        generated = flags.repeat_interleave(sizes)
        noise = torch.randn(int(generated.sum()) * self.samples, width, generator=generator)
        blocks = sequence.block_ids[sequence.input_ids == self.processor.image_token_id]
        context = ~generated | (blocks < sequence.block_ids[-1:])
        _, image = blocks[generated].unique_consecutive(return_inverse=True)
        images = int(image.max()) + 1 if len(image) else 0
        times = self.sample_time(images * self.samples, generator).view(self.samples, images)
        time = times[:, image].reshape(-1, 1)
        joined = torch.cat([torch.zeros(0, width), *patches])
        options = self.samples, self.predict_prompts
        return EncodedDocument(sequence, joined, generated, context, noise, time, image, *options)

    def pack(self, encoded: Sequence[EncodedDocument]) -> PackedBatch:
        """The packed batch of encoded documents.

        Raises:
            ValueError: one that is longer than a row.
        """
        rows = first_fit([d.length for d in encoded], self.max_length)
        encoded_rows = [[encoded[number] for number in row] for row in rows]
        columns = self.pad([join(self.columns_of(row)) for row in encoded_rows])
        ordered = [document for row in encoded_rows for document in row]
        patches = [
            part
            for d in ordered
            for part in (d.patches[d.context], d.patches[d.generated].repeat(d.samples, 1))
        ]
        noisy = [torch.arange(int(d.context.sum()) + len(d.noise)) >= d.context.sum() for d in ordered]
        return PackedBatch(
            **cast(Any, columns),
            patches=torch.cat(patches),
            noisy=torch.cat(noisy),
            noise=torch.cat([d.noise for d in ordered]),
            time=torch.cat([d.time for d in ordered]),
            image=number_images(ordered),
            sample=torch.cat([d.sample for d in ordered]),
            condition=self.number_conditions(ordered) if self.conditions else None,
            critic_batch=self.gather(ordered) if self.for_critic else None,
        )

    def number_conditions(self, documents: Sequence[EncodedDocument]) -> Tensor:
        """The number of the condition of each image or frame, see `PackedBatch.condition`."""
        token, known = cast(int, self.processor.image_token_id), {}
        keys = [key for document in documents for key in document.conditions(token)]
        return torch.tensor([known.setdefault(key, len(known)) for key in keys], dtype=torch.long)

    def columns_of(self, row: Sequence[EncodedDocument]) -> list[dict[str, Tensor]]:
        """The columns of each document of a row."""
        return [document.columns(cast(int, self.processor.image_token_id)) for document in row]

    def pad(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Columns (b, s, ...) of rows, padded to the longest; positions in transformers' layout."""
        fill = dict(zip(("input_ids", "position_ids", "block_ids"), PADDING, strict=False)) | {
            "labels": IGNORED
        }
        columns = {
            name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0)) for name in rows[0]
        }
        count = columns.pop("count")
        columns["position_ids"] = torch.cat([count[None], columns["position_ids"].movedim(-1, 0)])
        documents = columns["document_ids"]
        columns["document_ids"] = documents.cummax(1).values  # padding belongs to what it follows
        return columns

    def gather(self, encoded: Sequence[EncodedDocument]) -> CriticBatch:
        """The documents with something to generate, one in a row, for the critic.

        Where there are none, one blank patch that is only read: a critic in several processes has to take
        part in every update.
        """
        encoded = [d for d in encoded if d.generated.any()]
        if not encoded:
            blank = torch.zeros(self.processor.num_channels, *(self.processor.patch_size,) * 2)
            encoded = self.encode([[Visual(blank)]], [torch.Generator()])
        patches = pad_sequence([d.patches for d in encoded], batch_first=True)
        valid = pad_sequence([torch.ones_like(d.generated) for d in encoded], batch_first=True)
        generated = pad_sequence([d.generated for d in encoded], batch_first=True)
        return CriticBatch(collate([d.sequence for d in encoded]), patches, valid, generated)


def number_images(documents: Sequence[EncodedDocument]) -> Tensor:
    """The number in its batch of the image or frame that each noisy copy is of."""
    numbers, first = [torch.zeros(0, dtype=torch.long)], 0
    for document in documents:
        numbers.append(document.image.repeat(document.samples) + first)
        first += int(document.image.max()) + 1 if len(document.image) else 0
    return torch.cat(numbers)


def join(documents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of documents one after another, with `attention_mask` and their numbers, `document_ids`."""
    lengths = torch.tensor([len(d["input_ids"]) for d in documents])
    row = {name: torch.cat([d[name] for d in documents]) for name in documents[0]}
    number = torch.arange(len(documents)).repeat_interleave(lengths)
    return row | {"document_ids": number, "attention_mask": torch.ones_like(number)}
