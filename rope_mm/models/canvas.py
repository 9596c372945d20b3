"""Pictures of captions: what image head and critic read, and what the image head draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.sampling import sample_frames
from rope_mm.models.sequences import SequenceBatch, build_batch, token_order
from rope_mm.nn.patches import to_images, to_patches
from rope_mm.segments import Image


@dataclass(frozen=True)
class ImageBatcher:
    """Pictures of one size, and how captions and their patches become sequences."""

    config: RopeMMConfig
    tokenizer: PreTrainedTokenizerBase
    size: int

    @property
    def grid(self) -> Image:
        """The picture as a segment.

        Raises:
            ValueError: a size that whole patches do not tile, patches of several frames.
        """
        if self.config.temporal_patch_size > 1:
            raise ValueError(
                f"temporal_patch_size {self.config.temporal_patch_size} is for clips; images alone take 1"
            )
        side, rest = divmod(self.size, self.config.patch_size)
        if rest:
            raise ValueError(
                f"images of {self.size} x {self.size} pixels do not divide into patches of "
                f"{self.config.patch_size} x {self.config.patch_size}"
            )
        return Image(side, side)

    def sequences(self, captions: Sequence[str]) -> SequenceBatch:
        """What image head and critic read beside the patches: each caption, then the picture."""
        return build_batch([[caption, self.grid] for caption in captions], self.tokenizer, self.config.scheme)

    def noise(self, generator: torch.Generator, pictures: int) -> Tensor:
        """Noise patches (b, n, p)."""
        return torch.randn(pictures, self.grid.tokens, self.config.patch_width, generator=generator)

    def draw(self, model: PreTrainedModel, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Pictures (n, ch, size, size) of captions, on the CPU; one pass for every 250 of them."""
        pictures = []
        for start in range(0, len(captions), 250):
            part = captions[start : start + 250]
            noise = self.noise(generator, len(part)).to(model.device)
            drawn = sample_frames(model, self.sequences(part).to(model.device), noise[:, None])
            pictures.append(self.picture(drawn[:, 0]).cpu())
        return torch.cat(pictures)

    def picture(self, patches: Tensor) -> Tensor:
        """Pictures (b, ch, size, size) of patches (b, n, p)."""
        raster = patches[:, token_order(self.grid, self.config.scheme).argsort()]
        return to_images(raster, self.grid.y, self.grid.x, self.config.patch_size)

    def patches(self, pictures: Tensor) -> Tensor:
        """Patches (b, n, p) of pictures (b, ch, size, size), in the order of their tokens."""
        return to_patches(pictures, self.config.patch_size)[:, token_order(self.grid, self.config.scheme)]
