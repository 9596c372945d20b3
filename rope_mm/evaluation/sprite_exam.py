"""What the model makes of held-out sprites and clips, judged by what they show."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_mm.data.documents import MapDocuments
from rope_mm.data.seeding import make_generator
from rope_mm.data.synthetic.captioned_sprites import read_caption
from rope_mm.data.synthetic.sprites import FACTORS, VIDEO_FACTORS
from rope_mm.data.templates import find_tasks
from rope_mm.evaluation.sprites import classify_sprites, classify_videos
from rope_mm.models.pipeline import GenerationPipeline, pixels_of, processor_parts

ASKED = 128  # held-out pictures or clips, of 512


@dataclass(frozen=True)
class SpriteEvaluator:
    """Tasks of making and of telling, who judges what was made, and by which factors it is right."""

    making: str
    telling: str
    judge: Callable[[Tensor], dict[str, Tensor]]
    factors: tuple[str, ...]

    def evaluate(self, teller: GenerationPipeline, held_out: MapDocuments) -> dict[str, float]:
        """Shares of what was made and told with every factor of the true picture, for the tasks taught."""
        tasks, marks = find_tasks(held_out.templates, held_out.kinds), {}
        if self.making in tasks:
            asked = held_out.eval_prompts(tasks[self.making], ASKED)
            true = torch.stack([pixels_of(value) for _, value in asked])
            make = (
                teller.complete if true.dim() == 5 else lambda prompts, _, noise: teller.draw(prompts, noise)
            )
            made = torch.stack(
                [*make([processor_parts(before) for before, _ in asked], true, make_generator("exam"))]
            )
            marks[f"acc/{self.making}"] = self.agreement(true, self.judge(made))
        if self.telling in tasks:
            asked = held_out.eval_prompts(tasks[self.telling], ASKED)
            shown = [[part for part in before if not isinstance(part, str)] for before, _ in asked]
            true = torch.stack([parts[-1].pixels for parts in shown])
            read = [
                read_caption(words)
                for words in teller.write([processor_parts(before) for before, _ in asked])
            ]
            said = {name: torch.tensor([caption[name] for caption in read]) for name in self.factors}
            marks[f"acc/{self.telling}"] = self.agreement(true, said)
        return marks

    def agreement(self, true: Tensor, found: dict[str, Tensor]) -> float:
        """The share of pictures or clips of which every factor was found."""
        seen = self.judge(true)
        right = torch.stack([seen[name] == found[name] for name in self.factors]).all(0)
        return float(right.float().mean())


SPRITE_EVALUATORS = {
    "sprites": SpriteEvaluator("text2image", "image2text", classify_sprites, tuple(FACTORS)),
    "videos": SpriteEvaluator("text2video", "video2text", classify_videos, tuple(VIDEO_FACTORS)),
}
