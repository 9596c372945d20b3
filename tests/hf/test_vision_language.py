"""Qwen-VL, LLaVA and SmolVLM under their own rope and under other schemes."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from vision_language_models import (
    IMAGE,
    TEXT,
    VIDEO,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    visual_inputs,
    with_text,
)

from rope_mm import SCHEMES, Image, Text
from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope, use_kernels


def seen(*grids, video=False, between=1):
    """Inputs with these grids of patches (t, y, x) between words."""
    ids = [1, 5]
    for t, y, x in grids:
        ids += [VIDEO if video else IMAGE] * (t * y * x // 4) + [7] * between
    inputs = visual_inputs([*ids, 8, 9], grids, video)
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def logits(model, **inputs):
    for part in model.modules():
        if hasattr(part, "rope_deltas"):
            part.rope_deltas = None
    with torch.no_grad():
        return model(**inputs).logits


GRIDS = (1, 4, 8), (1, 6, 4)
QWENS = [qwen2_vl, qwen2_5_vl, qwen3_vl]
GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [90, 91, 92, 93],
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("make", QWENS)
def test_text_and_tower_with_their_own_ropes_are_unchanged(make):
    model, inputs = make(), seen(*GRIDS)
    before, drawn = logits(model, **inputs), model.generate(**inputs, **GREEDY).logits
    handles = [set_rope(part, rope_of(part)) for part in (model, model.model.visual)]
    assert torch.equal(logits(model, **inputs), before)
    again = model.generate(**inputs, **GREEDY).logits
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))
    for handle in handles:
        handle.undo()
    assert torch.equal(logits(model, **inputs), before)


def test_schemes_read_from_towers_have_their_names():
    model = qwen2_vl()
    assert rope_of(model).scheme == SCHEMES["m-rope"]
    assert rope_of(model.model.visual).scheme == SCHEMES["qwen2-vl-vision"]


@pytest.mark.parametrize("make", QWENS)
def test_our_layout_of_m_rope_differs_by_the_rounding_of_their_angles(make):
    model, inputs = make(), seen(*GRIDS)
    before = logits(model, **inputs)
    set_rope(model, rope_of(model).scheme)
    assert (logits(model, **inputs) - before).abs().max() < 3e-5


@pytest.mark.parametrize(("layout", "same"), [("m-rope-hf", True), ("m-rope", False)])
def test_whether_tokens_after_a_long_video_stand_inside_it_is_a_choice(layout, same):
    model, inputs = qwen2_vl(), seen((20, 4, 4), video=True)
    before = logits(model, **inputs)
    set_rope(model, "m-rope", layout=layout)
    difference = (logits(model, **inputs) - before).abs().max()
    assert (difference < 3e-5) == same


@pytest.mark.parametrize(
    "scheme", ["rope-tv", "rope-tv-2d", "m-rope-i", "vrope", "v2pe", "circle", "videorope"]
)
@pytest.mark.parametrize("make", QWENS)
def test_decoding_of_a_vision_language_model_equals_its_full_forward(make, scheme):
    model = make()
    set_rope(model, scheme)
    generate_and_compare(model, seen(*GRIDS))


@pytest.mark.parametrize("make", QWENS)
def test_a_prompt_that_ends_in_an_image_is_refused_where_its_tokens_are_not_one_step_ahead(make):
    model, inputs = make(), seen(*GRIDS)
    ends = {name: inputs[name][:, :-3] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    set_rope(model, "rope-tv")
    assert logits(model, **inputs | ends).isfinite().all()
    with pytest.raises(ValueError, match="end it with a text token"):
        model.generate(**inputs | ends, **GREEDY)
    unset_rope(model)
    model.generate(**inputs | ends, **GREEDY)
    set_rope(model, "v2pe")
    generate_and_compare(model, inputs | ends)


def generate_and_compare(model, inputs):
    out = model.generate(**inputs, **GREEDY)
    n = inputs["input_ids"].shape[1]
    whole = with_text(inputs, out.sequences[:, n:])
    full = logits(model, **whole)
    assert (torch.stack(out.logits, 1) - full[:, n - 1 : -1]).abs().max() < 3e-5
    again = model.generate(**inputs, **GREEDY)
    assert torch.equal(again.sequences, out.sequences)
    given = positions_for(model, whole)
    assert (logits(model, **whole, position_ids=given) - full).abs().max() < 3e-5


@pytest.mark.parametrize("make", [qwen2_vl, qwen3_vl])
def test_rows_padded_on_the_left_decode_as_each_alone(make):
    model, rows = make(), [seen((1, 4, 8)), seen((1, 6, 4), (1, 4, 4))]
    set_rope(model, "rope-tv")
    n = max(row["input_ids"].shape[1] for row in rows)
    both = {
        name: torch.cat([torch.nn.functional.pad(row[name], (n - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    both |= {name: torch.cat([row[name] for row in rows]) for name in ("image_grid_thw", "pixel_values")}
    drawn = torch.stack(model.generate(**both, **GREEDY).logits, 1)
    for row, ours in zip(rows, drawn, strict=True):
        alone = torch.stack(model.generate(**row, **GREEDY).logits, 1)[0]
        assert (ours - alone).abs().max() < 3e-5


def test_a_scheme_of_a_text_alone_refuses_the_positions_of_the_model_around_it():
    model, inputs, text = qwen2_vl(), seen(*GRIDS), {"input_ids": torch.arange(3, 16)[None]}
    before = logits(model, **inputs)
    handle = set_rope(model.model.language_model, "rope-tv")
    for run in (model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="give set_rope the whole model"):
            run(**inputs)
    p, reader = positions_for(model, ["text:4 image:2x3 text:3"]), model.model.language_model
    told = reader(**text, position_ids=p)[0]
    handle.undo()
    set_rope(model, "rope-tv")
    assert torch.equal(reader(**text, position_ids=p)[0], told)
    unset_rope(model)
    set_rope(reader, rope_of(reader))
    assert torch.equal(logits(model, **inputs), before)


def test_packed_rows_with_a_cache_are_refused_in_the_four_rows_of_m_rope_too():
    model, ids = qwen2_vl(), torch.arange(3, 15)[None]
    set_rope(model, "flat")
    p = torch.tensor([[*range(7), *range(5)]]).expand(4, -1, -1)
    with pytest.raises(ValueError, match="lets the documents see one another"):
        model(input_ids=ids, position_ids=p)
    packed = logits(model, input_ids=ids, position_ids=p, use_cache=False)
    alone = logits(model, input_ids=ids[:, 7:], position_ids=p[..., 7:])
    assert (packed[:, 7:] - alone).abs().max() < 3e-5


def test_images_may_follow_one_another_without_a_token_between():
    model, inputs = qwen2_vl(), seen(*GRIDS, between=0)
    set_rope(model, "rope-tv")
    assert logits(model, **inputs).isfinite().all()
    p = positions_for(model, inputs)
    placed, _ = SCHEMES["rope-tv"].place([Text(2), Image(2, 4), Image(3, 2), Text(2)])
    assert torch.equal(p[1:, 0].T, placed)
    assert torch.equal(p[0, 0], torch.arange(18.0).double())


def test_tokens_that_do_not_fill_their_grids_are_refused():
    model, inputs = qwen2_vl(), seen(*GRIDS)
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match=r"6 image or video tokens stand in a row, but image:2x4 needs 8"):
        positions_for(model, inputs | {"image_grid_thw": torch.tensor([GRIDS[1], GRIDS[0]])[[1, 1]]})
    with pytest.raises(ValueError, match="no grid is left"):
        positions_for(model, inputs | {"image_grid_thw": inputs["image_grid_thw"][:1]})
    with pytest.raises(ValueError, match="grids came for image:2x4"):
        positions_for(model, inputs | {"image_grid_thw": torch.tensor([*GRIDS, GRIDS[0]])})


def test_our_op_rotates_the_text_of_a_vision_language_model():
    model, inputs = qwen2_5_vl(), seen(*GRIDS)
    before = logits(model, **inputs)
    handle = use_kernels(model)
    assert (logits(model, **inputs) - before).abs().max() < 3e-5
    handle.undo()
    assert torch.equal(logits(model, **inputs), before)


def test_our_op_is_refused_in_one_sentence_in_towers_given_rows_and_columns():
    with pytest.raises(ValueError, match="rotary_pos_emb is given rows and columns, not tokens or an image"):
        use_kernels(qwen2_vl().model.visual)


def test_llava_and_smolvlm_are_unchanged_by_the_rope_of_their_text():
    text = {**TEXT, "model_type": "llama"}
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPVisionConfig(**eyes, image_size=16, patch_size=4)
    llava = LlavaConfig(vision_config=clip, text_config=text, image_token_id=90)
    smol = SmolVLMConfig(
        vision_config={**eyes, "image_size": 16, "patch_size": 4},
        text_config=text,
        image_token_id=90,
        scale_factor=2,
    )
    for model, n in (
        (LlavaForConditionalGeneration(llava), 16),
        (SmolVLMForConditionalGeneration(smol), 4),
    ):
        ids = torch.tensor([[1, 5] + [90] * n + [7, 8]])
        pixels = torch.randn(1, 3, 16, 16)
        inputs = {"input_ids": ids, "pixel_values": pixels if n == 16 else pixels[None]}
        before = logits(model.eval(), **inputs)
        handle = set_rope(model, rope_of(model))
        assert torch.equal(logits(model, **inputs), before)
        handle.undo()
        set_rope(model, "rope-tv")
        side = int(n**0.5)
        p = positions_for(model, [f"text:2 image:{side}x{side} text:2"])
        assert not torch.allclose(logits(model, **inputs, position_ids=p), before, atol=1e-3)
