"""Examples as data sets have them: messages, prompts and completions, text, by a real processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from vision_language_models import TEXT

from rope_mm.hf import PackingCollator, packed_equals_alone, set_rope

TEXT_WORDS = ["user", "assistant", ":", "red", "blue", "what", "is", "it", "a"]
WORDS = ["[pad]", "<s>", "</s>", "[unk]", *TEXT_WORDS, "<image>"]
IMAGE_ID = WORDS.index("<image>")


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[pad]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[unk]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)


BODY = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %} <image> {% else %} {{ p.text }} {% endif %}{% endfor %}{% endif %} </s> "
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}user : " + BODY + "{% else %}assistant : "
    "{% generation %}" + BODY + "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def processor(tokenizer):
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    images = CLIPImageProcessorPil(**sizes)
    return LlavaProcessor(images, tokenizer, patch_size=8, chat_template=MARKED, **strategy)


@pytest.fixture
def model():
    text = {**TEXT, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model", "projection_dim": 32}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID)
    return LlavaForConditionalGeneration(config).eval()


def picture(value):
    return Image.fromarray(np.full((20, 30, 3), value, np.uint8))


def words(ids):
    return " ".join(WORDS[i] for i in ids)


ASKED = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a red"}]
PLACED = [
    {"role": "user", "content": [{"type": "text", "text": "it is"}, {"type": "image"}]},
    {"role": "assistant", "content": "blue"},
]
IMAGES = "<image> <image> <image> <image>"


def test_images_stand_where_messages_say_or_before_the_first_question(processor, model):
    collator = PackingCollator(processor, model, 64)
    first = collator.prepare({"messages": ASKED, "images": [picture(0)]})
    assert words(first.tokens["input_ids"]) == f"user : {IMAGES} what is it </s> assistant : a red </s>"
    assert first.media["pixel_values"].shape == (1, 3, 16, 16)
    placed = collator.prepare({"messages": PLACED, "image": picture(0)})
    assert words(placed.tokens["input_ids"]) == f"user : it is {IMAGES} </s> assistant : blue </s>"
    assert (placed.tokens["labels"] == -100).tolist() == placed.kinds.bool().tolist()
    text = collator.prepare({"messages": ASKED})
    assert words(text.tokens["input_ids"]) == "user : what is it </s> assistant : a red </s>"
    assert not text.media


def test_the_assistant_alone_or_the_completion_alone_is_predicted(processor, model):
    collator = PackingCollator(processor, model, 64, assistant_only_loss=True)
    marked = collator.prepare({"messages": [*ASKED, *ASKED], "images": [picture(0)]})
    assert words(marked.tokens["labels"][marked.tokens["labels"] != -100]) == "a red </s> a red </s>"
    collator = PackingCollator(processor, model, 64)
    for pair in (
        {"prompt": ASKED[:1], "completion": ASKED[1:], "images": [picture(0)]},
        {
            "prompt": "user : <image> what is it </s> assistant : ",
            "completion": "a red </s>",
            "image": picture(0),
        },
    ):
        made = collator.prepare(pair)
        assert words(made.tokens["input_ids"]).endswith("what is it </s> assistant : a red </s>")
        assert words(made.tokens["labels"][made.tokens["labels"] != -100]) == "a red </s>"
        assert len(made.media["pixel_values"]) == 1


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
def test_raw_examples_packed_equal_each_alone(processor, model, scheme):
    if scheme:
        set_rope(model, scheme)
    examples = [
        {"messages": ASKED, "images": [picture(10)]},
        {"text": "it is a blue </s>"},
        {"prompt": PLACED[:1], "completion": PLACED[1:], "images": [picture(200)]},
        {"text": "<image> is <image> </s>", "images": [picture(90), picture(30)]},
    ]
    collator = PackingCollator(processor, model, 26)
    report = packed_equals_alone(model, examples, collator)
    assert report.ok and len(report.differences) == 4, report
    batch = collator(examples)
    assert len(batch["input_ids"]) == 2 and len(batch["pixel_values"]) == 4


def test_a_tokenizer_serves_text_models(tokenizer, tiny):
    model = tiny("llama")
    tokenizer.chat_template = MARKED
    collator = PackingCollator(tokenizer, model, 16, assistant_only_loss=True)
    batch = collator([{"messages": ASKED}, {"messages": PLACED[1:]}])
    labels = batch["labels"][batch["labels"] != -100]
    assert words(labels) == "a red </s> blue </s>"
    assert packed_equals_alone(model, [{"messages": ASKED}, {"text": "it is a"}], collator).ok


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"messages": PLACED, "images": [picture(0)] * 2},
            "no place for {'image': 1} of the example's images",
        ),
        ({"messages": [*PLACED, *PLACED], "images": [picture(0)]}, "places for more images than the example"),
        (
            {"caption": "a red"},
            r"an example has \['caption'\]; it needs input_ids, messages, text, or prompt",
        ),
        (
            {"input_ids": torch.ones(2, 3)},
            r"input_ids of an example must be \(s,\) or \(1, s\), not \(2, 3\)",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "one value for each of its tokens, not input_ids 2, labels 1"),
        ({"input_ids": []}, "one value for each of its tokens, not input_ids 0"),
        ({"input_ids": [1, 5], "images": [picture(0)]}, "holds images that no processor has seen"),
    ],
)
def test_examples_that_do_not_fit_are_refused(processor, model, example, message):
    collator = PackingCollator(processor, model, 64, prove=False)
    with pytest.raises(ValueError, match=message):
        collator.prepare(example)


def test_what_is_missing_is_named(tokenizer, model):
    with pytest.raises(
        ValueError, match=r"examples with \['text'\] need a processor; without one give input_ids"
    ):
        PackingCollator(None, model, 64, prove=False).prepare({"text": "a"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = PackingCollator(tokenizer, model, 64, assistant_only_loss=True, prove=False)
    with pytest.raises(ValueError, match="needs a chat template that marks the assistant's turns"):
        plain.prepare({"messages": ASKED})
