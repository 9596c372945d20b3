"""A saved model as a pipeline: captions in, PIL images, videos or tensors out."""

import numpy as np
import pytest
import torch

from rope_mm.models import (
    GenerationSpec,
    ImageBatcher,
    RopeMMForConditionalGeneration,
    RopeMMPipeline,
    RopeMMProcessor,
    load_tokenizer,
    read_config,
)
from rope_mm.models.processing_rope_mm import to_pil, to_pixels

CAPTIONED = ["{caption}{image:generate}"]
UNCONDITIONAL = ["{image:generate}"]
VIDEOS = ["{caption}{frames:generate}"]
KINDS = {"caption": "text", "image": "image", "frames": "video"}


def make(templates=CAPTIONED, words=(), frames=1, **settings):
    torch.manual_seed(0)
    tokenizer = load_tokenizer("words", words) if words else load_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = read_config(
        hidden_size=32, intermediate_size=48, vocab_size=len(tokenizer), image_token_id=image, **settings
    )
    model = RopeMMForConditionalGeneration(config).eval()
    spec = GenerationSpec(templates, KINDS, size=8, frames=frames)
    return RopeMMPipeline(model, RopeMMProcessor.from_config(config, tokenizer), spec)


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_saved_pipeline_makes_a_pil_image_of_a_caption(tmp_path, channels, mode):
    pipeline = make(words=["a red circle"], num_channels=channels)
    pipeline.save_pretrained(tmp_path)
    loaded = RopeMMPipeline.from_pretrained(tmp_path)
    image = loaded("a red circle", generator=seed()).images[0]
    assert (image.size, image.mode) == ((8, 8), mode)
    tensor = pipeline(["a red circle"], generator=seed(), output_type="pt").images
    assert tensor.shape == (1, channels, 8, 8)
    assert np.array_equal(np.array(image), np.array(to_pil(tensor[0])))


def test_the_pipeline_of_images_alone_has_their_size_and_tokenizer(tmp_path):
    config = read_config(hidden_size=32, intermediate_size=48)
    model = RopeMMForConditionalGeneration(config).eval()
    ImageBatcher(config, load_tokenizer(), 12).pipeline(model).save_pretrained(tmp_path)
    loaded = RopeMMPipeline.from_pretrained(tmp_path)
    assert loaded("seven").images[0].size == (12, 12)
    assert loaded("seven", height=8, width=16).images[0].size == (16, 8)


def test_images_that_are_no_squares_are_generated_in_the_size_of_training(tmp_path):
    config = read_config(hidden_size=32, intermediate_size=48)
    batcher = ImageBatcher(config, load_tokenizer(), (8, 12))
    images = torch.rand(2, 1, 8, 12)
    assert torch.equal(batcher.to_images(batcher.to_patches(images)), images)
    model = RopeMMForConditionalGeneration(config).eval()
    batcher.pipeline(model).save_pretrained(tmp_path)
    loaded = RopeMMPipeline.from_pretrained(tmp_path)
    assert loaded.spec == batcher.pipeline(model).spec
    assert loaded("seven").images[0].size == (12, 8)
    assert loaded("seven", height=4).images[0].size == (12, 4)


def test_several_captions_each_get_their_images_in_order():
    pipeline = make()
    one = pipeline(["a", "bb"], num_images_per_prompt=2, generator=seed(), output_type="pt").images
    two = pipeline(["a", "a", "bb", "bb"], generator=seed(), output_type="pt").images
    assert one.shape == (4, 1, 8, 8)
    assert torch.equal(one, two)
    other = pipeline(["a", "a", "bb", "bb"], generator=seed(1), output_type="pt").images
    assert not torch.equal(one, other)


def test_many_images_are_generated_in_parts_as_at_once(monkeypatch):
    pipeline, captions = make(), ["a", "b", "c", "d", "e"]
    whole = pipeline(captions, generator=seed(), output_type="pt").images
    monkeypatch.setattr("rope_mm.models.pipeline.MAX_BATCH", 2)
    parts = pipeline(captions, generator=seed(), output_type="pt").images
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_a_model_of_videos_gives_frames():
    pipeline = make(VIDEOS, frames=3)
    (frames,) = pipeline("a ball", generator=seed()).frames
    assert [frame.size for frame in frames] == [(8, 8)] * 3
    assert pipeline("a ball", num_frames=5, output_type="pt").frames.shape == (1, 5, 1, 8, 8)


def test_a_template_with_text_is_preferred_to_one_without():
    pipeline = make([*UNCONDITIONAL, *CAPTIONED])
    assert pipeline.prompt("text2image", "a") == ["a"]
    one, two = (pipeline(text, generator=seed(), output_type="pt").images for text in ("a", "b"))
    assert not torch.equal(one, two)


def test_text_is_refused_by_a_model_that_reads_none():
    pipeline = make(UNCONDITIONAL)
    assert len(pipeline("", num_images_per_prompt=3).images) == 3
    with pytest.raises(ValueError, match=r"text2image reads no text in this model, so 'seven' .* give ''"):
        pipeline("seven")


def test_words_without_a_token_are_refused_by_the_pipeline_and_by_the_processor():
    pipeline = make(words=["a red circle"])
    model, processor = pipeline.model, pipeline.processor
    unknown = r"the tokenizer has no token for 'blue', '!' in 'a blue blue circle!'; use words of the"
    with pytest.raises(ValueError, match=unknown):
        pipeline("a blue blue circle!")
    with pytest.raises(ValueError, match=unknown):
        processor.generate_images(model, ["a blue blue circle!"], pipeline.grid())
    with pytest.raises(ValueError, match=unknown):
        processor.generate_text(model, [["a blue blue circle!"]])


def test_a_string_where_a_list_is_meant_is_refused():
    pipeline = make()
    model, processor = pipeline.model, pipeline.processor
    batcher = ImageBatcher(model.config, processor.tokenizer, 8)
    refused = r"must be a list, not the string 'seven'; write \['seven'\]"
    with pytest.raises(ValueError, match=f"captions {refused}"):
        batcher.sequences("seven")
    with pytest.raises(ValueError, match=f"prompts {refused}"):
        processor.generate_images(model, "seven", pipeline.grid())
    with pytest.raises(ValueError, match=f"prompts {refused}"):
        pipeline.generate_image("seven")
    with pytest.raises(ValueError, match=f"a document {refused}"):
        processor(documents=["seven"])
    with pytest.raises(ValueError, match=f"a document {refused}"):
        processor.generate_text(model, ["seven"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 9}, "9 x 8 pixels do not divide into patches of 2 x 2; a size that does is 8 x 8"),
        ({"output_type": "np"}, "output_type must be 'pil' or 'pt', not 'np'"),
        ({"num_inference_steps": 0}, "steps must be at least 1, not 0"),
        ({"generator": 0}, "generator is 0; give a torch.Generator"),
        ({"generator": [torch.Generator()]}, r"generator is \[.*\]; give a torch.Generator"),
        ({"num_frames": 2}, "no template of this model trains text2video; it was trained for text2image"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        make()("a", **call)


@pytest.mark.parametrize("prompt", [[], 7, None, ["a", 7]])
def test_what_is_no_caption_is_refused(prompt):
    with pytest.raises(ValueError, match="must be a caption or a list of one or more captions, not"):
        make()(prompt)


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the folder .*/x does not exist; give the folder model of a"):
        RopeMMPipeline.from_pretrained(tmp_path / "nope" / "x")
    with pytest.raises(ValueError, match=r"holds no generation_spec\.json; give the folder model"):
        RopeMMPipeline.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"holds no whole model .*the command that trained it writes it again"
    ):
        RopeMMPipeline.from_pretrained(tmp_path)


def test_pil_images_and_pixels_are_the_same():
    pixels = torch.randint(0, 256, (3, 4, 6)) / 127.5 - 1
    torch.testing.assert_close(to_pixels(to_pil(pixels), 3), pixels)
    with pytest.raises(ValueError, match="an image of PIL has 1, 3, 4 channels, not 2"):
        to_pil(torch.zeros(2, 4, 4))
