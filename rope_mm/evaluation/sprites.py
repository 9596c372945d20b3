"""What an image or video of sprites shows, found without learning, and metrics of what a model generates.

Each image is compared with all possible sprites, so every true sprite is classified correctly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rope_mm.data.documents import MapDocuments
from rope_mm.data.seeding import EVALUATION, make_generator
from rope_mm.data.synthetic.captioned_sprites import all_combinations, read_caption
from rope_mm.data.synthetic.sprites import (
    FACTORS,
    MOTIONS,
    PLACES,
    VIDEO_FACTORS,
    palette,
    sprite_masks,
    trajectory,
)
from rope_mm.evaluation.samples import eval_pairs
from rope_mm.models.pipeline import RopeMMPipeline, group_by_size

MAX_IMAGES = 128  # compared at once, each with some 5,000 drawings
EVAL_SAMPLES = 128  # held-out images or videos, of 512


def classify_sprites(images: Tensor) -> dict[str, Tensor]:
    """The most likely sprite in each image under white noise.

    ‖image - background - mask x (colour - background)‖² is least among all masks and colours.

    Args:
        images: (n, 3, y, x), whole numbers in 0 to 255 or others in -1 to 1.

    Returns:
        The index (n,) of each factor of FACTORS, -1 for an empty image, and "distance" (n,), the root mean
        square of the difference, of values in [-1, 1].

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (n, 3, y, x), not {tuple(images.shape)}")
    drawings, masks = templates(images.shape[2], images.shape[3])
    colours, background = palette()
    paint = (colours - background) / 127.5
    scaled = images.cpu().float() / (1 if images.is_floating_point() else 127.5)
    light = scaled + images.is_floating_point() - background[:, None, None] / 127.5
    weight = masks.square().sum(1)[:, None] * paint.square().sum(1)  # (mask, colour)
    best, least = [], []
    for part in light.flatten(2).split(MAX_IMAGES):
        gain = 2 * torch.einsum("ncp,mp,kc->nmk", part, masks, paint) - weight
        most, index = gain.flatten(1).max(1)
        best.append(index)
        least.append(part.square().sum((1, 2)) - most)
    index = torch.cat(best) if best else torch.zeros(0, dtype=torch.long)
    mask, colour = index // len(colours), index % len(colours)
    factors = {name: drawings[name][mask] for name in ("shape", "row", "column")}
    factors["colour"] = torch.where(factors["shape"] < 0, -1, colour)
    distance = (torch.cat(least) if least else torch.zeros(0)).clamp_min(0) / light[:1].numel()
    return {**{name: factors[name] for name in FACTORS}, "distance": distance.sqrt()}


@lru_cache(maxsize=8)
def templates(y: int, x: int) -> tuple[dict[str, Tensor], Tensor]:
    """Factors (m,) and masks (m, y x) of all sprites: each shape at each place, shifted; last, none."""
    names = {name: FACTORS[name] for name in ("shape", "row", "column")}
    drawings = all_combinations({**names, "down": range(3), "right": range(3)})
    shift = torch.stack([drawings.pop("down"), drawings.pop("right")], 1) - 1
    masks = sprite_masks(drawings, (y, x), shift).flatten(1)
    empty = {name: torch.cat([factor, torch.tensor([-1])]) for name, factor in drawings.items()}
    return empty, torch.cat([masks, torch.zeros(1, y * x)])


def classify_videos(videos: Tensor) -> dict[str, Tensor]:
    """The factors of videos, from those of their frames; see `classify_sprites`.

    Args:
        videos: (n, t, 3, y, x), of two frames or more.

    Returns:
        The index (n,) of each factor of VIDEO_FACTORS, -1 where there is none: shape and colour are those of
        all frames with a sprite, row and column those of the first, the motion leads through all places. And
        "distance" (n,), the mean of the frames'.

    Raises:
        ValueError: another shape, or fewer than two frames.
    """
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"videos must be (n, t, 3, y, x) with 2 frames or more, not {tuple(videos.shape)}")
    frames = videos.shape[1]
    found = {
        name: part.unflatten(0, (-1, frames)) for name, part in classify_sprites(videos.flatten(0, 1)).items()
    }
    factors = {name: common_index(found[name]) for name in ("shape", "colour")}
    factors |= {name: found[name][:, 0] for name in PLACES}
    fits = torch.stack([motion_matches(found, motion) for motion in range(len(MOTIONS))], 1)
    factors["motion"] = torch.where(fits.any(1), fits.int().argmax(1), -1)
    return {**{name: factors[name] for name in VIDEO_FACTORS}, "distance": found["distance"].mean(1)}


def common_index(found: Tensor) -> Tensor:
    """The one index (n,) of all frames (n, t) that have any, or -1."""
    most = found.amax(1)
    return torch.where(((found == most[:, None]) | (found < 0)).all(1), most, -1)


def motion_matches(found: dict[str, Tensor], motion: int) -> Tensor:
    """Whether a motion, from the first frame's place, leads through the places (n, t) of all frames."""
    first = {name: found[name][:, 0] for name in PLACES}
    first |= {name: torch.zeros_like(first["row"]) for name in ("shape", "colour")}
    path = trajectory({**first, "motion": torch.full_like(first["row"], motion)}, found["row"].shape[1])
    outside = path["shape"] < 0
    return torch.stack([torch.where(outside, -1, path[name]) == found[name] for name in PLACES]).all(0).all(1)


@dataclass(frozen=True)
class SpriteEvaluator:
    """How many of a model's images or videos, and captions, are correct in every factor.

    For each task it gives `acc/TASK`, the share that is correct in all factors; `acc/TASK/FACTOR`, the share
    that is correct in one; and `acc/TASK/SHAPE`, the share of samples of a shape that is correct in all.

    Attributes:
        generating: the task of images or videos, a name of TASKS.
        captioning: the task of text.
        classify: finds the factors of images or videos.
        factors: those that must be correct.
    """

    generating: str
    captioning: str
    classify: Callable[[Tensor], dict[str, Tensor]]
    factors: tuple[str, ...]

    def evaluate(self, pipeline: RopeMMPipeline, held_out: MapDocuments) -> dict[str, float]:
        """Shares of correct images or videos and of correct captions, for tasks that the documents have.

        Args:
            pipeline: of the model.
            held_out: documents of the model's templates.

        Returns:
            The metrics that the class names; a shape that no sample has is skipped.
        """
        metrics = {}
        if pairs := eval_pairs(pipeline, held_out, self.generating, EVAL_SAMPLES):
            true = [value.pixels for _, value in pairs]
            prompts, generator = [before for before, _ in pairs], make_generator(EVALUATION)
            generate = pipeline.continue_video if true[0].dim() == 4 else pipeline.generate_image_like
            made = generate(prompts, true, generator)
            metrics |= self.accuracy(self.generating, true, self.classify_each(made))
        if pairs := eval_pairs(pipeline, held_out, self.captioning, EVAL_SAMPLES):
            visuals = [[part for part in before if not isinstance(part, str)] for before, _ in pairs]
            true = [parts[-1].pixels for parts in visuals]
            captions = [
                read_caption(text) for text in pipeline.generate_text([before for before, _ in pairs])
            ]
            read = {name: torch.tensor([caption[name] for caption in captions]) for name in self.factors}
            metrics |= self.accuracy(self.captioning, true, read)
        return metrics

    def classify_each(self, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Factors of images or videos that may differ in size."""
        found = {name: torch.empty(len(visuals), dtype=torch.long) for name in self.factors}
        for group in group_by_size([[visual] for visual in visuals]):
            factors = self.classify(torch.stack([visuals[number] for number in group]))
            for name, numbers in found.items():
                numbers[group] = factors[name]
        return found

    def accuracy(self, task: str, true: Sequence[Tensor], found: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of a task.

        Args:
            task: a name of TASKS.
            true: images or videos.
            found: factors (n,) of what was generated for each.
        """
        factors = self.classify_each(true)
        correct = {name: factors[name] == found[name] for name in self.factors}
        right = torch.stack(list(correct.values())).all(0)
        shares = {"": right} | {f"/{name}": fits for name, fits in correct.items()}
        shares |= {
            f"/{name}": right[factors["shape"] == shape] for shape, name in enumerate(FACTORS["shape"])
        }
        return {f"acc/{task}{name}": float(fits.float().mean()) for name, fits in shares.items() if len(fits)}


IMAGES = SpriteEvaluator("text2image", "image2text", classify_sprites, tuple(FACTORS))
SPRITE_EVALUATORS = {
    "sprites": IMAGES,
    "sprites-aspect": IMAGES,
    "videos": SpriteEvaluator("text2video", "video2text", classify_videos, tuple(VIDEO_FACTORS)),
}
