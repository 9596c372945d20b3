"""The exam of sprites and clips, sat by whoever reads captions as `read_caption` does, or shifts a colour."""

import pytest
import torch

from rope_mm.data import (
    VIDEO_FACTORS,
    MapDocuments,
    captioned_sprites,
    captioned_videos,
    render_sprites,
    render_videos,
)
from rope_mm.data.synthetic.captioned_sprites import read_caption, write_captions
from rope_mm.evaluation.sprite_exam import SPRITE_EVALUATORS
from rope_mm.evaluation.sprites import classify_sprites, classify_videos

SHAPE = {"size": 16, "channels": 3}
CLIP_PHRASE = "{shape} {colour} {row} {column} {motion}"


@pytest.fixture(scope="module")
def sprites():
    rows = captioned_sprites(1, 48)["test"]
    return MapDocuments([rows], ["{caption}{image:generate}", "see {image} {caption}"], **SHAPE)


@pytest.fixture(scope="module")
def clips():
    rows = captioned_videos(1, 48)["test"]
    return MapDocuments([rows], ["{frames:generate}{caption}"], **SHAPE)


class Clever:
    """A teller that makes no mistakes but those it is told to: so many colours further."""

    def __init__(self, off=0):
        self.off = off

    def change(self, factors):
        """Factors (n,) with the mistake."""
        return {**factors, "colour": (factors["colour"] + self.off) % len(VIDEO_FACTORS["colour"])}

    def draw(self, prompts, generator):
        read = [read_caption(caption) for (caption,) in prompts]
        factors = {name: torch.tensor([caption[name] for caption in read]) for name in read[0]}
        return render_sprites(self.change(factors)) / 127.5 - 1

    def complete(self, prompts, true, generator):
        return render_videos(self.change(classify_videos(true)), true.shape[1]) / 127.5 - 1

    def write(self, prompts):
        shown = torch.stack([prompt[-1] if torch.is_tensor(prompt[-1]) else prompt[-2] for prompt in prompts])
        factors = self.change(classify_sprites(shown) if shown.dim() == 4 else classify_videos(shown))
        phrase = CLIP_PHRASE if shown.dim() == 5 else CLIP_PHRASE.removesuffix(" {motion}")
        factors = {name: factors[name] for name in VIDEO_FACTORS if name in factors}
        return write_captions(factors, [phrase], [0] * len(shown))


@pytest.mark.parametrize(("off", "share"), [(0, 1.0), (1, 0.0)])
def test_an_exam_gives_the_share_with_every_factor_right(off, share, sprites, clips):
    assert SPRITE_EVALUATORS["sprites"].evaluate(Clever(off), sprites) == {
        "acc/text2image": share,
        "acc/image2text": share,
    }
    assert SPRITE_EVALUATORS["videos"].evaluate(Clever(off), clips) == {
        "acc/text2video": share,
        "acc/video2text": share,
    }


def test_a_task_that_is_not_taught_has_no_mark():
    telling = MapDocuments([captioned_sprites(1, 8)["test"]], ["{image}{caption}"], **SHAPE)
    assert SPRITE_EVALUATORS["sprites"].evaluate(Clever(), telling) == {"acc/image2text": 1.0}
