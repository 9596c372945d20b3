"""Images of one size and their captions as a model reads them, for training on images alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.models.pipeline import GenerationSpec, RopeMMPipeline, grid_of
from rope_mm.models.processing_rope_mm import RopeMMProcessor
from rope_mm.models.sequences import SequenceBatch, build_batch, require_list, token_order
from rope_mm.nn.patches import to_images, to_patches
from rope_mm.segments import Image


@dataclass(frozen=True)
class ImageBatcher:
    """Images of one size and their captions -> sequences and patches, for training on images alone.

    Args:
        config: of the model.
        tokenizer: of the captions.
        size: pixels (height, width) of an image, or the side of a square.
    """

    config: RopeMMConfig
    tokenizer: PreTrainedTokenizerBase
    size: int | tuple[int, int]

    @property
    def grid(self) -> Image:
        """The image as a segment.

        Raises:
            ValueError: a size that whole patches do not tile, patches of several frames.
        """
        if self.config.temporal_patch_size > 1:
            raise ValueError(
                f"temporal_patch_size {self.config.temporal_patch_size} is for videos; images alone take 1"
            )
        return grid_of(self.size, self.config.patch_size)

    def sequences(self, captions: Sequence[str]) -> SequenceBatch:
        """Each caption, then the image: what generator and critic read beside the patches.

        Raises:
            ValueError: a string in the place of a list.
        """
        require_list("captions", captions)
        return build_batch([[caption, self.grid] for caption in captions], self.tokenizer, self.config.scheme)

    def noise(self, generator: torch.Generator, images: int) -> Tensor:
        """Noise patches (b, n, p) of a number of images."""
        return torch.randn(images, self.grid.tokens, self.config.patch_width, generator=generator)

    def to_images(self, patches: Tensor) -> Tensor:
        """Images (b, ch, y, x) of patches (b, n, p)."""
        raster = patches[:, token_order(self.grid, self.config.scheme).argsort()]
        return to_images(raster, self.grid.y, self.grid.x, self.config.patch_size)

    def to_patches(self, images: Tensor) -> Tensor:
        """Patches (b, n, p) of images (b, ch, y, x), in the order of their tokens."""
        return to_patches(images, self.config.patch_size)[:, token_order(self.grid, self.config.scheme)]

    def pipeline(
        self, model: PreTrainedModel, captioned: bool = True, noise_scale: float = 1.0
    ) -> RopeMMPipeline:
        """The pipeline of a model trained on these images.

        Args:
            model: the model.
            captioned: whether it reads captions.
            noise_scale: of what it generates.
        """
        template = "{caption}{image:generate}" if captioned else "{image:generate}"
        spec = GenerationSpec(
            [template], {"caption": "text", "image": "image"}, self.size, noise_scale=noise_scale
        )
        return RopeMMPipeline(model, RopeMMProcessor.from_config(self.config, self.tokenizer), spec)
