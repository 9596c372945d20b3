"""Types of several parts or of keys that are compressed: saved, packed, or refused with the reason."""

import copy

import pytest
import torch
from prepared_models import weighted
from tiny_types import (
    cosmos3_edge,
    deepseek_v4,
    gemma3n,
    hunyuan_vl,
    lfm3,
    llama4,
    molmo2,
    phi4_multimodal,
    step3p7,
    voxtral,
)

from rope_mm.hf import PackingCollator, packed_equals_alone, positions_for, rope_of, set_rope

IDS = torch.arange(5, 22)[None]


@torch.no_grad()
@pytest.mark.parametrize("make", [phi4_multimodal, cosmos3_edge, voxtral, deepseek_v4, lfm3])
def test_a_model_of_several_parts_is_saved_with_its_scheme_and_undone(make, tmp_path):
    model = make()
    config = model.config.get_text_config()
    before, own = model(input_ids=IDS).logits, copy.deepcopy(config.rope_parameters)
    handle = set_rope(model, rope_of(model))
    assert torch.equal(model(input_ids=IDS).logits, before)
    handle.undo()
    handle = set_rope(model, "flat", theta=50.0)
    after = model(input_ids=IDS).logits
    assert (after - before).abs().max() > 0.1 * before.abs().max()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="saved with a scheme that is not set yet"):
        loaded(input_ids=IDS)
    set_rope(loaded)
    assert torch.equal(loaded(input_ids=IDS).logits, after)
    handle.undo()
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert config.rope_parameters == own


@torch.no_grad()
def test_the_encoder_of_voxtral_takes_a_scheme_at_once_and_gives_it_back():
    encoder = next(part for part in voxtral().modules() if type(part).__name__ == "VoxtralEncoder")
    sound = torch.ones(1, 8, 40).cumsum(-1).sin()
    before = encoder(sound)[0]
    handle = set_rope(encoder, "flat", freq_scale=0.0)
    assert torch.equal(encoder(sound)[0], before)
    handle.undo()
    handle = set_rope(encoder, "flat")
    assert (encoder(sound)[0] - before).abs().max() > 0.1 * before.abs().max()
    handle.undo()
    assert torch.equal(encoder(sound)[0], before)


def test_keys_that_are_compressed_stand_at_token_numbers_and_not_by_a_layout_of_images():
    model = deepseek_v4()
    assert {rope.pairing for rope in rope_of(model).values()} == {"interleaved"}
    with pytest.raises(
        ValueError, match=r"counts the tokens that it compresses.*take a scheme of layout 'flat'"
    ):
        set_rope(model, "rope-tv")
    set_rope(model, "flat", theta=50.0)
    positions = torch.arange(17.0).expand(2, 1, -1)
    with pytest.raises(ValueError, match="is asked for 4 tokens, but positions came for 17"):
        model(IDS, position_ids=positions)
    truth = copy.deepcopy(deepseek_v4().config)
    for rope in truth.rope_parameters.values():
        rope["rope_theta"] = 50.0
    truth = weighted(type(model)(truth))
    run = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **run), truth.generate(IDS, **run))
    with torch.no_grad():
        assert (model(IDS).logits - truth(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("ask", [rope_of, lambda model: set_rope(model, "rope-tv")])
def test_a_rotary_whose_pairs_follow_two_axes_is_refused_as_no_rotation(ask):
    model = hunyuan_vl()
    before = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match="the two channels of a pair along different ones of its 4 axes"):
        ask(model)
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
@pytest.mark.parametrize("make", [gemma3n, llama4, molmo2, step3p7])
def test_packed_texts_of_models_with_an_inner_mask_equal_each_alone(make, scheme, monkeypatch):
    model = make(monkeypatch)
    parts = [torch.arange(3, 10), torch.arange(20, 31)]
    if scheme:
        set_rope(model, scheme)
        row = {
            "input_ids": torch.cat(parts)[None],
            "position_ids": positions_for(model, [["text:7", "text:11"]]),
        }
        with pytest.raises(ValueError, match="lets the documents see one another"):
            model(**row, use_cache=True)
    report = packed_equals_alone(model, [{"input_ids": x} for x in parts], PackingCollator(None, model, 64))
    assert report.ok and report.size > 1, report


def test_packed_rows_of_a_model_that_carries_a_state_are_refused():
    model = lfm3()
    with pytest.raises(ValueError, match="does not keep packed documents apart"):
        PackingCollator(None, model, 64)
    set_rope(model, "rope-tv")
    positions = positions_for(model, [["text:7", "text:10"]])
    with pytest.raises(ValueError, match="layers of Lfm3ForCausalLM carry a state from one document into"):
        model(IDS, position_ids=positions, use_cache=False)
    model(IDS, position_ids=positions_for(model, ["text:17"]))
