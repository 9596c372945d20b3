"""Metrics of sprites and videos, of a pipeline that is always correct or always off by one colour."""

from types import SimpleNamespace

import pytest
import torch

from rope_mm.data import (
    VIDEO_FACTORS,
    MapDocuments,
    captioned_sprites,
    captioned_videos,
    load_splits,
    make_generator,
    render_sprites,
    render_videos,
)
from rope_mm.data.synthetic.captioned_sprites import read_caption, write_captions
from rope_mm.evaluation.sprites import SPRITE_EVALUATORS, classify_sprites, classify_videos
from rope_mm.models import load_tokenizer

SHAPE = {"size": 16, "channels": 3}
VIDEO_PHRASE = "{shape} {colour} {row} {column} {motion}"


@pytest.fixture(scope="module")
def sprites():
    rows = captioned_sprites(1, 48)["test"]
    return MapDocuments([rows], ["{caption}{image:generate}", "see {image} {caption}"], **SHAPE)


@pytest.fixture(scope="module")
def videos():
    rows = captioned_videos(1, 48)["test"]
    return MapDocuments([rows], ["{frames:generate}{caption}"], **SHAPE)


class Oracle:
    """A pipeline that makes no mistakes but one: its colours are a number of places further in the list."""

    def __init__(self, off=0):
        self.off = off
        self.processor = SimpleNamespace(tokenizer=load_tokenizer())

    def change(self, factors):
        """Factors (n,) with the mistake."""
        return {**factors, "colour": (factors["colour"] + self.off) % len(VIDEO_FACTORS["colour"])}

    def generate_image_like(self, prompts, images, generator):
        made = []
        for (caption,), image in zip(prompts, images, strict=True):
            factors = {name: torch.tensor([value]) for name, value in read_caption(caption).items()}
            made.append(render_sprites(self.change(factors), tuple(image.shape[-2:]))[0] / 127.5 - 1)
        return made

    def continue_video(self, prompts, true, generator):
        factors = self.change(classify_videos(torch.stack(true)))
        return list(render_videos(factors, len(true[0])) / 127.5 - 1)

    def generate_text(self, prompts):
        visuals = [[part for part in prompt if not isinstance(part, str)][-1] for prompt in prompts]
        shown = torch.stack([visual.pixels for visual in visuals])
        factors = self.change(classify_sprites(shown) if shown.dim() == 4 else classify_videos(shown))
        phrase = VIDEO_PHRASE if shown.dim() == 5 else VIDEO_PHRASE.removesuffix(" {motion}")
        factors = {name: factors[name] for name in VIDEO_FACTORS if name in factors}
        return write_captions(factors, [phrase], [0] * len(shown))


@pytest.mark.parametrize(("off", "share"), [(0, 1.0), (1, 0.0)])
def test_the_metric_is_the_share_with_every_factor_correct(off, share, sprites, videos):
    assert SPRITE_EVALUATORS["sprites"].evaluate(Oracle(off), sprites) == {
        "acc/text2image": share,
        "acc/image2text": share,
    }
    assert SPRITE_EVALUATORS["videos"].evaluate(Oracle(off), videos) == {
        "acc/text2video": share,
        "acc/video2text": share,
    }


def test_a_task_without_a_template_has_no_metric():
    captioning = MapDocuments([captioned_sprites(1, 8)["test"]], ["{image}{caption}"], **SHAPE)
    assert SPRITE_EVALUATORS["sprites"].evaluate(Oracle(), captioning) == {"acc/image2text": 1.0}


def test_images_of_several_shapes_are_evaluated_each_in_its_own():
    held_out = load_splits("sprites-aspect")["test"]
    documents = MapDocuments([held_out], ["{caption}{image:generate}"], **SHAPE, keep_aspect=4)
    sizes = {tuple(documents.document([row], make_generator(0))[1].pixels.shape[1:]) for row in (0, 200, 400)}
    assert sizes == {(16, 16), (12, 20), (20, 12)}
    evaluator = SPRITE_EVALUATORS["sprites-aspect"]
    assert evaluator.evaluate(Oracle(), documents) == {"acc/text2image": 1.0}
    assert evaluator.evaluate(Oracle(1), documents) == {"acc/text2image": 0.0}
