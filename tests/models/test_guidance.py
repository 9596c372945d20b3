"""Guidance: from unconditional images to conditional ones, and beyond; and less noise."""

import pytest
import torch

from rope_mm import Image, Video
from rope_mm.data.documents import read_template
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer, read_config
from rope_mm.models.image_generation import classifier_free_guidance
from rope_mm.models.pipeline import GenerationSpec, RopeMMPipeline, generates_unconditionally

GRID = Image(2, 2)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=["rope-tv-causal", "m-rope"])
def model(request):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "rope_parameters": {"scheme": request.param}}
    return RopeMMForConditionalGeneration(read_config(**sizes)).eval()


def generate(model, prompts, guidance, steps=1, grid=GRID, **more):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    generator = torch.Generator().manual_seed(1)
    return processor.generate_images(model, prompts, grid, generator, steps, guidance_scale=guidance, **more)


CAPTIONS = ["a", "some words"]  # of unequal length, to be padded
NO_TEXT = [[], []]


@pytest.mark.parametrize(("steps", "grid"), [(1, GRID), (3, GRID), (2, Video(3, 2, 2))])
def test_a_guidance_scale_of_1_is_conditional_and_of_0_unconditional(model, steps, grid):
    plain = generate(model, CAPTIONS, 1.0, steps, grid)
    assert (plain - generate(model, NO_TEXT, 1.0, steps, grid)).abs().max() > 1e-2
    torch.testing.assert_close(generate(model, CAPTIONS, 1 + 1e-7, steps, grid), plain, **CLOSE)
    torch.testing.assert_close(
        generate(model, CAPTIONS, 0.0, steps, grid), generate(model, NO_TEXT, 1.0, steps, grid), **CLOSE
    )


def test_in_one_step_guidance_extrapolates_from_unconditional_to_conditional(model):
    conditional, unconditional = generate(model, CAPTIONS, 1.0), generate(model, NO_TEXT, 1.0)
    torch.testing.assert_close(
        generate(model, CAPTIONS, 2.5), unconditional + 2.5 * (conditional - unconditional), **CLOSE
    )


def test_each_step_is_guided_and_both_halves_continue_from_the_result(model):
    conditional, unconditional = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    guided = classifier_free_guidance(torch.cat([conditional, unconditional]), 3.0)
    assert torch.equal(guided[:3], guided[3:])
    torch.testing.assert_close(guided[:3], 3 * conditional - 2 * unconditional)
    made = generate(model, CAPTIONS, 3.0, 2)
    line = generate(model, NO_TEXT, 1.0, 2) + 3 * (
        generate(model, CAPTIONS, 1.0, 2) - generate(model, NO_TEXT, 1.0, 2)
    )
    assert (made - line).abs().max() > 1e-3  # no guidance of what came out at the end


def test_unconditional_rows_keep_the_images_and_frames_of_the_prompt(model):
    seen = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    prompts, no_text = [[image, " as words"] for image in seen], [[image] for image in seen]
    torch.testing.assert_close(generate(model, prompts, 0.0), generate(model, no_text, 1.0), **CLOSE)
    context = list(seen[:, None])
    video = generate(model, prompts, 0.0, 2, Video(3, 2, 2), context=context)
    torch.testing.assert_close(
        video, generate(model, no_text, 1.0, 2, Video(3, 2, 2), context=context), **CLOSE
    )
    assert torch.equal(video[:, 0], seen)


@pytest.mark.parametrize("window", [None, 2])
def test_a_document_without_text_is_not_guided(model, window):
    videos = [
        generate(model, NO_TEXT, guidance, 2, Video(4, 2, 2), window_frames=window) for guidance in (1.0, 3.0)
    ]
    assert torch.equal(*videos)


def test_a_guided_video_in_a_window_begins_as_one_that_fits_the_window(model):
    whole, rolling = (
        generate(model, CAPTIONS[:1], 2.0, 2, Video(3, 2, 2), window_frames=window) for window in (3, 2)
    )
    assert torch.equal(whole, generate(model, CAPTIONS[:1], 2.0, 2, Video(3, 2, 2)))
    torch.testing.assert_close(rolling[:, :2], generate(model, CAPTIONS[:1], 2.0, 2, Video(2, 2, 2)), **CLOSE)


def test_a_pipeline_generates_with_the_guidance_it_was_saved_with(model, tmp_path):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    spec = GenerationSpec(["{words}{image:generate}"], {"words": "text", "image": "image"}, 4, 1, 2, 2.0)
    RopeMMPipeline(model, processor, spec).save_pretrained(tmp_path)
    pipeline = RopeMMPipeline.from_pretrained(tmp_path)
    prompt = pipeline.prompt("text2image", "some")
    image = pipeline.generate_image([prompt], torch.Generator().manual_seed(1))
    torch.testing.assert_close(image, generate(model, ["some"], 2.0, 2), **CLOSE)
    image = pipeline.generate_image([prompt], torch.Generator().manual_seed(1), guidance_scale=1.0)
    torch.testing.assert_close(image, generate(model, ["some"], 1.0, 2), **CLOSE)


@pytest.mark.parametrize(("steps", "grid"), [(1, GRID), (3, GRID), (2, Video(3, 2, 2))])
def test_images_are_made_of_noise_of_the_given_scale(model, steps, grid, monkeypatch):
    made = generate(model, CAPTIONS, 1.0, steps, grid, noise_scale=0.25)
    assert (made - generate(model, CAPTIONS, 1.0, steps, grid)).abs().max() > 1e-2
    noise = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: noise(*shape, generator=generator) / 4)
    assert torch.equal(made, generate(model, CAPTIONS, 1.0, steps, grid))


def test_without_noise_all_images_of_a_caption_are_equal(model):
    first, second = generate(model, ["some words"] * 2, 1.0, noise_scale=0)
    torch.testing.assert_close(first, second)
    first, second = generate(model, ["some words"] * 2, 1.0)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [-0.5, float("nan"), "much"])
def test_a_scale_of_the_noise_that_is_none_is_refused(model, scale):
    with pytest.raises(ValueError, match="noise_scale must be a finite number >= 0, not "):
        generate(model, CAPTIONS, 1.0, noise_scale=scale)


def test_a_pipeline_generates_with_the_noise_it_was_saved_with(model, tmp_path):
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    columns = {"words": "text", "image": "image"}
    spec = GenerationSpec(["{words}{image:generate}"], columns, 4, noise_scale=0.5)
    RopeMMPipeline(model, processor, spec).save_pretrained(tmp_path)
    pipeline = RopeMMPipeline.from_pretrained(tmp_path)

    def made(**options):
        return pipeline(
            "some", generator=torch.Generator().manual_seed(1), output_type="pt", **options
        ).images

    torch.testing.assert_close(made(), generate(model, ["some"], 1.0, noise_scale=0.5), **CLOSE)
    torch.testing.assert_close(made(noise_scale=1.0), generate(model, ["some"], 1.0), **CLOSE)


@pytest.mark.parametrize(
    ("template", "unconditional"),
    [
        ("{image:generate}{words}", True),
        ("{image}{image:generate} so", True),
        ("{words}{image:generate}", False),
        ("see {image:generate}", False),
        ("{image}{words}", False),
    ],
)
def test_a_template_is_unconditional_if_an_image_to_generate_comes_before_its_first_text(
    template, unconditional
):
    kinds = {"words": "text", "image": "image"}
    assert generates_unconditionally(read_template(template), kinds) is unconditional
