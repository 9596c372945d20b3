"""Documents of text, images and videos become the arguments of a forward; noise becomes images and videos."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, ByT5Tokenizer

from rope_mm import SCHEMES, Image, MoreFrames, Text, Video
from rope_mm.models import (
    ImageBatcher,
    RopeMMConfig,
    RopeMMForConditionalGeneration,
    RopeMMModel,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.models.image_generation import sample_frames
from rope_mm.nn.patches import to_patches

ROOT = Path(__file__).parents[2]
IMAGE, VIDEO = torch.rand(1, 4, 6) * 2 - 1, torch.rand(3, 1, 2, 4) * 2 - 1


def make(scheme="rope-tv", **settings):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme}, **settings)
    processor = RopeMMProcessor.from_config(config, load_tokenizer())
    return processor, RopeMMForConditionalGeneration(config).eval()


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_documents_become_segments_and_their_patches_in_order():
    processor, _ = make()
    inputs = processor(documents=[["see ", IMAGE, " and ", VIDEO, "."], ["ab"]], padding_side="right")
    sequence = ["see ", Image(2, 3), " and ", Video(3, 1, 2), "."]
    plain = build_batch([sequence, ["ab"]], processor.tokenizer, processor.scheme).inputs()
    same({name: inputs[name] for name in plain}, plain)
    patches = to_patches(IMAGE[None], 2)[0], to_patches(VIDEO, 2).flatten(0, 1)
    assert torch.equal(inputs["patches"], torch.cat(patches))
    assert set(inputs) <= set(processor.model_input_names)


@pytest.mark.parametrize("scheme", ["rope-tv", "qwen2-vl-vision"])
def test_a_patch_has_the_position_of_its_place_in_the_image(scheme):
    processor, model = make(scheme)
    rows = torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 8)  # each patch says its row
    batcher = ImageBatcher(model.config, processor.tokenizer, 8)
    pipeline = batcher.pipeline(model)
    for patches in (
        processor(documents=[["a", rows[None]]])["patches"],
        batcher.to_patches(rows[None, None])[0],
    ):
        place = processor(documents=[["a", rows[None]]])["position_ids"][2, 0, 1:]
        assert torch.equal(patches[:, 0].double(), place - place.min())
        assert torch.equal(batcher.to_images(patches[None])[0, 0], rows)
    images = processor.generate_images(model, ["a"], Image(4, 4), torch.Generator().manual_seed(0))
    assert torch.equal(images, pipeline.generate_image([["a"]], torch.Generator().manual_seed(0)))


def test_text_with_image_tokens_is_the_same_as_a_document():
    processor, _ = make()
    documents = processor(documents=[["see ", IMAGE, " and ", VIDEO, "."], ["ab", IMAGE]])
    text = processor(
        text=["see <image> and <video>.", "ab<image>"], images=[[IMAGE], [IMAGE]], videos=[VIDEO]
    )
    same(text, documents)
    frames = processor(text="<video>", videos=[list(VIDEO)])
    same(frames, processor(documents=[[VIDEO]]))


def test_pil_images_and_arrays_of_bytes_are_the_same_pixels():
    processor, model = make(num_channels=3)
    grey = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    pil, array = (
        processor(documents=[["a", part]]) for part in (Pil.fromarray(grey), grey.transpose(2, 0, 1))
    )
    same(pil, array)
    assert torch.equal(
        pil["patches"], to_patches(torch.tensor(grey).permute(2, 0, 1)[None] / 127.5 - 1, 2)[0]
    )
    assert model(**pil).patches.shape == (4, 12)


def test_a_conversation_is_formatted_by_the_chat_template():
    processor, model = make()
    image = Pil.fromarray(np.zeros((4, 6), np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
    talk = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == "user: <image>what is it?\nassistant: "
    inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    same(inputs, processor(text=text, images=[image]))
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.batch_decode(generated[:, -3:])[0], str)


def test_labels_are_text_tokens_alone():
    processor, model = make()
    inputs = processor(documents=[["see ", IMAGE, "."], ["a"]], return_labels=True)
    assert (inputs["labels"] != -100).sum() == 6
    assert model(**inputs).loss.isfinite()


def test_the_auto_classes_load_a_saved_model_and_processor(tmp_path):
    processor, model = make("m-rope")
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, RopeMMProcessor)
    assert again.scheme == processor.scheme == SCHEMES["m-rope"]
    documents = [["see ", IMAGE, "!"]]
    same(again(documents=documents), processor(documents=documents))
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, RopeMMForConditionalGeneration)
        torch.testing.assert_close(
            loaded(**again(documents=documents)).logits, model(**processor(documents=documents)).logits
        )
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]


def test_a_model_saved_with_its_code_is_loaded_by_it(tmp_path):
    processor, model = make()
    classes = RopeMMConfig, RopeMMModel, RopeMMForConditionalGeneration, RopeMMProcessor
    autos = "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"
    before = [vars(kind).get("_auto_class") for kind in classes]
    try:
        for kind, auto in zip(classes, autos, strict=True):
            kind.register_for_auto_class(auto)
        processor.save_pretrained(tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
    finally:
        for kind, auto in zip(classes, before, strict=True):
            kind._auto_class = auto
    inputs = processor(documents=[["see ", IMAGE, "!"]])
    torch.save((dict(inputs), model(**inputs).logits), tmp_path / "generated.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
path = {str(tmp_path / "model")!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
inputs, logits = torch.load({str(tmp_path / "generated.pt")!r})
mine = processor(documents=[["see ", torch.zeros(1, 4, 6), "!"]])
assert all(torch.equal(mine[name], inputs[name]) for name in inputs if name != "patches")
torch.testing.assert_close(model(**inputs).logits, logits)
"""
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "two <image><image>", "images": [IMAGE]}, "<image> stands in .* once more than images"),
        ({"text": "none", "images": [IMAGE]}, "1 more came for <image> than the text has places for"),
        (
            {"text": ["a<image><image>", "b"], "images": [[IMAGE], [IMAGE]]},
            "<image> stands in 'a<image><image>' once more than images came",
        ),
        ({"documents": [[torch.zeros(3, 4, 4)]]}, r"\(3, 4, 4\) are not \(..., 1, y, x\) pixels"),
        ({"documents": [[torch.zeros(1, 4, 5)]]}, "4 x 5 pixels do not divide into patches of 2 x 2"),
        ({"documents": [[torch.zeros(4, 4)]]}, r"an image is \(ch, y, x\) and a video"),
        ({"text": "a", "audio": [0.0]}, "it has nothing that reads audio"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors='pt', not 'np'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(call, message):
    processor, _ = make()
    with pytest.raises(ValueError, match=message) as error:
        processor(**call)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_the_image_token_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has no <image>; take load_tokenizer"):
        RopeMMProcessor(ByT5Tokenizer(extra_ids=0))
    config = read_config(image_token_id=7)
    with pytest.raises(ValueError, match="<image> is 259 to the tokenizer but image_token_id is 7"):
        RopeMMProcessor.from_config(config, load_tokenizer())


def test_patches_that_do_not_fill_their_image_tokens_are_refused():
    processor, model = make()
    inputs = processor(documents=[["see ", IMAGE]])
    with pytest.raises(
        ValueError, match="5 patches came for 6 image tokens; an image of y x x patches takes y \\* x"
    ):
        model(**inputs | {"patches": inputs["patches"][:-1]})


@pytest.mark.parametrize("scheme", ["rope-tv", "rope-tv-causal", "m-rope", "mixed"])
def test_a_video_is_generated_frame_by_frame_as_without_a_cache(scheme):
    processor, model = make(scheme)
    captions, grid = ["a ball", "a longer caption"], Video(3, 2, 2)
    videos = processor.generate_images(model, captions, grid, torch.Generator().manual_seed(0))
    assert videos.shape == (2, 3, 1, 4, 4)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for row, caption in enumerate(captions):
        sequences = build_batch([[caption, grid]], processor.tokenizer, processor.scheme)
        frames = to_patches(videos[row], 2)
        for frame in range(3):
            patches = torch.cat([frames[:frame].flatten(0, 1), noise[row, frame:].flatten(0, 1)])
            made = model(**sequences.inputs(), patches=patches).patches
            torch.testing.assert_close(made.view(3, 4, 4)[frame], frames[frame], atol=1e-5, rtol=1e-5)


def test_more_frames_of_a_causal_video_have_the_positions_of_the_whole():
    processor, _ = make("rope-tv-causal")
    whole, _ = processor.scheme.place([Text(3), Video(3, 2, 2)])
    context, cursor = processor.scheme.place([Text(3), Video(1, 2, 2)])
    more, _ = processor.scheme.place([MoreFrames(2, 2, 2)], cursor)
    assert torch.equal(torch.cat([context, more]), whole)


def test_an_image_takes_one_pass_and_depends_on_the_seed_alone(monkeypatch):
    processor, model = make()
    calls = []
    forward = RopeMMModel.forward
    monkeypatch.setattr(RopeMMModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def generate(seed):
        generator = torch.Generator().manual_seed(seed)
        return processor.generate_images(model, ["a", "bc"], Image(2, 3), generator)

    assert generate(0).shape == (2, 1, 4, 6)
    assert len(calls) == 1
    assert torch.equal(generate(0), generate(0))
    assert not torch.equal(generate(0), generate(1))
    sequences = build_batch([["a", Image(2, 3)]], processor.tokenizer, processor.scheme)
    noise = torch.randn(1, 1, 6, 4)
    plain = model(**sequences.inputs(), patches=noise[:, 0]).patches
    assert torch.equal(sample_frames(model, sequences, noise)[0, 0], plain)
