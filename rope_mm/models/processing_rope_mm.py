"""Documents of text, images and videos -> the arguments of a forward, as transformers' processor."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image as PILImage
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs

from rope_mm.checks.fields import NotNegative, read_value
from rope_mm.checks.tensors import check_generator
from rope_mm.models.image_generation import sample_frames
from rope_mm.models.sequences import build_batch, require_list, token_order
from rope_mm.models.tokenizers import IMAGE_TOKEN, check_words
from rope_mm.nn.patches import from_tubelets, to_images, to_patches, to_tubelets
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Segment, Video

from .configuration_rope_mm import RopeMMConfig, read_rope, write_rope  # beside a saved model, too

VIDEO_TOKEN = "<video>"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHAT = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
Part = Any  # a string, an image or a video, see RopeMMProcessor


class RopeMMProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call: `padding_side` is "left", as `generate` wants it, or "right"."""

    _defaults = {"text_kwargs": {"padding_side": "left", "return_tensors": "pt"}}  # pyright: ignore


class RopeMMProcessor(ProcessorMixin):
    """Tokenizer, patches and positions of one model.

        inputs = processor(documents=[["see ", image, " and ", video]])
        inputs = processor(text="see <image>", images=[image])
        ids = model.generate(**inputs)

    An image is PIL's, or (ch, y, x); a video is (t, ch, y, x) or a list of images; both may be the `pixels`
    of an object, such as `rope_mm.data`'s Visual. Whole numbers are 0 to 255, others -1 to 1. `from_config`
    makes a processor that fits a model.

    Args:
        tokenizer: it has the image token, see `load_tokenizer`.
        patch_size: pixels of a patch's side.
        num_channels: channels of an image.
        rope_parameters: of the model's config.
        chat_template: Jinja template of conversations.
        temporal_patch_size: frames of a patch.
        video_attention: "causal" or "full", of the model's config.

    Raises:
        ValueError: a tokenizer without the image token.
    """

    valid_processor_kwargs = RopeMMProcessorKwargs

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int = 2,
        num_channels: int = 1,
        rope_parameters: dict[str, Any] | Scheme | None = None,
        chat_template: str | None = None,
        temporal_patch_size: int = 1,
        video_attention: str = "causal",
    ):
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no {IMAGE_TOKEN}; take load_tokenizer, which adds it")
        self.patch_size, self.num_channels = patch_size, num_channels
        self.temporal_patch_size, self.video_attention = temporal_patch_size, video_attention
        self.rope_parameters = write_rope(rope_parameters or {})
        self.scheme = read_rope(self.rope_parameters)
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(tokenizer, chat_template=chat_template or CHAT)

    @classmethod
    def from_config(cls, config: RopeMMConfig, tokenizer: PreTrainedTokenizerBase) -> "RopeMMProcessor":
        """The processor of a model.

        Raises:
            ValueError: a tokenizer whose image token is not the model's.
        """
        sizes = config.patch_size, config.num_channels, config.rope_parameters
        video = {name: getattr(config, name) for name in ("temporal_patch_size", "video_attention")}
        processor = cls(tokenizer, *sizes, **video)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"{IMAGE_TOKEN} is {processor.image_token_id} to the tokenizer but image_token_id is "
                f"{config.image_token_id} in the config; give the config the tokenizer's"
            )
        return processor

    @property
    def patch_width(self) -> int:
        """Numbers in one patch."""
        return self.temporal_patch_size * self.num_channels * self.patch_size**2

    @property
    def full_video_attention(self) -> bool:
        """Whether the frames of a video see each other."""
        return self.video_attention == "full"

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "attention_mask", "position_ids", "block_ids", "rope_deltas", "patches"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        documents: Sequence[Sequence[Part]] | None = None,
        seconds: float | None = None,
        return_labels: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Arguments of a forward, from documents or from text with <image> and <video> in it.

        Args:
            images: in the order of their tokens, in one list or one for each text.
            text: one or several.
            videos: in the same way.
            documents: lists of strings, images and videos; no string in them is taken for a token.
            seconds: from one frame of a video to the next, 1 by default.
            return_labels: whether to add `labels` for the loss of the text: -100 at patches and padding.
            kwargs: `padding_side` and other text arguments of transformers' processors.

        Returns:
            Tensors under the names of `model_input_names`, see `RopeMMModel.forward`.

        Raises:
            ValueError: a number of images that is not that of their tokens, other channels than the model's,
                sizes that whole patches do not tile.
        """
        if kwargs.pop("audio", None) is not None:  # chat templates send it, if only to say that there is none
            raise ValueError("the model reads text, images and videos; it has nothing that reads audio")
        settings = self._merge_kwargs(
            RopeMMProcessorKwargs,  # pyright: ignore[reportArgumentType]
            self.tokenizer.init_kwargs,
            **kwargs,
        )
        chosen = settings["text_kwargs"]
        if chosen["return_tensors"] != "pt":
            raise ValueError(f"tensors are torch's, return_tensors='pt', not {chosen['return_tensors']!r}")
        if documents is None:
            documents = split_texts([text] if isinstance(text, str) else list(text or [""]), images, videos)
        require_list("documents", documents)
        pairs = [self.split_document(document, seconds or 1.0) for document in documents]
        sequences = build_batch(
            [parts for parts, _ in pairs],
            self.tokenizer,
            self.scheme,
            chosen["padding_side"],
            self.full_video_attention,
        )
        patches = [part for _, shown in pairs for part in shown]
        data = sequences.inputs() | ({"patches": torch.cat(patches)} if patches else {})
        if return_labels:
            is_text = sequences.mask & (sequences.input_ids != self.image_token_id)
            data["labels"] = sequences.input_ids.masked_fill(~is_text, -100)
        return BatchFeature(data)

    def split_document(
        self, document: Sequence[Part], seconds: float = 1.0
    ) -> tuple[list[str | Segment], list[Tensor]]:
        """A document's strings and segments, and the patches (n, p) of each of its images and videos.

        Raises:
            ValueError: a string in the place of a document, and as `encode_visual`.
        """
        require_list("a document", document)
        parts: list[str | Segment] = []
        patches = []
        for part in document:
            if isinstance(part, str):
                parts.append(part)
                continue
            segment, shown = self.encode_visual(part, seconds)
            parts.append(segment)
            patches.append(shown)
        return parts, patches

    def encode_visual(self, part: Part, seconds: float = 1.0) -> tuple[Segment, Tensor]:
        """An image or video as a segment and its patches (n, p), in the order of their tokens.

        Raises:
            ValueError: other channels than the model's, sizes that whole patches do not tile.
        """
        pixels = to_pixels(part, self.num_channels)
        if pixels.shape[-3] != self.num_channels:
            raise ValueError(f"{tuple(pixels.shape)} are not (..., {self.num_channels}, y, x) pixels")
        depth = self.temporal_patch_size
        patches = to_patches(to_tubelets(pixels.view(-1, *pixels.shape[-3:]), depth), self.patch_size)
        y, x = (side // self.patch_size for side in pixels.shape[-2:])
        segment = Image(y, x) if pixels.dim() == 3 else Video(len(patches), y, x, seconds * depth)
        return segment, patches.flatten(0, 1)[token_order(segment, self.scheme)]

    def decode_frames(self, patches: Tensor, y: int, x: int) -> Tensor:
        """Frames (b, t, ch, rows, columns) of patches (b, t / depth, y * x, p) in the order of tokens.

        Args:
            patches: (b, t / depth, y * x, p).
            y: rows of patches.
            x: columns of patches.
        """
        raster = patches[..., token_order(Image(y, x), self.scheme).argsort(), :].flatten(0, 1)
        tubelets = to_images(raster, y, x, self.patch_size).unflatten(0, patches.shape[:2])
        return from_tubelets(tubelets, self.temporal_patch_size)

    def generate_images(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str | Sequence[Part]],
        grid: Image | Video,
        generator: torch.Generator | None = None,
        steps: int = 1,
        context: Sequence[Part] | None = None,
        window_frames: int | None = None,
        guidance_scale: float = 1.0,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """Images or videos after captions, or after documents.

        Args:
            model: a `RopeMMForConditionalGeneration`.
            prompts: captions, or documents whose images are equal in size.
            grid: patches of the image or video; a video's t counts frames.
            generator: of the noise.
            steps: passes for each frame.
            context: videos that the generated ones continue, equal in size; the grid counts their frames.
            window_frames: number of frames that a frame sees of its video at most, itself included; they
                stand as in a video of that length, however long this one is.
            guidance_scale: above 1 it enlarges what the text changes in an image, at twice the cost, see
                `classifier_free_guidance`; for models that also learned to generate without text.
            noise_scale: standard deviation of the noise; below 1 images vary less, and more of them show
                what the text says: the temperature of Glow, arXiv 1807.03039, section 6.

        Returns:
            Images (b, ch, y, x) or videos (b, t, ch, y, x) in [-1, 1], on the model's device.

        Raises:
            ValueError: words without a token; a seed as generator; a negative noise_scale; where frames see
                each other, a context or a window; a context that ends within a patch of several frames.
        """
        require_list("prompts", prompts)
        check_generator(generator)
        noise_scale = read_value("generate_images", "noise_scale", noise_scale, NotNegative)
        documents = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
        check_words(self.tokenizer, texts_of(documents))  # pyright: ignore[reportAttributeAccessIssue]
        (frames, y, x), depth = grid.grid, self.temporal_patch_size
        t = -(-frames // depth)
        window = None if window_frames is None or window_frames >= frames else window_frames // depth
        self.check_context(context or [], window)
        none = torch.zeros(0, self.patch_width)
        videos = [self.encode_visual(video)[1] for video in context] if context else [none] * len(documents)
        segment = self.segment_of(grid, window)
        last = len(videos[0]) if window is None else min(len(videos[0]), (window - 1) * y * x)
        sequences, before = [], []
        for document, video in zip(documents, videos, strict=True):
            parts, shown = self.split_document(document)
            sequences.append([*parts, segment])
            before.append(torch.cat([none, *shown, video[len(video) - last :]]))
        new = t - len(videos[0]) // (y * x)
        noise = noise_scale * torch.randn(len(sequences), new, y * x, self.patch_width, generator=generator)
        made = self.sample(model, sequences, torch.stack(before), noise, steps, window, guidance_scale)
        made = torch.cat([torch.stack(videos).to(made), made.flatten(1, 2)], 1).unflatten(1, (t, -1))
        pixels = self.decode_frames(made, y, x)
        return pixels[:, :frames] if isinstance(grid, Video) else pixels.mean(1)

    def segment_of(self, grid: Image | Video, window: int | None) -> Image | Video:
        """The tokens of an image or video, of patches of several frames.

        Args:
            grid: its t counts frames.
            window: patches in time that are seen at once; None for all.
        """
        if isinstance(grid, Image):
            return grid
        depth = self.temporal_patch_size
        t = -(-grid.t // depth) if window is None else window
        return replace(grid, t=t, seconds_per_frame=grid.seconds_per_frame * depth)

    def sample(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Sequence[str | Segment]],
        before: Tensor,
        noise: Tensor,
        steps: int,
        window: int | None,
        guidance_scale: float,
    ) -> Tensor:
        """Patches (b, t, n, p) from noise of that shape; see `sample_frames`, whose second half it adds."""
        rows = len(noise)
        noise = noise.flatten(1, 2)[:, None] if self.full_video_attention else noise
        if not any(True for _ in texts_of(sequences)):
            guidance_scale = 1.0  # there is no text to drop
        if guidance_scale != 1:
            unconditional = [[part for part in row if not isinstance(part, str)] for row in sequences]
            sequences = [*sequences, *unconditional]
            before, noise = before.repeat(2, 1, 1), noise.repeat(2, 1, 1, 1)
        before, noise = (part.to(model.device, model.dtype) for part in (before, noise))
        batch = build_batch(sequences, self.tokenizer, self.scheme, "left", self.full_video_attention)
        patches = sample_frames(model, batch.to(model.device), noise, steps, before, window, guidance_scale)
        return patches[:rows]

    def check_context(self, context: Sequence[Part], window: int | None) -> None:
        """Refuse videos that cannot be continued."""
        if self.full_video_attention and (context or window):
            raise ValueError(
                "frames see each other here, so a video is generated whole, in one pass; to continue one, or "
                "to generate in a window, train with video_attention causal"
            )
        lengths = {len(to_pixels(video, self.num_channels)) for video in context}
        if odd := [length for length in lengths if length % (depth := self.temporal_patch_size)]:
            raise ValueError(f"a video of {odd[0]} frames ends within a patch of {depth}; give whole ones")

    def generate_text(
        self, model: PreTrainedModel, documents: Sequence[Sequence[Part]], max_new_tokens: int = 64
    ) -> list[str]:
        """The most likely text after each document, up to its end or `max_new_tokens`.

        Args:
            model: that generates.
            documents: strings and images, each document in order.
            max_new_tokens: of each text.

        Raises:
            ValueError: words without a token.
        """
        check_words(self.tokenizer, texts_of(documents))  # pyright: ignore[reportAttributeAccessIssue]
        inputs = self(documents=documents).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # pyright: ignore
        return self.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def texts_of(documents: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The strings of documents.

    Raises:
        ValueError: a string in the place of a document.
    """
    for document in documents:
        require_list("a document", document)
        yield from (part for part in document if isinstance(part, str))


def to_pixels(part: Any, channels: int) -> Tensor:
    """Pixels (ch, y, x) of an image or (t, ch, y, x) of a video, from -1 to 1.

    Raises:
        ValueError: tensors of another shape, a number of channels that PIL has no mode for.
    """
    part = getattr(part, "pixels", part)
    if isinstance(part, list | tuple):
        return torch.stack([to_pixels(frame, channels) for frame in part])
    if isinstance(part, PILImage):
        if channels not in MODES:
            raise ValueError(f"an image of PIL has {', '.join(map(str, MODES))} channels, not {channels}")
        pixels = torch.from_numpy(np.array(part.convert(MODES[channels])))
        part = pixels.view(*pixels.shape[:2], channels).permute(2, 0, 1)
    pixels = torch.as_tensor(part)
    if pixels.dim() not in (3, 4):
        raise ValueError(f"an image is (ch, y, x) and a video (t, ch, y, x), not {tuple(pixels.shape)}")
    return pixels.float() if pixels.is_floating_point() else pixels / 127.5 - 1


def to_pil(image: Tensor) -> PILImage:
    """The PIL image of pixels (ch, y, x) from -1 to 1.

    Raises:
        ValueError: a number of channels that PIL has no mode for.
    """
    if len(image) not in MODES:
        raise ValueError(f"an image of PIL has {', '.join(map(str, MODES))} channels, not {len(image)}")
    levels = image.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return PIL.Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy())


def flatten_visuals(given: Any, dims: int) -> Iterator[Part]:
    """Images (dims 3) or videos (dims 4) of nested lists, one after another."""
    if given is None:
        return
    if isinstance(given, list | tuple) and not (dims == 4 and given and is_image(given[0])):
        for entry in given:
            yield from flatten_visuals(entry, dims)
        return
    yield given


def visuals_by_text(given: Any, texts: int, dims: int) -> list[Iterator[Part]]:
    """What each text takes from: its own list where there are as many lists as texts, else one for all."""
    many = isinstance(given, list | tuple) and len(given) == texts
    if many and all(isinstance(x, list | tuple) and not (dims == 4 and x and is_image(x[0])) for x in given):
        return [flatten_visuals(own, dims) for own in given]
    return [flatten_visuals(given, dims)] * texts


def is_image(part: Any) -> bool:
    """Whether it is one image, such as a frame of a video."""
    return isinstance(part, PILImage) or getattr(part, "ndim", 0) == 3


def split_texts(texts: Sequence[str], images: Any, videos: Any) -> list[list[Part]]:
    """Documents of texts with tokens and of what stands at the tokens.

    Raises:
        ValueError: more or fewer images or videos than tokens.
    """
    images, videos = visuals_by_text(images, len(texts), 3), visuals_by_text(videos, len(texts), 4)
    queues = [{IMAGE_TOKEN: i, VIDEO_TOKEN: v} for i, v in zip(images, videos, strict=True)]
    documents = [list(interleave(*pair)) for pair in zip(texts, queues, strict=True)]
    for token, queue in (item for row in queues for item in row.items()):
        if left := len(list(queue)):
            raise ValueError(f"{left} more came for {token} than the text has places for")
    return documents


def interleave(text: str, queues: dict[str, Iterator[Part]]) -> Iterator[Part]:
    """The text between tokens, and at each token the next entry of its queue."""
    for part in re.split(f"({'|'.join(queues)})", text):
        if part not in queues:
            yield from [part] if part else []
            continue
        if (found := next(queues[part], None)) is None:
            name = part.strip("<>")
            raise ValueError(f"{part} stands in {text!r} once more than {name}s came for it")
        yield found
