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
from rope_mm.data.synthetic.sprites import FACTORS, SHAPES
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
    """A pipeline that makes no mistakes but one: its colours are a number of places further in the list.

    With `only` it makes the mistake for that shape alone.
    """

    def __init__(self, off=0, only=None):
        self.off, self.only = off, only
        self.processor = SimpleNamespace(tokenizer=load_tokenizer())

    def change(self, factors):
        """Factors (n,) with the mistake."""
        off = torch.full_like(factors["shape"], self.off)
        if self.only:
            off *= factors["shape"] == list(SHAPES).index(self.only)
        return {**factors, "colour": (factors["colour"] + off) % len(VIDEO_FACTORS["colour"])}

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
    for source, documents, factors in (("sprites", sprites, FACTORS), ("videos", videos, VIDEO_FACTORS)):
        evaluator = SPRITE_EVALUATORS[source]
        metrics = evaluator.evaluate(Oracle(off), documents)
        for task in (evaluator.generating, evaluator.captioning):
            assert metrics.pop(f"acc/{task}") == share
            found = {name: metrics.pop(f"acc/{task}/{name}") for name in factors}
            assert found == dict.fromkeys(factors, 1.0) | {"colour": share}
            assert {name: metrics.pop(f"acc/{task}/{name}") for name in SHAPES} == dict.fromkeys(
                SHAPES, share
            )
        assert not metrics


def test_a_shape_s_metric_counts_samples_of_that_shape_alone(sprites):
    metrics = SPRITE_EVALUATORS["sprites"].evaluate(Oracle(1, only="ring"), sprites)
    assert {name: metrics[f"acc/text2image/{name}"] for name in SHAPES} == dict.fromkeys(SHAPES, 1.0) | {
        "ring": 0.0
    }
    captions = sprites.sources[0]["caption"].to_pylist()
    rings = sum(" ring" in caption for caption in captions)
    assert 0 < rings < len(sprites)
    assert metrics["acc/text2image"] == pytest.approx(1 - rings / len(sprites))
    assert metrics["acc/text2image/shape"] == 1.0 and metrics["acc/text2image/colour"] < 1.0


def test_a_task_without_a_template_and_a_shape_without_samples_have_no_metric():
    rows = captioned_sprites(1, 64)["test"]
    moons = [row for row, shape in enumerate(rows["shape"]) if shape == list(SHAPES).index("moon")]
    assert len(moons) > 1
    captioning = MapDocuments([rows.select(moons)], ["{image}{caption}"], **SHAPE)
    metrics = SPRITE_EVALUATORS["sprites"].evaluate(Oracle(), captioning)
    assert metrics == {
        f"acc/image2text{name}": 1.0 for name in ("", "/moon", *(f"/{key}" for key in FACTORS))
    }


def test_images_of_several_shapes_are_evaluated_each_in_its_own():
    held_out = load_splits("sprites-aspect")["test"]
    documents = MapDocuments([held_out], ["{caption}{image:generate}"], **SHAPE, keep_aspect=4)
    sizes = {tuple(documents.document([row], make_generator(0))[1].pixels.shape[1:]) for row in (0, 200, 400)}
    assert sizes == {(16, 16), (12, 20), (20, 12)}
    evaluator = SPRITE_EVALUATORS["sprites-aspect"]
    assert evaluator.evaluate(Oracle(), documents)["acc/text2image"] == 1.0
    assert evaluator.evaluate(Oracle(1), documents)["acc/text2image"] == 0.0
