"""What the models' forwards refuse, and the angles that they are given."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicCache

from rope_mm import SCHEMES, Image
from rope_mm.models import (
    RopeMMCritic,
    RopeMMForConditionalGeneration,
    RopeMMModel,
    build_batch,
    load_tokenizer,
    read_config,
)

TOY = {"hidden_size": 32, "intermediate_size": 48}


def make(kind=RopeMMForConditionalGeneration, **settings):
    torch.manual_seed(0)
    return kind(read_config(**TOY, **settings)).eval()


def inputs_of(model):
    batch = build_batch([["see ", Image(2, 2), "."]] * 2, load_tokenizer(), model.config.scheme)
    return batch.inputs() | {"patches": torch.randn(8, model.config.patch_width)}


@pytest.mark.parametrize("kind", [RopeMMModel, RopeMMForConditionalGeneration, RopeMMCritic])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("positions", "did you mean 'position_ids'"),
        ("block_id", "did you mean 'block_ids'"),
        ("document_id", "did you mean 'document_ids'"),
        ("rank", "there are: angles, attention_mask, block_ids"),
        ("cu_seqlens_q", "did you mean 'cu_seq_lens_q'"),
    ],
)
def test_an_argument_that_a_forward_does_not_have_is_refused_with_the_nearest_name(kind, name, hint):
    model = make(kind)
    with pytest.raises(ValueError, match=f"argument '{name}' is unknown; {hint}"):
        model(**inputs_of(model), **{name: torch.zeros(2, 9)})


def test_a_misspelt_argument_of_the_head_is_refused_with_its_name():
    model = make()
    with pytest.raises(ValueError, match=r"argument 'label' is unknown; did you mean .*'labels'"):
        model(**inputs_of(model), label=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="argument 'labels' is unknown"):
        model.model(**inputs_of(model), labels=torch.zeros(2, 9))


def test_a_cache_under_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="the argument past holds a cache"):
        make()(torch.ones(1, 3).long(), past=DynamicCache())


def test_arguments_of_transformers_and_of_the_attention_backend_pass():
    model = make()
    inputs = inputs_of(model)
    plain = model(**inputs, labels=inputs["input_ids"])
    more = {"output_hidden_states": True, "num_items_in_batch": 5, "dropout": 0.0, "ignore_index": -100}
    out = model(**inputs, labels=inputs["input_ids"], **more)
    assert torch.equal(out.logits, plain.logits)
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "attention_mask", "block_ids", "patches"])
@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_lists_and_arrays_are_refused_with_the_remedy(name, convert):
    model = make()
    inputs = inputs_of(model)
    inputs[name] = convert(inputs[name])
    kind = "list" if convert is torch.Tensor.tolist else "ndarray"
    with pytest.raises(ValueError, match=f"{name} must be a tensor, not a {kind}; torch.as_tensor makes"):
        model(**inputs)


@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope", "mixed", "flux2"])
def test_meta_tensors_go_through_every_forward(scheme):
    real = inputs_of(make(rope_parameters={"scheme": scheme}))
    inputs = {name: x.to("meta") for name, x in real.items()}
    with torch.device("meta"):
        model = make(rope_parameters={"scheme": scheme})
        critic = make(RopeMMCritic, rope_parameters={"scheme": scheme})
    out = model(**inputs, labels=inputs["input_ids"])
    assert (out.logits.shape, out.patches.shape) == ((2, 9, model.config.vocab_size), (8, 4))
    assert out.loss.is_meta
    assert critic(**inputs).shape == (2,)


def test_fake_tensors_go_through_a_forward_and_a_backward():
    real = inputs_of(make())
    with FakeTensorMode() as mode:
        model = make()
        inputs = {name: mode.from_tensor(x) for name, x in real.items()}
        out = model(**inputs, labels=inputs["input_ids"])
        (out.loss + out.patches.square().mean()).backward()
    assert (out.logits.shape, out.patches.shape) == ((2, 9, model.config.vocab_size), (8, 4))
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_meta_text_goes_through_a_forward_with_a_mask(attention):
    with torch.device("meta"):
        model = make()
        ids = torch.zeros(2, 5, dtype=torch.long)
    model.set_attn_implementation(attention)
    out = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert out.logits.shape == (2, 5, model.config.vocab_size)


def test_fake_text_needs_no_positions():
    with FakeTensorMode():
        model = make()
        assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, model.config.vocab_size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ready_angles_give_what_the_positions_give(scheme):
    model = make(rope_parameters={"scheme": scheme})
    inputs = inputs_of(model)
    angles = model.model.rotary.angles(inputs["position_ids"][1:].movedim(0, -1))
    plain, ready = model(**inputs), model(**inputs, angles=angles)
    assert torch.equal(ready.logits, plain.logits)
    assert torch.equal(ready.patches, plain.patches)
    numbers = inputs | {"position_ids": inputs["position_ids"][0]}
    assert torch.equal(model(**numbers, angles=angles).patches, plain.patches)
    critic = make(RopeMMCritic, rope_parameters={"scheme": scheme})
    assert torch.equal(critic(**inputs, angles=angles), critic(**inputs))


@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope", "mixed"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_one_set_of_angles_serves_a_batch_and_the_same_batch_twice(scheme, padding_side):
    model = make(rope_parameters={"scheme": scheme})
    critic = make(RopeMMCritic, rope_parameters={"scheme": scheme})
    documents = [["see ", Image(2, 2)], ["a longer text ", Image(2, 2)]]
    batch = build_batch(documents, load_tokenizer(), model.config.scheme, padding_side)
    patches, twice = torch.randn(4, 4, model.config.patch_width), torch.arange(4) % 2
    angles = model.model.rotary.angles(batch.positions)
    plain = model(**batch.inputs(), patches=patches[:2]).patches
    assert torch.equal(model(**batch.inputs(angles), patches=patches[:2]).patches, plain)
    pair = batch.repeat_rows(4)
    scores = critic(**pair.inputs(), patches=patches)
    torch.testing.assert_close(critic(**pair.inputs(angles.select_rows(twice)), patches=patches), scores)
