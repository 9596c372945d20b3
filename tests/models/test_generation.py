"""`generate` writes what the full forward says, whatever the cache, the padding and the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_mm import SCHEMES, Image, Text, Video
from rope_mm.checks.arguments import cache_of
from rope_mm.models import RopeMMForConditionalGeneration, build_batch, load_tokenizer, read_config

TOKENIZER = load_tokenizer()
GREEDY = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
SEQUENCE = ["see ", Image(2, 4), " and ", Video(2, 2, 2)]  # it ends in a video, and 2 x 2 blocks tile it
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def make_model(scheme="rope-tv", **settings):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme}, **settings)
    return RopeMMForConditionalGeneration(config).eval()


def prompt(model, *sequences, side="left"):
    sequences = build_batch(sequences, TOKENIZER, model.config.scheme, side)
    torch.manual_seed(1)
    places = int((sequences.input_ids == model.config.image_token_id).sum())
    inputs = sequences.inputs()
    return inputs | ({"patches": torch.randn(places, model.config.patch_width)} if places else {})


@torch.no_grad()
def full_logits(model, sequence, ids, patches):
    """Logits of each of the tokens `ids` after a sequence, from one forward of the whole."""
    whole = build_batch([[*sequence, "x" * len(ids)]], TOKENIZER, model.config.scheme).inputs()
    whole["input_ids"][0, -len(ids) :] = ids
    return model(**whole, patches=patches).logits[0, -len(ids) - 1 : -1]


def agree(model, sequence, out, row=0, patches=None):
    """Assert that what was generated after a sequence has the logits of the full forward."""
    logits = torch.stack(out.logits, 1)[row]
    ids = out.sequences[row, -len(logits) :]
    torch.testing.assert_close(logits, full_logits(model, sequence, ids, patches), **CLOSE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_equals_the_full_forward_in_every_scheme(scheme):
    model = make_model(scheme)
    inputs = prompt(model, SEQUENCE)
    out = model.generate(**inputs, **GREEDY)
    agree(model, SEQUENCE, out, patches=inputs["patches"])
    assert (out.sequences[:, -5:] != model.config.image_token_id).all()


SEGMENTS = st.one_of(
    st.text("abc ", min_size=1, max_size=4),
    st.builds(Image, st.integers(1, 3), st.integers(1, 3)),
    st.builds(Video, st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
)
SEQUENCES = st.lists(SEGMENTS, min_size=1, max_size=4)


@pytest.mark.parametrize("scheme", ["rope-tv", "rope-tie", "m-rope-hf", "vrope", "circle", "flux2", "v2pe"])
@settings(max_examples=8)
@given(sequences=st.lists(SEQUENCES, min_size=2, max_size=3), cached=st.booleans())
def test_rows_of_unequal_sequences_decode_as_each_alone(scheme, sequences, cached):
    model = make_model(scheme)
    inputs = prompt(model, *sequences)
    out = model.generate(**inputs, **GREEDY, use_cache=cached)
    counts = [sum(part.tokens for part in sequence if not isinstance(part, str)) for sequence in sequences]
    patches = inputs.get("patches", torch.zeros(0, 4)).split(counts)
    for row, sequence in enumerate(sequences):
        agree(model, sequence, out, row, patches[row] if counts[row] else None)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache_gives_the_same_tokens(cache):
    model = make_model()
    inputs = prompt(model, SEQUENCE, ["a ", Image(1, 2), "long word"])
    plain = model.generate(**inputs, **GREEDY, use_cache=False)
    out = model.generate(**inputs, **GREEDY, cache_implementation=cache, disable_compile=True)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), **CLOSE)


def test_beams_and_samples_keep_the_images_of_their_row():
    model = make_model()
    inputs = prompt(model, SEQUENCE, ["a ", Image(1, 2), "long word"])
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    cached, plain = (model.generate(**inputs, **beams, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    alone = model.generate(**prompt(model, SEQUENCE) | {"patches": inputs["patches"][:16]}, **beams)
    assert torch.equal(alone[0, -5:], cached[0, -5:])
    several = model.generate(**inputs, **GREEDY | {"do_sample": True}, num_return_sequences=2)
    for row in range(2):
        agree(model, SEQUENCE, several, row, inputs["patches"][:16])


def test_a_second_call_does_not_depend_on_the_first():
    model = make_model("m-rope")
    inputs = prompt(model, SEQUENCE)
    first = model.generate(**inputs, **GREEDY)
    model.generate(**prompt(model, ["other ", Image(3, 3)]), **GREEDY)
    again = model.generate(**inputs, **GREEDY)
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))


@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope-hf", "flux2"])
def test_a_conversation_continues_with_the_returned_cache(scheme, cached):
    model = make_model(scheme)
    inputs = prompt(model, SEQUENCE)
    first = model.generate(**inputs, **GREEDY)
    generated = first.sequences[0, -5:]
    sequence = [*SEQUENCE, "x" * 5, " then ", Image(2, 2), "?"]
    second = prompt(model, sequence)
    second["input_ids"][0, inputs["input_ids"].shape[1] :][:5] = generated
    second["patches"] = torch.cat([inputs["patches"], torch.randn(4, model.config.patch_width)])
    plain = model.generate(**second, **GREEDY)
    cache = cache_of(first)
    out = model.generate(**second, **GREEDY, **cached(cache))
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), **CLOSE)


def test_text_alone_needs_no_positions():
    model = make_model("flux2")
    ids = torch.randint(3, 250, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    alone = model.generate(ids[1:, 3:], **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits)[:, 1:], torch.stack(alone.logits), **CLOSE)
    sequence = [TOKENIZER.decode([100] * 7)]
    placed = build_batch([sequence], TOKENIZER, model.config.scheme).inputs() | {"input_ids": ids[:1]}
    torch.testing.assert_close(model(ids[:1]).logits, model(**placed).logits, **CLOSE)


@pytest.mark.parametrize("scheme", ["rope-tv", "flux2"])
def test_prompt_lookup_decoding_gives_the_tokens_of_greedy_decoding(scheme):
    model = make_model(scheme)
    sequence = ["abcabcabc", Image(2, 2), "abcab"]
    inputs = prompt(model, sequence)
    plain = model.generate(**inputs, **GREEDY | {"max_new_tokens": 12})
    quick = model.generate(**inputs, **GREEDY | {"max_new_tokens": 12}, prompt_lookup_num_tokens=3)
    assert torch.equal(quick.sequences, plain.sequences)


def test_a_text_prompt_can_be_prefilled_in_chunks():
    model = make_model()
    inputs = prompt(model, ["some words, and more of them"])
    plain, chunked = (model.generate(**inputs, **GREEDY, prefill_chunk_size=size) for size in (None, 5))
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(plain.logits), **CLOSE)


def test_prompts_that_cannot_be_continued_are_refused():
    model = make_model()
    inputs = prompt(model, SEQUENCE)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="patches came for"):
            model.generate(**inputs | {"patches": inputs["patches"][1:]}, **GREEDY, num_beams=beams)
    del inputs["rope_deltas"]
    with pytest.raises(ValueError, match=r"need block_ids .* and rope_deltas"):
        model.generate(**inputs, **GREEDY)
    yarn = {"rope_type": "dynamic", "factor": 2.0, "original_max_positions": 8.0}
    longer = make_model()
    longer.model.rotary.scheme = longer.model.rotary.scheme.replace(extensions=[yarn])
    with pytest.raises(ValueError, match=r"Omega depends on the length.*use_cache=False"):
        longer.generate(**prompt(model, ["a"]), **GREEDY)
    with pytest.raises(ValueError, match=r"\(2, 1, 3\) must be \(b, s\).*t, y, x"):
        model(torch.ones(1, 3, dtype=torch.long), position_ids=torch.zeros(2, 1, 3))
    cache = cache_of(model(torch.ones(1, 3, dtype=torch.long), use_cache=True))
    with pytest.raises(ValueError, match="has 2 columns for 3 cached and 2 new tokens"):
        model(torch.ones(1, 2).long(), attention_mask=torch.ones(1, 2), cache=cache)


def test_the_positions_of_a_prompt_are_those_of_place():
    model = make_model()
    inputs = prompt(model, SEQUENCE)
    placed, cursor = model.config.scheme.place([Text(4), Image(2, 4), Text(5), Video(2, 2, 2)])
    assert torch.equal(inputs["position_ids"][1:, 0].T, placed)
    assert torch.equal(inputs["position_ids"][0, 0], torch.arange(25.0, dtype=torch.float64))
    assert inputs["rope_deltas"].tolist() == [cursor.next - 25]
