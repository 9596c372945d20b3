"""Images whose size in pixels says their grid: Pixtral's tower in Mistral 3."""

import copy

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig
from vision_language_models import IMAGE, TEXT

from rope_mm import SCHEMES, place
from rope_mm.hf import PackingCollator, packed_equals_alone, positions_for, set_rope

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 4, "head_dim": 16}


def mistral3():
    torch.manual_seed(0)
    parts = {"vision_config": PixtralVisionConfig(**VISION), "text_config": MistralConfig(**TEXT)}
    more = {"image_token_index": IMAGE, "vision_feature_layer": -1, "spatial_merge_size": 2}
    return Mistral3ForConditionalGeneration(Mistral3Config(**parts, **more)).eval()


def example(y, x, after, seed=0):
    """Text and an image of y x x tokens, each of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, 5 + seed, 6] + [IMAGE] * (y * x) + [*range(20, 20 + after)]])
    pixels = torch.randn(1, 3, 8 * y, 8 * x, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[8 * y, 8 * x]])}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope"])
def test_images_of_mistral3_stand_by_the_grid_of_their_size(scheme):
    model, one = mistral3(), example(2, 3, 3)
    truth, positions = copy.deepcopy(model), place("text:3 image:2x3 text:3", SCHEMES[scheme].layout)[0]
    angle = positions @ SCHEMES[scheme].omega(16)
    tables = [torch.cat((x, x), -1)[None].float() for x in (angle.cos(), angle.sin())]
    truth.model.language_model.rotary_emb.forward = lambda *_, **__: tables
    set_rope(model, scheme)
    assert torch.equal(positions_for(model, one)[1:, 0].T, positions.to(torch.float64))
    expected = truth(**one, use_cache=False).logits
    assert (model(**one).logits - expected).abs().max() < 5e-5 * expected.abs().max()
    run = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    assert torch.equal(model.generate(**one, **run), model.generate(**one, **run, use_cache=False))


def test_images_of_two_sizes_of_mistral3_are_packed():
    model = mistral3()
    set_rope(model, "rope-tv")
    report = packed_equals_alone(
        model, [example(2, 3, 3, 1), example(1, 2, 5, 2)], PackingCollator(None, model, 64)
    )
    assert report.ok, report


def test_rows_of_an_image_with_break_tokens_between_them_are_refused():
    model, one = mistral3(), example(2, 3, 3)
    set_rope(model, "rope-tv")
    one["input_ids"] = torch.tensor([[1, 5, *[IMAGE] * 3, 94, *[IMAGE] * 3, 95, 20, 21]])
    with pytest.raises(
        ValueError, match=r"1 images stand in 2 rows of tokens with other tokens between them"
    ):
        model(**one)
