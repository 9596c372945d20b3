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


def broken(y, x, after, seed=0):
    """The same with a token behind each row, as Mistral's processor puts [IMG_BREAK] and [IMG_END]."""
    one = example(y, x, after, seed)
    rows = [token for row in range(y) for token in [IMAGE] * x + [94 + (row == y - 1)]]
    return one | {"input_ids": torch.tensor([[1, 5 + seed, 6, *rows, *range(20, 20 + after)]])}


@torch.no_grad()
def test_tokens_behind_the_rows_of_an_image_are_its_last_column():
    model, one = mistral3(), broken(2, 3, 3)
    set_rope(model, "rope-tv")
    positions = place("text:3 image:2x4 text:3", "rope-tv")[0]
    assert torch.equal(positions_for(model, one)[1:, 0].T, positions.to(torch.float64))
    plain = model(**one, position_ids=positions_for(model, one)).logits
    assert torch.equal(model(**one).logits, plain)
    run = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    assert torch.equal(model.generate(**one, **run), model.generate(**one, **run, use_cache=False))
    left = torch.nn.functional.pad(one["input_ids"], (2, 0))
    mask = torch.nn.functional.pad(torch.ones_like(one["input_ids"]), (2, 0))
    padded = model(**one | {"input_ids": left}, attention_mask=mask).logits[:, 2:]
    assert (padded - plain).abs().max() < 1e-5 * plain.abs().max()


def test_images_with_broken_rows_are_packed_and_cut_behind_their_last_row():
    model = mistral3()
    set_rope(model, "rope-tv")
    examples = [broken(2, 3, 3, 1), broken(1, 2, 5, 2), example(3, 2, 4, 3), broken(3, 2, 9, 4)]
    report = packed_equals_alone(model, examples, PackingCollator(None, model, 64))
    assert report.ok, report
    kept = PackingCollator(None, model, 13).prepare(broken(3, 2, 9, 4))
    assert len(kept) == 13 and "pixel_values" in kept.media
    text = {"input_ids": torch.cat((torch.arange(5, 9)[None], broken(3, 2, 0, 4)["input_ids"]), 1)}
    kept = PackingCollator(None, model, 15).prepare(broken(3, 2, 0, 4) | text)  # without [IMG_END]
    assert len(kept) == 7 and not kept.media


def test_sizes_of_more_images_than_there_are_tokens_are_refused():
    model, one = mistral3(), broken(2, 3, 3)
    set_rope(model, "rope-tv")
    sizes = torch.tensor([[8, 16], [16, 24]])
    with pytest.raises(ValueError, match="image:2x3 needs 6; give the grids"):
        model(**one | {"image_sizes": sizes, "pixel_values": torch.zeros(2, 3, 16, 24)})
