"""Arguments that versions of transformers call by different names."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache

from rope_mm.checks.arguments import cache_of, read, refuse_unknown_cache, spelling, takes_any_name
from rope_mm.hf import set_rope
from rope_mm.models import RopeMMConfig, RopeMMForConditionalGeneration

NAMES = ("cache", "past_key_values", "cache_params")


def small() -> RopeMMForConditionalGeneration:
    return RopeMMForConditionalGeneration(
        RopeMMConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, initializer_range=0.3)
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_is_read_by_each_of_its_names(name):
    assert read({name: 3, "use_cache": True}, "cache") == 3
    assert cache_of(SimpleNamespace(**{name: 3})) == 3
    assert takes_any_name(lambda x, cache=None: (x, cache))(1, **{name: 3}) == (1, 3)
    assert takes_any_name(lambda x, past_key_values=None: (x, past_key_values))(1, **{name: 3}) == (1, 3)


def test_an_argument_that_nobody_gave_is_none():
    assert read({"cache": None, "past_key_values": None}, "cache") is None
    assert cache_of(SimpleNamespace()) is None
    assert takes_any_name(lambda x, cache=7: cache)(1) == 7


def test_a_model_warns_of_no_old_name_where_it_makes_no_cache(monkeypatch):
    from transformers.utils import generic

    warned = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda message, *args: warned.append(message))
    out = small()(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    assert cache_of(out) is None and not warned


def test_the_spelling_is_that_of_the_signature():
    assert spelling(lambda x, past_key_values=None: x, "cache") == "past_key_values"
    assert spelling(lambda x, cache=None: x, "cache") == "cache"
    assert spelling(lambda x: x, "cache") is None


def test_a_signature_shows_every_name():
    named = takes_any_name(lambda x, cache=None, **kwargs: x)
    assert list(inspect.signature(named).parameters) == ["x", "cache", *NAMES[1:], "kwargs"]
    assert list(inspect.signature(takes_any_name(lambda x: x)).parameters) == ["x"]


def test_one_argument_by_two_names_is_refused():
    with pytest.raises(ValueError, match="cache and past_key_values are one argument"):
        read({"cache": 1, "past_key_values": 2}, "cache")


def test_a_cache_under_an_unknown_name_is_refused():
    refuse_unknown_cache({"past_key_values": DynamicCache(), "mask": torch.ones(1)})
    with pytest.raises(ValueError, match="the argument kv_cache holds a cache"):
        refuse_unknown_cache({"kv_cache": DynamicCache()})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_of_ours_takes_its_cache_by_both_names(name):
    model, ids = small(), torch.arange(1, 9)[None]
    cache = DynamicCache()
    model(ids[:, :5], **{name: cache})
    assert cache.get_seq_length() == 5
    rest = model(ids[:, 5:], **{name: cache}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:])


def test_a_model_of_ours_refuses_a_cache_under_an_unknown_name():
    with pytest.raises(ValueError, match="kv_cache holds a cache"):
        small()(torch.ones(1, 3).long(), kv_cache=DynamicCache())


def test_a_patched_model_refuses_a_cache_under_an_unknown_name():
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1
    )
    model = AutoModelForCausalLM.from_config(config)
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="kv_cache holds a cache"):
        model(torch.ones(1, 3).long(), kv_cache=DynamicCache())


def test_generation_equals_steps_without_a_cache():
    model, ids = small(), torch.arange(1, 9)[None]
    expected = ids
    for _ in range(6):
        logits = model(expected).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.tolist() == expected.tolist()
