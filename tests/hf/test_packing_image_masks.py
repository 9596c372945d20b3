"""Packed rows of models whose masks open blocks of images: what mixes documents there is refused."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from vision_language_models import IMAGE, TEXT

from rope_mm.hf import PackingCollator, packed_equals_alone, positions_for, set_rope
from rope_mm.hf.packing import leaks

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
MIXES = "Gemma3ForConditionalGeneration does not keep documents with images apart in one row"


def gemma3():
    torch.manual_seed(0)
    text = {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return Gemma3ForConditionalGeneration(config).eval()


def paligemma():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**VISION, projection_dim=64)
    text = GemmaConfig(**TEXT)
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=64
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def example(before, images, after, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 80, (before + after,), generator=generator).tolist()
    ids = torch.tensor([text[:before] + [IMAGE] * 4 * images + text[before:]])
    pixels = {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)} if images else {}
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), **pixels}


SHORT, LONG, WORDS = example(2, 1, 2, 1), example(3, 1, 4, 2), example(7, 0, 0, 3)


def joined(*examples):
    """One row by hand."""
    names = ("input_ids", "token_type_ids")
    row = {name: torch.cat([x[name] for x in examples], 1) for name in names}
    pixels = [x["pixel_values"] for x in examples if "pixel_values" in x]
    return row | ({"pixel_values": torch.cat(pixels)} if pixels else {}) | {"use_cache": False}


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
def test_the_collator_refuses_rows_of_several_examples_with_images_of_gemma3(scheme):
    model = gemma3()
    if scheme:
        set_rope(model, scheme)
    collator = PackingCollator(None, model, 32)
    for examples in ([SHORT, WORDS], [LONG, SHORT]):
        with pytest.raises(ValueError, match=MIXES + ".*put one example with images in a row"):
            collator(examples)
    for examples in ([SHORT], [LONG], [WORDS, example(5, 0, 0, 4)]):
        report = packed_equals_alone(model, examples, collator)
        assert report.ok, report
    padded = PackingCollator(None, model, 12)
    report = packed_equals_alone(model, [SHORT, LONG], padded)
    assert report.ok and padded([SHORT, LONG])["input_ids"].shape == (2, 11), report


def test_rows_of_ones_own_are_refused_where_the_mask_of_images_moves():
    model = gemma3()
    set_rope(model, "rope-tv")
    positions = positions_for(model, [["text:2 image:2x2 text:2", "text:7"]])
    with pytest.raises(ValueError, match=MIXES):
        model(**joined(SHORT, WORDS), position_ids=positions)
    positions = positions_for(model, [["text:7", "text:7"]])
    packed = model(**joined(WORDS, WORDS), position_ids=positions).logits
    alone = model(**WORDS).logits
    assert (packed - torch.cat((alone, alone), 1)).abs().max() < 1e-5 * alone.abs().max()
    positions = positions_for(model, [["text:2 image:2x2 text:2"] * 2])  # images at the same numbers
    packed, alone = model(**joined(SHORT, SHORT), position_ids=positions).logits, model(**SHORT).logits
    assert (packed - torch.cat((alone, alone), 1)).abs().max() < 1e-5 * alone.abs().max()


def test_the_report_names_the_mask_of_images():
    def collator(examples):
        numbers = torch.cat([torch.arange(x["input_ids"].shape[1]) for x in examples])[None]
        return joined(*examples) | {"position_ids": numbers}

    report = packed_equals_alone(gemma3(), [SHORT, WORDS], collator)
    assert not report.ok and MIXES in str(report)


def test_rows_of_paligemma_whose_mask_keeps_documents_apart_are_served():
    model = paligemma()
    set_rope(model, "rope-tv")
    positions = positions_for(model, [["text:2 image:2x2 text:2", "text:3 image:2x2 text:4"]])
    packed = model(**joined(SHORT, LONG), position_ids=positions).logits
    alone = torch.cat([model(**x, use_cache=False).logits for x in (SHORT, LONG)], 1)
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max()


def prefixed(images, prefix, suffix, seed):
    """Images and a prefix that see each other, and a suffix that looks back, as PaliGemma has them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 80, (prefix + suffix,), generator=generator)
    ids = torch.cat((torch.full((4 * images,), IMAGE), text))
    types = (torch.arange(len(ids)) >= len(ids) - suffix).long()
    pixels = {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)} if images else {}
    return {"input_ids": ids, "token_type_ids": types, **pixels}


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
def test_the_collator_packs_paligemma_where_types_say_what_is_prefix(scheme):
    model = paligemma()
    if scheme:
        set_rope(model, scheme)
    collator = PackingCollator(None, model, 64)
    examples = [prefixed(0, 3, 4, 1), prefixed(1, 2, 5, 2), prefixed(2, 4, 3, 3)]
    report = packed_equals_alone(model, examples, collator)
    assert report.ok and collator(examples)["input_ids"].shape == (1, 33), report
    with pytest.raises(ValueError, match=r"makes its mask of token_type_ids.*Give the types that its proc"):
        collator([{"input_ids": WORDS["input_ids"][0]}])


def test_prefixes_of_paligemma_that_older_transformers_mix_are_refused(monkeypatch):
    model = paligemma()
    set_rope(model, "rope-tv")
    positions = positions_for(model, [["text:2 image:2x2 text:2", "text:3 image:2x2 text:4"]])
    monkeypatch.setattr(leaks, "lays_blocks_last", lambda: True)
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration does not keep documents with im"):
        model(**joined(SHORT, LONG), position_ids=positions)
