"""What a pretrained model does when asked: write of a picture, draw what words say, go on with a clip."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rope_mm.data.documents import Document, MapDocuments, Visual
from rope_mm.data.templates import Column, Task, find_tasks, read_template
from rope_mm.files import write_text
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration
from rope_mm.models.processing_rope_mm import Part, RopeMMProcessor
from rope_mm.models.tokenizers import check_words
from rope_mm.segments import Image, Video

FILE = "documents.json"


@dataclass(frozen=True)
class GenerationSpec:
    """What a model was taught: templates, what their columns hold, sizes; steps and guidance of a drawing."""

    templates: list[str]
    kinds: dict[str, str]
    size: int
    frames: int
    steps: int
    guidance: float = 1.0

    @classmethod
    def of(
        cls, documents: MapDocuments, templates: Sequence[str], steps: int, guidance: float = 1.0
    ) -> "GenerationSpec":
        """The form of documents; a clip is as long as the longest of some of theirs.

        Raises:
            ValueError: guidance, where all templates have words before what is drawn.
        """
        if guidance != 1 and not any(
            generates_unconditionally(template, documents.kinds) for template in documents.templates
        ):
            raise ValueError(
                f"guidance {guidance} needs a template that draws with no words before, such as "
                f"'{{image:generate}}{{caption}}'; these are {templates}, which fit guidance 1"
            )
        tasks = find_tasks(documents.templates, documents.kinds)
        frames = 1
        if "text2video" in tasks:
            frames = max(len(pixels_of(clip)) for _, clip in documents.eval_prompts(tasks["text2video"], 8))
        return cls(list(templates), documents.kinds, documents.size, frames, steps, guidance)

    def task(self, name: str) -> Task:
        """How the model was taught to a task of TASKS.

        Raises:
            ValueError: what it was not taught.
        """
        tasks = find_tasks([read_template(template) for template in self.templates], self.kinds)
        if name not in tasks:
            raise ValueError(f"no template of this model trains {name}; they are {self.templates}")
        return tasks[name]


@dataclass(frozen=True)
class GenerationPipeline:
    """A model, its processor and its form."""

    model: PreTrainedModel
    processor: RopeMMProcessor
    form: GenerationSpec

    @classmethod
    def load(cls, path: Path) -> "GenerationPipeline":
        """What `save` wrote.

        Raises:
            ValueError: a folder that holds no such model.
        """
        if not (path / FILE).is_file():
            raise ValueError(f"{path} holds no {FILE}; give OUT/model of a run of train/pretrain.py")
        model = RopeMMForConditionalGeneration.from_pretrained(path).eval()
        processor = RopeMMProcessor.from_pretrained(path)
        return cls(model, processor, GenerationSpec(**json.loads((path / FILE).read_text())))

    def save(self, path: Path) -> None:
        """Write model, processor and form to a folder."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)
        write_text(path / FILE, json.dumps(asdict(self.form), indent=1))

    def prompt(self, name: str, words: str = "", shown: Part | None = None) -> list[Part]:
        """What stands before a task's column, its columns filled with these words or this picture or clip.

        Raises:
            ValueError: a task that needs a picture before it where none came, words without a token.
        """
        check_words(self.processor.tokenizer, [words])  # pyright: ignore[reportAttributeAccessIssue]
        parts: list[Part] = []
        for part in self.form.task(name).before:
            value = (
                part if isinstance(part, str) else words if self.form.kinds[part.column] == "text" else shown
            )
            if value is None:
                raise ValueError(f"{name} starts from an image or a video; give one")
            parts.append(value)
        return parts

    def write(self, prompts: Sequence[Sequence[Part]]) -> list[str]:
        """What the model writes after prompts, one by one where they differ in their pictures' sizes."""
        return self.processor.generate_text(self.model, prompts)

    def draw(self, prompts: Sequence[Sequence[Part]], generator: torch.Generator) -> Tensor:
        """Pictures (b, ch, y, x) after prompts, those of one form together."""
        side = self.form.size // self.processor.patch_size
        made: dict[int, Tensor] = {}
        for group in group_by_size(prompts):
            asked = [prompts[number] for number in group]
            made.update(zip(group, self.make(asked, Image(side, side), generator), strict=True))
        return torch.stack([made[number] for number in range(len(prompts))])

    def film(
        self,
        prompts: Sequence[Sequence[Part]],
        begun: Sequence[Tensor],
        frames: int,
        generator: torch.Generator,
        window: int | None = None,
    ) -> Tensor:
        """Clips (b, t, ch, y, x) after prompts: those begun, and so many frames more; see `draw`."""
        side = self.form.size // self.processor.patch_size
        grid = Video(frames + (len(begun[0]) if begun else 0), side, side)
        return self.make(prompts, grid, generator, begun, window)

    def make(
        self,
        prompts: Sequence[Sequence[Part]],
        grid: Image | Video,
        generator: torch.Generator,
        begun: Sequence[Tensor] | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Pictures or clips of a grid, in the form's steps and guidance; see the processor."""
        steps, guidance = self.form.steps, self.form.guidance
        return self.processor.generate_images(
            self.model, prompts, grid, generator, steps, begun, window, guidance
        )

    def complete(
        self, prompts: Sequence[Sequence[Part]], true: Tensor | Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Clips that go on from the first half of true ones (t, ch, y, x), t >= 2; see `draw`.

        The half is rounded down to whole patches; where frames see each other nothing is given.
        """
        made: dict[int, Tensor] = {}
        depth = self.processor.temporal_patch_size
        for group in group_by_size([[*prompt, clip] for prompt, clip in zip(prompts, true, strict=True)]):
            length = len(true[group[0]])
            given = 0 if self.processor.full_video_attention else length // 2 // depth * depth
            begun = [true[number][:given] for number in group] if given else []
            asked = [prompts[number] for number in group]
            clips = self.film(asked, begun, length - given, generator).cpu()
            made.update(zip(group, clips, strict=True))
        return [made[number] for number in range(len(prompts))]


def group_by_size(prompts: Sequence[Sequence[Part]]) -> list[list[int]]:
    """Numbers of the prompts whose pictures and clips are of equal sizes, which a model takes together."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        sizes = tuple(numpy.shape(part) for part in prompt if not isinstance(part, str))  # pyright: ignore
        groups.setdefault(sizes, []).append(number)
    return list(groups.values())


def generates_unconditionally(template: Sequence[str | Column], kinds: Mapping[str, str]) -> bool:
    """Whether a template has something to draw before its first words."""
    for part in template:
        if isinstance(part, str) or kinds[part.column] == "text":
            return False
        if part.generate:
            return True
    return False


def pixels_of(part: str | Visual) -> Tensor:
    """The pixels of what is shown."""
    if isinstance(part, str):
        raise ValueError(f"{part!r} is no picture")
    return part.pixels


def processor_parts(document: Document) -> list[Part]:
    """A document as a processor takes it."""
    return [part if isinstance(part, str) else part.pixels for part in document]


def document_text(document: Document) -> str:
    """A document's words."""
    return "".join(part for part in document if isinstance(part, str)).strip()
