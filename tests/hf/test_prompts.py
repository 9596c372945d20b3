"""Prompts of pictures and words through `generate`: where they end, how they go on, what is guessed ahead."""

import copy

import pytest
import torch
from transformers import StaticCache

from rope_mm import SCHEMES
from rope_mm.checks.arguments import cache_of
from rope_mm.hf import positions_for, set_rope
from rope_mm.schemes.zoo import MULTIMODAL

SEGMENTS = "text:3 image:2x3 text:4"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
ASK = {"output_logits": True, "return_dict_in_generate": True}
# one Omega for all heads, and text tokens that advance along every axis
SERVED = [name for name in MULTIMODAL if not SCHEMES[name].per_head and all(SCHEMES[name].text_line[1])]


@pytest.fixture
def llama(tiny):
    model = tiny("llama", initializer_range=0.2)
    set_rope(model, "rope-tv")
    return model


def words(*shape):
    return torch.randint(3, 97, shape)


def logits_of(out):
    return torch.stack(out.logits, 1)


def longer(p, n):
    return torch.cat((p, p[..., -1:] + torch.arange(1, n + 1)), -1)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_prompt_lookup_decoding_does_not_change_the_answer(tiny, model_type):
    model = tiny(model_type, initializer_range=0.2, sliding_window=8)
    set_rope(model, "rope-tv")
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8] * 3 + [5]]),
        "position_ids": positions_for(model, [SEGMENTS]),
    }
    run = inputs | GREEDY | {"max_new_tokens": 12}
    assert torch.equal(model.generate(**run, prompt_lookup_num_tokens=3), model.generate(**run))


def test_speculative_decoding_with_another_model_does_not_change_the_answer(tiny, llama):
    other = tiny("llama", initializer_range=0.2, num_hidden_layers=1)
    set_rope(other, "rope-tv")
    run = {"input_ids": words(1, 13), "position_ids": positions_for(llama, [SEGMENTS]), **GREEDY}
    assert torch.equal(llama.generate(**run, assistant_model=other), llama.generate(**run))


@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_continues_from_the_returned_cache(llama, cached, static):
    p, ids = positions_for(llama, [SEGMENTS]), words(1, 13)
    cache = cached(StaticCache(config=llama.config, max_cache_len=32)) if static else {}
    first = llama.generate(input_ids=ids, position_ids=p, **cache, **GREEDY, **ASK)
    ids = torch.cat((first.sequences, words(1, 3)), 1)
    turn = {"input_ids": ids, **GREEDY, **ASK}
    kept = copy.deepcopy(cache_of(first))
    with pytest.raises(ValueError, match="needs its own: position_ids"):
        llama.generate(**turn, **cached(kept))
    whole = longer(p, 7)
    second = llama.generate(**turn, **cached(cache_of(first)), position_ids=whole)
    again = llama.generate(**turn, position_ids=whole)
    assert (logits_of(second) - logits_of(again)).abs().max() < 3e-5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scheme", SERVED)
def test_tokens_after_an_image_continue_at_the_scheme_s_position_or_are_refused(tiny, scheme, use_cache):
    model = tiny("llama", initializer_range=0.2)
    set_rope(model, SCHEMES[scheme].replace(pairing="half", fraction=1.0, channel_offset="start"))
    for segments in ("text:3 image:2x5", "text:1 image:3x4", "text:5 video:2x2x2"):
        p = positions_for(model, [segments])
        run = {"input_ids": words(1, 13), "position_ids": p, "use_cache": use_cache}
        whole = positions_for(model, [segments + " text:4"])
        if torch.allclose(longer(p, 4)[1:], whole[1:], atol=1e-9):
            out = model.generate(**run, **GREEDY, **ASK)
            with torch.no_grad():
                full = model(out.sequences, position_ids=whole, use_cache=False).logits[:, 12:-1]
            assert (logits_of(out) - full).abs().max() < 3e-5
        else:
            with pytest.raises(ValueError, match="ends in an image"):
                model.generate(**run, **GREEDY)


def test_one_row_that_ends_in_an_image_is_enough_to_refuse_a_batch(llama):
    p = positions_for(llama, ["text:3 image:2x5", SEGMENTS])
    with pytest.raises(ValueError, match="end it with a text token"):
        llama.generate(input_ids=words(2, 13), position_ids=p, **GREEDY)


def test_the_cache_of_an_image_may_be_continued_at_the_right_positions(llama, cached):
    segments, ids = "text:3 image:2x5", words(1, 17)
    p, whole = (positions_for(llama, [more]) for more in (segments, segments + " text:4"))
    with torch.no_grad():
        cache = cache_of(llama(ids[:, :13], position_ids=p))
        rest = llama(ids[:, 13:], position_ids=whole[..., 13:], **cached(cache)).logits
        full = llama(ids, position_ids=whole).logits[:, 13:]
    assert (rest - full).abs().max() < 3e-5
