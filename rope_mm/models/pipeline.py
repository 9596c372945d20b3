"""A trained model as a pipeline: images and videos from text, text from images and videos."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from rope_mm.data.documents import MapDocuments, Visual
from rope_mm.data.templates import Column, Task, find_tasks, read_template
from rope_mm.files import reason, write_text
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.models.processing_rope_mm import Part, RopeMMProcessor, to_pil
from rope_mm.models.sequences import require_list
from rope_mm.models.tokenizers import check_words
from rope_mm.segments import Image, Video

SPEC_FILE = "generation_spec.json"  # beside a saved model
MAX_BATCH = 250  # images or videos that are generated in one pass


@dataclass(frozen=True)
class GenerationSpec:
    """What a model was trained to generate, and how.

    Attributes:
        templates: of its documents, see `read_template`.
        kinds: what each of their columns holds: "text", "image" or "video".
        size: pixels (height, width) of an image, or the side of a square.
        frames: of a video.
        steps: passes of the model for an image or frame.
        guidance_scale: see `classifier_free_guidance`.
        noise_scale: of the noise that images are made of, see `RopeMMProcessor.generate_images`.
    """

    templates: list[str]
    kinds: dict[str, str]
    size: int | tuple[int, int]
    frames: int = 1
    steps: int = 1
    guidance_scale: float = 1.0
    noise_scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.size, list):  # as JSON brings it
            object.__setattr__(self, "size", tuple(self.size))

    @classmethod
    def of(
        cls,
        documents: MapDocuments,
        templates: Sequence[str],
        steps: int,
        guidance_scale: float = 1.0,
        noise_scale: float = 1.0,
    ) -> "GenerationSpec":
        """The spec of a model that learns these documents; its videos are as long as the longest of a few.

        Raises:
            ValueError: a guidance scale where every template has text before the image to generate.
        """
        check_guidance(guidance_scale, templates, documents.kinds)
        tasks = find_tasks(documents.templates, documents.kinds)
        frames = 1
        if "text2video" in tasks:
            videos = [video for _, video in documents.eval_prompts(tasks["text2video"], 8)]
            frames = max(len(video.pixels) for video in videos if isinstance(video, Visual))
        how = steps, guidance_scale, noise_scale
        return cls(list(templates), documents.kinds, documents.size, frames, *how)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks that its templates train, by name."""
        return find_tasks([read_template(template) for template in self.templates], self.kinds)

    def task(self, name: str) -> Task:
        """A task of TASKS.

        Raises:
            ValueError: one that no template trains.
        """
        if name not in self.tasks:
            raise ValueError(
                f"no template of this model trains {name}; it was trained for "
                f"{', '.join(self.tasks) or 'text alone'}, by the templates {self.templates}"
            )
        return self.tasks[name]


@dataclass(frozen=True)
class GenerationOutput:
    """What a call of the pipeline returns.

    Attributes:
        images: PIL images, or a tensor (n, ch, y, x) in [-1, 1]; None from a model of videos.
        frames: a list of PIL images for each video, or a tensor (n, t, ch, y, x); None from a model of
            images.
    """

    images: Any = None
    frames: Any = None


@dataclass(frozen=True)
class RopeMMPipeline:
    """A model, its processor, and what it was trained to generate.

        pipeline = RopeMMPipeline.from_pretrained("runs/pretrain/model")
        pipeline("a red circle").images[0].save("circle.png")

    Args:
        model: the model.
        processor: its tokenizer, patches and positions.
        spec: its tasks, sizes and steps.
    """

    model: PreTrainedModel
    processor: RopeMMProcessor
    spec: GenerationSpec

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RopeMMPipeline":
        """The pipeline of a folder that `save_pretrained` wrote.

        Raises:
            ValueError: a folder that holds none, or whose files are damaged.
        """
        folder = Path(folder)
        if not folder.exists():
            raise ValueError(f"the folder {folder} does not exist; give the folder model of a training run")
        if not (folder / SPEC_FILE).is_file():
            raise ValueError(f"{folder} holds no {SPEC_FILE}; give the folder model of a training run")
        try:
            model = RopeMMForConditionalGeneration.from_pretrained(folder).eval()
            processor = RopeMMProcessor.from_pretrained(folder)
            spec = GenerationSpec(**json.loads((folder / SPEC_FILE).read_text(encoding="utf-8")))
        except (SafetensorError, JSONDecodeError, RuntimeError, OSError, TypeError) as error:
            remedy = "the command that trained it writes it again"
            raise ValueError(f"{folder} holds no whole model ({reason(error)}); {remedy}") from error
        return cls(model, processor, spec)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, processor and spec to a folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_text(Path(folder) / SPEC_FILE, json.dumps(asdict(self.spec), indent=1))

    def to(self, device: torch.device | str) -> "RopeMMPipeline":
        """This pipeline, its model moved to a device."""
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_scale: float | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> GenerationOutput:
        """Images, or videos from a model that was trained on videos alone, for one caption or several.

        Args:
            prompt: captions; "" for a model that generates without text.
            num_images_per_prompt: images or videos of each caption, one after another.
            height: pixels; those of training if not given.
            width: pixels; those of training if not given.
            num_frames: frames of a video; as many as in training if not given.
            num_inference_steps: passes for an image or frame; those of training if not given.
            guidance_scale: see `classifier_free_guidance`; that of training if not given.
            noise_scale: of the noise; below 1 images vary less, and more of them show their caption.
            generator: of the noise.
            output_type: "pil", or "pt" for tensors in [-1, 1].

        Raises:
            ValueError: no captions, words without a token, a size that whole patches do not tile, a model of
                neither.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', not {output_type!r}")
        captions = read_captions(prompt)
        task = "text2video" if num_frames or "text2image" not in self.spec.tasks else "text2image"
        prompts = [self.prompt(task, caption) for caption in captions for _ in range(num_images_per_prompt)]
        options = {"size": (height, width), "steps": num_inference_steps}
        options |= {"guidance_scale": guidance_scale, "noise_scale": noise_scale}
        if task == "text2image":
            images = self.generate_image(prompts, generator, **options)
            return GenerationOutput(images=images if output_type == "pt" else list(map(to_pil, images)))
        frames = num_frames or self.spec.frames
        videos = self.generate_video(prompts, [], frames, generator, **options)
        return GenerationOutput(
            frames=videos if output_type == "pt" else [list(map(to_pil, video)) for video in videos]
        )

    def prompt(self, task: str, text: str = "", visual: Part | None = None) -> list[Part]:
        """What stands before a task's column, the columns there filled.

        Args:
            task: a name of TASKS.
            text: of text columns.
            visual: of image and video columns.

        Raises:
            ValueError: a task of images without one, words without a token, text for a task that reads none.
        """
        check_words(self.processor.tokenizer, [text])  # pyright: ignore[reportAttributeAccessIssue]
        before = self.spec.task(task).before
        columns = {self.spec.kinds[part.column] for part in before if isinstance(part, Column)}
        if text and "text" not in columns:
            raise ValueError(f"{task} reads no text in this model, so {text!r} would change nothing; give ''")
        if visual is None and columns - {"text"}:
            raise ValueError(f"{task} starts from an image or a video; give one")
        values = {"text": text, "image": visual, "video": visual}
        parts = (part if isinstance(part, str) else values[self.spec.kinds[part.column]] for part in before)
        return [part for part in parts if part is not None]

    def generate_text(self, prompts: Sequence[Sequence[Part]]) -> list[str]:
        """The text that continues each prompt."""
        return self.processor.generate_text(self.model, prompts)

    def generate_image(
        self,
        prompts: Sequence[Sequence[Part]],
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Images (b, ch, y, x) after prompts, on the CPU; see `generate` for the options."""
        return torch.stack(self.generate(prompts, None, [], generator, **options))

    def generate_image_like(
        self,
        prompts: Sequence[Sequence[Part]],
        images: Sequence[Tensor],
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Images (ch, y, x) after prompts, on the CPU, each in the size of a given one.

        Args:
            prompts: documents.
            images: (ch, y, x), one for each prompt.
            generator: of the noise.
        """
        made: dict[int, Tensor] = {}
        for group in group_by_size([[image] for image in images]):
            size = tuple(images[group[0]].shape[-2:])
            found = self.generate_image([prompts[number] for number in group], generator, size=size)
            made.update(zip(group, found, strict=True))
        return [made[number] for number in range(len(prompts))]

    def generate_video(
        self,
        prompts: Sequence[Sequence[Part]],
        context: Sequence[Tensor],
        frames: int,
        generator: torch.Generator | None = None,
        window_frames: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Videos (b, t, ch, y, x) after prompts, on the CPU.

        Args:
            prompts: documents.
            context: videos (t, ch, y, x) of equal size that are continued, one for each prompt, or none.
            frames: number of new frames.
            generator: of the noise.
            window_frames: see `RopeMMProcessor.generate_images`.
            options: see `generate`.
        """
        if context and "size" not in options:
            options["size"] = tuple(context[0].shape[-2:])
        options["window_frames"] = window_frames
        return torch.stack(self.generate(prompts, frames, context, generator, **options))

    def continue_video(
        self,
        prompts: Sequence[Sequence[Part]],
        videos: Tensor | Sequence[Tensor],
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Videos of the same lengths that continue the first half of the given ones (t, ch, y, x), t >= 2.

        The half is rounded down to whole patches; where frames see each other nothing is given.

        Args:
            prompts: the parts of a document before each video.
            videos: (t, ch, y, x) each, in [-1, 1].
            generator: of the noise.
        """
        made: dict[int, Tensor] = {}
        depth = self.processor.temporal_patch_size
        for group in group_by_size([[*prompt, video] for prompt, video in zip(prompts, videos, strict=True)]):
            length = len(videos[group[0]])
            given = 0 if self.processor.full_video_attention else length // 2 // depth * depth
            context = [videos[number][:given] for number in group] if given else []
            chosen = [prompts[number] for number in group]
            made.update(
                zip(group, self.generate_video(chosen, context, length - given, generator), strict=True)
            )
        return [made[number] for number in range(len(prompts))]

    def generate(
        self,
        prompts: Sequence[Sequence[Part]],
        frames: int | None,
        context: Sequence[Tensor],
        generator: torch.Generator | None,
        size: tuple[int | None, int | None] = (None, None),
        steps: int | None = None,
        guidance_scale: float | None = None,
        window_frames: int | None = None,
        noise_scale: float | None = None,
    ) -> list[Tensor]:
        """Images (ch, y, x), or videos (t, ch, y, x) of new frames after a context, on the CPU.

        Prompts whose images are equal in size go through the model together, MAX_BATCH of them at most.

        Args:
            prompts: documents.
            frames: number of new frames; None for images.
            context: one video for each prompt, or none.
            generator: of the noise.
            size: pixels (height, width); None for those of training.
            steps: passes for an image or frame; None for those of training.
            guidance_scale: None for that of training.
            window_frames: see `RopeMMProcessor.generate_images`.
            noise_scale: None for that of training.
        """
        require_list("prompts", prompts)
        if guidance_scale is not None:
            check_guidance(guidance_scale, self.spec.templates, self.spec.kinds)
        made: dict[int, Tensor] = {}
        grid = self.grid(size)
        if frames is not None:
            grid = Video(frames + (len(context[0]) if context else 0), grid.y, grid.x)
        for group in group_by_size(prompts):
            for part in (group[i : i + MAX_BATCH] for i in range(0, len(group), MAX_BATCH)):
                images = self.processor.generate_images(
                    self.model,
                    [prompts[number] for number in part],
                    grid,
                    generator,
                    self.spec.steps if steps is None else steps,
                    [context[number] for number in part] if context else None,
                    window_frames,
                    self.spec.guidance_scale if guidance_scale is None else guidance_scale,
                    self.spec.noise_scale if noise_scale is None else noise_scale,
                )
                made.update(zip(part, images.cpu(), strict=True))
        return [made[number] for number in range(len(prompts))]

    def grid(self, size: tuple[int | None, int | None] = (None, None)) -> Image:
        """An image of this size in pixels (height, width), or None for those of training, as a segment.

        Raises:
            ValueError: a size that whole patches do not tile.
        """
        height, width = (
            own if side is None else side for own, side in zip(sides(self.spec.size), size, strict=True)
        )
        return grid_of((height, width), self.processor.patch_size)


def read_captions(prompt: object) -> list[str]:
    """The captions of a prompt.

    Raises:
        ValueError: what is neither a caption nor a list of one or more.
    """
    captions = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(captions, list | tuple) and captions and all(isinstance(text, str) for text in captions):
        return list(captions)
    raise ValueError(f"prompt must be a caption or a list of one or more captions, not {prompt!r}")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size (height, width) or the side of a square."""
    return (size, size) if isinstance(size, int) else size


def grid_of(size: int | tuple[int, int], patch_size: int) -> Image:
    """An image as a segment of patches.

    Args:
        size: pixels (height, width), or the side of a square.
        patch_size: pixels of a patch's side.

    Raises:
        ValueError: a size that whole patches do not tile.
    """
    height, width = sides(size)
    if min(height, width) < 1:
        raise ValueError(
            f"images of {height} x {width} pixels (height x width) are empty; each side is a multiple of "
            f"{patch_size}, the side of a patch, and at least {patch_size}"
        )
    if height % patch_size or width % patch_size:
        near = (patch_size * max(1, round(side / patch_size)) for side in (height, width))
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into patches of {patch_size} x {patch_size}; "
            f"a size that does is {' x '.join(map(str, near))}"
        )
    return Image(height // patch_size, width // patch_size)


def group_by_size(prompts: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Numbers of the prompts whose images and videos are equal in size, which a model takes together."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        visuals = (getattr(part, "pixels", part) for part in prompt if not isinstance(part, str))
        groups.setdefault(tuple(map(numpy.shape, visuals)), []).append(number)
    return list(groups.values())


def check_guidance(scale: float, templates: Sequence[str], kinds: Mapping[str, str]) -> None:
    """Refuse guidance of a model that never generates without text.

    Args:
        scale: of guidance; 1 is none.
        templates: of its documents.
        kinds: what their columns hold.

    Raises:
        ValueError: a scale other than 1 where every template has text before the image to generate.
    """
    if scale != 1 and not any(generates_unconditionally(read_template(text), kinds) for text in templates):
        raise ValueError(
            f"guidance_scale {scale} needs a template that generates an image with no text before it, such "
            f"as '{{image:generate}}{{caption}}'; these are {list(templates)}, which fit guidance_scale 1"
        )


def generates_unconditionally(template: Sequence[str | Column], kinds: Mapping[str, str]) -> bool:
    """Whether a template has an image or video to generate before its first text."""
    for part in template:
        if isinstance(part, str) or kinds[part.column] == "text":
            return False
        if part.generate:
            return True
    return False
