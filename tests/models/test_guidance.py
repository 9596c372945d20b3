"""Drawing guided by words: from what is drawn without them, through what is drawn with them, and beyond."""

import pytest
import torch

from rope_mm import Image, Video
from rope_mm.data.documents import read_template
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer, read_config
from rope_mm.models.pipeline import GenerationSpec, RopeMMPipeline, generates_unconditionally
from rope_mm.models.sampling import classifier_free_guidance

GRID = Image(2, 2)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=["rope-tv-causal", "m-rope"])
def model(request):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "rope_parameters": {"scheme": request.param}}
    return RopeMMForConditionalGeneration(read_config(**sizes)).eval()


def draw(model, prompts, guidance, steps=1, grid=GRID, **more):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    generator = torch.Generator().manual_seed(1)
    return processor.generate_images(model, prompts, grid, generator, steps, guidance_scale=guidance, **more)


WORDS = ["a", "some words"]  # of unequal length, to be padded
SILENT = [[], []]


@pytest.mark.parametrize(("steps", "grid"), [(1, GRID), (3, GRID), (2, Video(3, 2, 2))])
def test_guidance_of_1_is_to_draw_by_the_words_and_of_0_without_them(model, steps, grid):
    plain = draw(model, WORDS, 1.0, steps, grid)
    assert (plain - draw(model, SILENT, 1.0, steps, grid)).abs().max() > 1e-2
    torch.testing.assert_close(draw(model, WORDS, 1 + 1e-7, steps, grid), plain, **CLOSE)
    torch.testing.assert_close(
        draw(model, WORDS, 0.0, steps, grid), draw(model, SILENT, 1.0, steps, grid), **CLOSE
    )


def test_in_one_step_guidance_goes_on_along_the_line_from_silence_to_words(model):
    told, untold = draw(model, WORDS, 1.0), draw(model, SILENT, 1.0)
    torch.testing.assert_close(draw(model, WORDS, 2.5), untold + 2.5 * (told - untold), **CLOSE)


def test_steps_are_guided_one_by_one_and_both_halves_go_on_from_the_same(model):
    told, untold = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    guided = classifier_free_guidance(torch.cat([told, untold]), 3.0)
    assert torch.equal(guided[:3], guided[3:])
    torch.testing.assert_close(guided[:3], 3 * told - 2 * untold)
    drawn = draw(model, WORDS, 3.0, 2)
    line = draw(model, SILENT, 1.0, 2) + 3 * (draw(model, WORDS, 1.0, 2) - draw(model, SILENT, 1.0, 2))
    assert (drawn - line).abs().max() > 1e-3  # no guidance of what came out at the end


def test_pictures_and_frames_stay_where_words_are_left_out(model):
    seen = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    prompts, silent = [[picture, " as words"] for picture in seen], [[picture] for picture in seen]
    torch.testing.assert_close(draw(model, prompts, 0.0), draw(model, silent, 1.0), **CLOSE)
    begun = list(seen[:, None])
    clip = draw(model, prompts, 0.0, 2, Video(3, 2, 2), context=begun)
    torch.testing.assert_close(clip, draw(model, silent, 1.0, 2, Video(3, 2, 2), context=begun), **CLOSE)
    assert torch.equal(clip[:, 0], seen)


@pytest.mark.parametrize("window", [None, 2])
def test_a_document_without_words_is_not_guided(model, window):
    film = [draw(model, SILENT, guidance, 2, Video(4, 2, 2), window_frames=window) for guidance in (1.0, 3.0)]
    assert torch.equal(*film)


def test_a_guided_clip_rolls_on_from_one_that_fits_its_window(model):
    whole, rolling = (
        draw(model, WORDS[:1], 2.0, 2, Video(3, 2, 2), window_frames=window) for window in (3, 2)
    )
    assert torch.equal(whole, draw(model, WORDS[:1], 2.0, 2, Video(3, 2, 2)))
    torch.testing.assert_close(rolling[:, :2], draw(model, WORDS[:1], 2.0, 2, Video(2, 2, 2)), **CLOSE)


def test_a_pipeline_generates_with_the_guidance_it_was_saved_with(model, tmp_path):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    spec = GenerationSpec(["{words}{image:generate}"], {"words": "text", "image": "image"}, 4, 1, 2, 2.0)
    RopeMMPipeline(model, processor, spec).save_pretrained(tmp_path)
    pipeline = RopeMMPipeline.from_pretrained(tmp_path)
    prompt = pipeline.prompt("text2image", "some")
    image = pipeline.generate_image([prompt], torch.Generator().manual_seed(1))
    torch.testing.assert_close(image, draw(model, ["some"], 2.0, 2), **CLOSE)
    image = pipeline.generate_image([prompt], torch.Generator().manual_seed(1), guidance_scale=1.0)
    torch.testing.assert_close(image, draw(model, ["some"], 1.0, 2), **CLOSE)


@pytest.mark.parametrize(
    ("template", "untold"),
    [
        ("{image:generate}{words}", True),
        ("{image}{image:generate} so", True),
        ("{words}{image:generate}", False),
        ("see {image:generate}", False),
        ("{image}{words}", False),
    ],
)
def test_a_template_draws_untold_where_something_is_drawn_before_its_first_words(template, untold):
    kinds = {"words": "text", "image": "image"}
    assert generates_unconditionally(read_template(template), kinds) is untold
