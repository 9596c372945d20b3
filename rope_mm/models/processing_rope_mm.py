"""Stories of strings and segments -> the tensors that the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rope_mm.attention import ranks
from rope_mm.embed import to_images, to_patches
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.scheme import Scheme
from rope_mm.segments import Image, Segment, Text

IMAGE_TOKEN = "<image>"
PAD_RANK = torch.iinfo(torch.int32).max  # above every rank, so padding is seen by padding alone


@dataclass(frozen=True)
class Sequences:
    """What a forward takes beside the patches: tensors (b, s), positions (b, s, a); rows end in padding."""

    input_ids: Tensor
    positions: Tensor
    rank: Tensor

    def to(self, device: torch.device | str) -> "Sequences":
        """The same on another device, positions in float32 where it has no float64."""
        narrow = torch.device(device).type == "mps"
        positions = self.positions.float() if narrow else self.positions
        return Sequences(self.input_ids.to(device), positions.to(device), self.rank.to(device))

    def twice(self) -> "Sequences":
        """The same rows again below: one pass for real and fake."""
        return Sequences(*(torch.cat([getattr(self, field.name)] * 2) for field in fields(self)))

    def inputs(self) -> dict[str, Tensor]:
        """As keyword arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_tokenizer(name: str = "bytes") -> PreTrainedTokenizerBase:
    """The byte-level tokenizer, which needs no file, or any of Hugging Face's by name or folder.

    Raises:
        ValueError: a name that transformers cannot load.
    """
    if name == "bytes":
        tokenizer = ByT5Tokenizer(extra_ids=0)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"no tokenizer {name!r}: give bytes, a folder or a hub name ({reason})"
            ) from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def arrange(
    stories: Sequence[Sequence[str | Segment]], tokenizer: PreTrainedTokenizerBase, scheme: Scheme
) -> Sequences:
    """A batch of stories such as ["a handwritten seven", Image(4, 4)], padded to the longest.

    Strings become words; an Image or Video becomes that many image tokens, for patches given beside it.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    words = {part for story in stories for part in story if isinstance(part, str)}
    spelt = {
        part: tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in words
    }
    rows, placed = [], {}
    for story in stories:
        ids = [spelt[part] if isinstance(part, str) else [image] * part.tokens for part in story]
        shape = tuple(
            Text(len(i)) if isinstance(part, str) else part for part, i in zip(story, ids, strict=True) if i
        )
        if shape not in placed:
            placed[shape] = scheme.place(shape)[0], ranks(shape)
        rows.append((torch.tensor([i for part in ids for i in part]), *placed[shape]))
    ids, positions, rank = (list(column) for column in zip(*rows, strict=True))
    pad = partial(pad_sequence, batch_first=True)
    return Sequences(pad(ids), pad(positions), pad(rank, padding_value=PAD_RANK))


@dataclass(frozen=True)
class Canvas:
    """Pictures of one size, and how captions and their patches become sequences."""

    config: RopeMMConfig
    tokenizer: PreTrainedTokenizerBase
    size: int

    @property
    def grid(self) -> Image:
        """The picture as a segment.

        Raises:
            ValueError: a size that whole patches do not tile.
        """
        side, rest = divmod(self.size, self.config.patch_size)
        if rest:
            raise ValueError(
                f"images of {self.size} x {self.size} pixels do not divide into patches of "
                f"{self.config.patch_size} x {self.config.patch_size}"
            )
        return Image(side, side)

    def sequences(self, captions: Sequence[str]) -> Sequences:
        """What image head and critic read beside the patches: each caption, then the picture."""
        return arrange([[caption, self.grid] for caption in captions], self.tokenizer, self.config.scheme)

    def noise(self, generator: torch.Generator, pictures: int) -> Tensor:
        """Noise patches (b, n, p)."""
        return torch.randn(pictures, self.grid.tokens, self.config.patch_width, generator=generator)

    @torch.no_grad()
    def draw(self, model: PreTrainedModel, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Pictures (n, ch, size, size) of captions, on the CPU; one pass for every 250 of them."""
        pictures = []
        for start in range(0, len(captions), 250):
            part = captions[start : start + 250]
            noise = self.noise(generator, len(part)).to(model.device)
            sequences = self.sequences(part).to(model.device)
            drawn = model(**sequences.inputs(), patches=noise, words=False).patches
            pictures.append(self.picture(drawn.view_as(noise)).cpu())
        return torch.cat(pictures)

    def picture(self, patches: Tensor) -> Tensor:
        """Pictures (b, ch, size, size) of patches (b, n, p)."""
        return to_images(patches, self.grid.y, self.grid.x, self.config.patch_size)

    def patches(self, pictures: Tensor) -> Tensor:
        """Patches (b, n, p) of pictures (b, ch, size, size)."""
        return to_patches(pictures, self.config.patch_size)
