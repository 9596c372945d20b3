"""Documents of words, pictures and clips -> the tensors of a forward, as transformers' processor."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs

from rope_mm.models.sampling import sample_frames
from rope_mm.models.sequences import IMAGE_TOKEN, build_batch, token_order
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
Part = str | Picture | np.ndarray | Tensor | list | tuple


class RopeMMProcessorKwargs(ProcessingKwargs, total=False):
    """What a call may be told: `padding_side`, "left" as `generate` wants it, or "right"."""

    _defaults = {"text_kwargs": {"padding_side": "left", "return_tensors": "pt"}}  # pyright: ignore


class RopeMMProcessor(ProcessorMixin):
    """Tokenizer, patches and positions of one model.

        inputs = processor(documents=[["see ", picture, " and ", clip]])
        inputs = processor(text="see <image>", images=[picture])
        words = model.generate(**inputs)

    A picture is PIL's, or (ch, y, x); a clip (t, ch, y, x) or a list of pictures; whole numbers are 0 to 255,
    others -1 to 1. `from_config` makes one that fits a model.

    Raises:
        ValueError: a number of pictures that is not that of their tokens, other channels than the model's,
            sizes that whole patches do not tile.
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
        clips = {name: getattr(config, name) for name in ("temporal_patch_size", "video_attention")}
        processor = cls(tokenizer, *sizes, **clips)
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
    def full(self) -> bool:
        """Whether the frames of a clip see each other."""
        return self.video_attention == "full"

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "attention_mask", "position_ids", "rank", "rope_deltas", "patches"]

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
        """Inputs of documents, or of text with <image> and <video> where images and videos stand.

        Args:
            images: pictures in the order of their tokens, in one list or one for each text.
            text: one or several.
            videos: clips, in the same way.
            documents: lists of strings, pictures and clips; no string in them is taken for a token.
            seconds: from one frame of a clip to the next, 1 if nothing is said.
            return_labels: whether to add `labels`, -100 at patches and padding, for the loss of the words.
            kwargs: `padding_side` and what `RopeMMProcessorKwargs` have.
        """
        if kwargs.pop("audio", None) is not None:  # chat templates send it, if only to say that there is none
            raise ValueError("the model reads words, pictures and clips; it has nothing that reads audio")
        settings = self._merge_kwargs(
            RopeMMProcessorKwargs,  # pyright: ignore[reportArgumentType]
            self.tokenizer.init_kwargs,
            **kwargs,
        )
        chosen = settings["text_kwargs"]
        if chosen["return_tensors"] != "pt":
            raise ValueError(f"tensors are torch's, return_tensors='pt', not {chosen['return_tensors']!r}")
        if documents is None:
            texts = [text] if isinstance(text, str) else list(text or [""])
            images, videos = share(images, len(texts), 3), share(videos, len(texts), 4)
            queues = [{IMAGE_TOKEN: i, VIDEO_TOKEN: v} for i, v in zip(images, videos, strict=True)]
            documents = [list(interleave(*pair)) for pair in zip(texts, queues, strict=True)]
            for token, queue in (item for row in queues for item in row.items()):
                if left := len(list(queue)):
                    raise ValueError(f"{left} more came for {token} than the text has places for")
        stories, patches = [], []
        for document in documents:
            story, shown = self.see(document, seconds or 1.0)
            stories.append(story)
            patches += shown
        sequences = build_batch(stories, self.tokenizer, self.scheme, chosen["padding_side"], self.full)
        data = sequences.inputs() | ({"patches": torch.cat(patches)} if patches else {})
        if return_labels:
            words = sequences.mask & (sequences.input_ids != self.image_token_id)
            data["labels"] = sequences.input_ids.masked_fill(~words, -100)
        return BatchFeature(data)

    def see(self, document: Sequence[Part], seconds: float = 1.0) -> tuple[list[str | Segment], list[Tensor]]:
        """A document's strings and segments, and the patches (n, p) of each of its pictures and clips."""
        read = [part if isinstance(part, str) else self.read(part, seconds) for part in document]
        story = [part if isinstance(part, str) else part[0] for part in read]
        return story, [part[1] for part in read if not isinstance(part, str)]

    def read(self, part: Part, seconds: float) -> tuple[Segment, Tensor]:
        """A picture or clip as a segment and its patches (n, p)."""
        pixels = to_pixels(part, self.num_channels)
        if pixels.shape[-3] != self.num_channels:
            raise ValueError(f"{tuple(pixels.shape)} are not (..., {self.num_channels}, y, x) pixels")
        depth = self.temporal_patch_size
        patches = to_patches(to_tubelets(pixels.view(-1, *pixels.shape[-3:]), depth), self.patch_size)
        y, x = (side // self.patch_size for side in pixels.shape[-2:])
        segment = Image(y, x) if pixels.dim() == 3 else Video(len(patches), y, x, seconds * depth)
        return segment, patches.flatten(0, 1)[token_order(segment, self.scheme)]

    def draw(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str | Sequence[Part]],
        grid: Image | Video,
        generator: torch.Generator | None = None,
        steps: int = 1,
        begun: Sequence[Part] | None = None,
        window: int | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Pictures (b, ch, y, x) or clips (b, t, ch, y, x) after captions, or after documents.

        A frame takes so many steps, one pass each. `begun` are clips that the drawn ones go on from; they and
        the pictures of all documents are equal in size. With a `window` a frame sees of its clip so many
        frames at most, itself among them; they stand as in a clip of that length, however long this one is.
        A `guidance` above 1 enlarges what the words change in a drawing, at twice the cost, see `guide`; the
        model must have been taught to draw without words, too. Clips whose frames see each other are drawn at
        once.

        Raises:
            ValueError: such a clip begun or with a window; one begun with part of a patch of several frames.
        """
        (frames, y, x), depth = grid.grid, self.temporal_patch_size
        none, t = torch.zeros(0, self.patch_width), -(-frames // depth)
        window = None if window is None or window >= frames else window // depth
        self.check_begun(begun or [], window)
        clips = [self.read(clip, 1.0)[1] for clip in begun] if begun else [none] * len(prompts)
        told = replace(grid, t=t, seconds=grid.seconds * depth) if isinstance(grid, Video) else grid
        held = told if window is None else replace(told, t=window)
        last = len(clips[0]) if window is None else min(len(clips[0]), (window - 1) * y * x)
        stories, shown = [], []
        for prompt, clip in zip(prompts, clips, strict=True):
            story, seen = self.see([prompt] if isinstance(prompt, str) else prompt)
            stories.append([*story, held])
            shown.append(torch.cat([none, *seen, clip[len(clip) - last :]]))
        shape = t - len(clips[0]) // (y * x), y * x, self.patch_width
        noise = torch.randn(len(stories), *shape, generator=generator)
        noise = noise.flatten(1, 2)[:, None] if self.full else noise
        if not any(isinstance(part, str) for story in stories for part in story):
            guidance = 1.0  # there are no words to leave out
        if guidance != 1:
            stories += [[part for part in story if not isinstance(part, str)] for story in stories]
            shown, noise = shown * 2, noise.repeat(2, 1, 1, 1)
        before, noise = (part.to(model.device, model.dtype) for part in (torch.stack(shown), noise))
        sequences = build_batch(stories, self.tokenizer, self.scheme, "left", self.full).to(model.device)
        drawn = sample_frames(model, sequences, noise, steps, before, window, guidance)[: len(clips)]
        patches = torch.cat([torch.stack(clips).to(drawn), drawn.flatten(1, 2)], 1).view(-1, *shape[1:])
        raster = patches[:, token_order(Image(y, x), self.scheme).argsort()]
        pixels = from_tubelets(to_images(raster, y, x, self.patch_size).unflatten(0, (-1, t)), depth)
        return pixels[:, :frames] if isinstance(grid, Video) else pixels.mean(1)

    def check_begun(self, begun: Sequence[Part], window: int | None) -> None:
        """Refuse clips that cannot be gone on with."""
        if self.full and (begun or window):
            raise ValueError(
                "frames see each other here, so clips are drawn at once and whole; to go on with one, or in "
                "a window, train with video_attention causal"
            )
        lengths = {len(to_pixels(clip, self.num_channels)) for clip in begun}
        if odd := [length for length in lengths if length % (depth := self.temporal_patch_size)]:
            raise ValueError(f"a clip of {odd[0]} frames ends within a patch of {depth}; give whole ones")

    def write(
        self, model: PreTrainedModel, documents: Sequence[Sequence[Part]], words: int = 64
    ) -> list[str]:
        """What the model writes after each document, up to its end or so many words."""
        inputs = self(documents=documents).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=words, do_sample=False)  # pyright: ignore
        return self.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def to_pixels(part: Any, channels: int) -> Tensor:
    """Pixels (ch, y, x) or (t, ch, y, x) from -1 to 1."""
    if isinstance(part, list | tuple):
        return torch.stack([to_pixels(frame, channels) for frame in part])
    if isinstance(part, Picture):
        if channels not in MODES:
            raise ValueError(f"a picture of PIL has {', '.join(map(str, MODES))} channels, not {channels}")
        pixels = torch.from_numpy(np.array(part.convert(MODES[channels])))
        part = pixels.view(*pixels.shape[:2], channels).permute(2, 0, 1)
    pixels = torch.as_tensor(part)
    if pixels.dim() not in (3, 4):
        raise ValueError(f"a picture is (ch, y, x) and a clip (t, ch, y, x), not {tuple(pixels.shape)}")
    return pixels.float() if pixels.is_floating_point() else pixels / 127.5 - 1


def pictures(given: Any, dims: int) -> Iterator[Part]:
    """Pictures (dims 3) or clips (dims 4) of lists in lists, one after another."""
    if given is None:
        return
    if isinstance(given, list | tuple) and not (dims == 4 and given and is_picture(given[0])):
        for entry in given:
            yield from pictures(entry, dims)
        return
    yield given


def share(given: Any, texts: int, dims: int) -> list[Iterator[Part]]:
    """What each text takes from: its own list where there are as many lists as texts, else all from one."""
    many = isinstance(given, list | tuple) and len(given) == texts
    if many and all(
        isinstance(x, list | tuple) and not (dims == 4 and x and is_picture(x[0])) for x in given
    ):
        return [pictures(own, dims) for own in given]
    return [pictures(given, dims)] * texts


def is_picture(part: Any) -> bool:
    """Whether it is one picture, such as a frame of a clip."""
    return isinstance(part, Picture) or getattr(part, "ndim", 0) == 3


def interleave(text: str, queues: dict[str, Iterator[Part]]) -> Iterator[Part]:
    """The text's words, and at its tokens what is next in their queues."""
    for part in re.split(f"({'|'.join(queues)})", text):
        if part not in queues:
            yield from [part] if part else []
            continue
        if (found := next(queues[part], None)) is None:
            raise ValueError(f"{part} stands in {text!r} once more than pictures came for it")
        yield found
