"""position_ids that a forward is told: by their place or name, packed, padded, and those that do not fit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, ModernBertConfig, ModernBertModel

from rope_mm import Image, Text
from rope_mm.checks.arguments import cache_of
from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope

IDS = torch.arange(3, 27).view(2, 12)
WITHIN = 3e-5


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def test_tables_refuse_positions_in_low_precision_too(tiny):
    model = tiny("llama")
    set_rope(model, "rope-tv")
    p = positions_for(model, ["text:12"] * 2)
    with pytest.raises(ValueError, match="cannot count past 256"):
        logits(model, position_ids=p.bfloat16())


class Reads(TorchDispatchMode):
    """Counts how often the host reads numbers, for which an accelerator would make it wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, listed = 0, torch.Tensor.tolist

        def tolist(x):
            self.count += 1
            return listed(x)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scheme", "most"), [(None, 0), ("own", 0), ("rope-tv", 1)])
def test_a_step_of_decoding_reads_numbers_once_at_most(tiny, scheme, most, cached, monkeypatch):
    model = tiny("llama")
    if scheme:
        set_rope(model, rope_of(model) if scheme == "own" else scheme)
    axes = scheme == "rope-tv"
    p = positions_for(model, ["text:2 image:2x3 text:4"] * 2) if axes else torch.arange(12).expand(2, -1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, position_ids=p, **cached(cache))
        for step in (1, 2):
            with Reads(monkeypatch) as reads:
                model(IDS[:, :1], position_ids=p[..., -1:] + step, **cached(cache))
            assert reads.count <= most


@pytest.mark.parametrize("compiled", [False, True])
def test_position_ids_may_be_a_positional_argument(tiny, compiled):
    torch._dynamo.reset()
    model = tiny("llama", initializer_range=0.2).model
    set_rope(model, "rope-tv")
    p = positions_for(model, ["text:2 image:2x3 text:4"] * 2)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad():
        named = model(IDS, position_ids=p, use_cache=False)[0]
        assert (run(IDS, None, p, use_cache=False)[0] - named).abs().max() < WITHIN


def test_an_argument_given_twice_or_too_many_end_as_python_ends_them(tiny):
    model = tiny("llama").model
    set_rope(model, "rope-tv")
    with pytest.raises(TypeError, match="got the argument input_ids twice"):
        model(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match=r"takes [0-9]+ arguments, not 30"):
        model(IDS, *[None] * 29)


def test_packed_documents_by_two_dimensional_position_ids_are_separated_or_refused_and_padding_starts_none(
    tiny,
):
    model = tiny("llama", initializer_range=0.2)
    set_rope(model, "flat")
    p, mask = torch.tensor([[*range(7), *range(5)]] * 2), torch.ones(2, 12).long()
    for more in ({}, {"attention_mask": mask, "use_cache": False}):
        with pytest.raises(ValueError, match="lets the documents see one another"):
            logits(model, position_ids=p, **more)
    first = torch.arange(12) < 7
    sees = torch.ones(12, 12).tril().bool() & (first[:, None] == first)
    packed = logits(model, position_ids=p, use_cache=False)
    assert torch.equal(logits(model, position_ids=p, attention_mask=sees.expand(2, 1, 12, 12)), packed)
    assert (packed[:, 7:] - logits(model, IDS[:, 7:])).abs().max() < WITHIN
    mask[:, :2] = mask[:, 9:] = 0
    p = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    padded = logits(model, position_ids=p, attention_mask=mask)
    assert (padded[:, 2:9] - logits(model, IDS[:, 2:9])).abs().max() < WITHIN
    unset_rope(model)
    set_rope(model, rope_of(model))
    logits(model, position_ids=torch.tensor([[*range(7), *range(5)]]))


@pytest.mark.parametrize("shape", [(4, 12), (12,), (4, 3, 12), (4, 2, 11)])
def test_positions_of_another_batch_or_length_are_refused(tiny, shape):
    model = tiny("llama")
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="do not fit 2 rows of 12 tokens"):
        logits(model, position_ids=torch.zeros(shape))


@pytest.mark.parametrize("what", [[Text(3), Image(2, 2)], {"attention_mask": torch.ones(1, 3)}])
def test_positions_for_refuses_anything_but_segments_or_inputs(tiny, what):
    model = tiny("llama")
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="is neither a list of rows of segments"):
        positions_for(model, what)


def test_an_encoder_without_a_cache_takes_positions_that_restart():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ModernBertModel(ModernBertConfig(**sizes, vocab_size=97, pad_token_id=0)).eval()
    set_rope(model, "flat")
    p = torch.tensor([[*range(7), *range(5)]])
    assert model(IDS, position_ids=p)[0].isfinite().all()
    with pytest.raises(ValueError, match="lets the documents see one another"):
        model(IDS, position_ids=p, attention_mask=torch.ones(2, 12).long())


@pytest.mark.parametrize("past", [0, 5])
def test_a_mask_longer_than_the_tokens_is_refused(tiny, cached, past):
    model, ids = tiny("llama"), torch.arange(3, 15)[None]
    set_rope(model, "rope-tv")
    mask = torch.ones(1, 14, dtype=torch.long)
    cache = cache_of(model(ids[:, :past], use_cache=True)) if past else None
    given = cached(cache) if past else {}
    with pytest.raises(
        ValueError, match=rf"has 14 columns, but the cache holds {past} tokens and {12 - past}"
    ):
        model(ids[:, past:], attention_mask=mask, **given)


def test_positions_made_for_padding_on_the_right_are_refused_where_it_is_on_the_left(tiny):
    model, ids = tiny("llama"), torch.arange(3, 13).view(2, 5)
    set_rope(model, "rope-tv")
    rows = ["text:5", "text:3"]
    left = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="row 0 of position_ids counts padding as tokens"):
        model.generate(ids, attention_mask=left, position_ids=positions_for(model, rows), max_new_tokens=2)
    p = positions_for(model, rows, padding_side="left")
    padded = model.generate(ids, attention_mask=left, position_ids=p, max_new_tokens=2, do_sample=False)
    alone = model.generate(ids[1:, 2:], max_new_tokens=2, do_sample=False)
    assert torch.equal(padded[1, 5:], alone[0, 3:])
