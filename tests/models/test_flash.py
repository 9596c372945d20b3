"""RopeMM on flash-attn: its arguments, proved by plain torch functions of flash-attn's signatures.

No GPU is needed: a module in the place of the package computes what its documentation says, and counts calls
(the fixture `flash`).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from rope_mm import Image, Video
from rope_mm.data.documents import Visual
from rope_mm.models import (
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.models.attention_backends import with_attention
from rope_mm.models.varlen import Run, find_runs, make_varlen_mask
from rope_mm.nn.attention import make_mask_fn

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SEQUENCE = ["see ", Image(2, 3), " and ", Video(2, 2, 2), "."]
VIDEO = [Video(4, 2, 2)]
TEXT = ["a text", " of two parts"]


def make(scheme="rope-tv", **settings):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme}, **settings)
    return RopeMMForConditionalGeneration(config).eval()


def inputs_of(model, *sequences, side="left"):
    full = model.config.video_attention == "full"
    inputs = build_batch(sequences, load_tokenizer(), model.config.scheme, side, full).inputs()
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    torch.manual_seed(1)
    return inputs | ({"patches": torch.randn(count, model.config.patch_width)} if count else {})


def both(model, flash, inputs):
    """The outputs and the weights' gradients by sdpa and by flash attention."""
    found = []
    for switch in (lambda model: None, flash.switch):
        switch(model)
        out = model(**inputs)
        valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        loss = out.logits[valid].square().mean()
        loss = loss if out.patches is None else loss + out.patches.square().mean()
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.logits[valid], out.patches, gradients))
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("video_attention", ["causal", "full"])
@pytest.mark.parametrize(
    "sequences",
    [[TEXT], [TEXT, ["b"]], [VIDEO], [VIDEO, [Video(2, 2, 2)]], [SEQUENCE], [SEQUENCE, ["ab", Image(1, 2)]]],
    ids=["text", "texts", "video", "videos", "mixed", "mixed rows"],
)
def test_flash_attention_is_what_sdpa_computes_with_its_gradients(flash, sequences, video_attention, side):
    model = make(video_attention=video_attention)
    (logits, patches, gradients), other = both(model, flash, inputs_of(model, *sequences, side=side))
    torch.testing.assert_close(other[0], logits, **CLOSE)
    torch.testing.assert_close(other[1], patches, **CLOSE)
    assert other[2].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[2][name], gradient, **CLOSE)
    assert flash.calls["dense"] == 0 < flash.calls["varlen"] <= 2 * model.config.num_hidden_layers


def test_text_without_padding_and_blocks_is_one_dense_call_a_layer(flash):
    model, ids = make(), torch.randint(3, 250, (2, 7))
    plain = model(ids).logits
    flash.switch(model)
    torch.testing.assert_close(model(ids).logits, plain, **CLOSE)
    assert flash.calls == {"dense": model.config.num_hidden_layers, "varlen": 0}


@pytest.mark.parametrize("ends", [False, True])
def test_packed_text_is_one_call_a_layer_on_the_tensors_as_they_are(flash, ends, monkeypatch):
    model = make()
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (1, 4, 6)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=ends)(rows)
    batch = {k: v for k, v in batch.items() if k != "labels" and (torch.is_tensor(v) or isinstance(v, int))}
    flash.switch(model)
    out = model(**batch).logits
    alone = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(out, torch.cat(alone, 1), **CLOSE)
    assert flash.calls["varlen"] == model.config.num_hidden_layers
    blocks, documents = torch.arange(11)[None], torch.tensor([[0] + [1] * 4 + [2] * 6])
    (call,) = make_varlen_mask(blocks, documents, None, 0, 11).calls
    assert (call.queries, call.keys, call.causal) == (None, None, True)
    assert call.query_ends.tolist() == call.key_ends.tolist() == [0, 1, 5, 11]


@pytest.mark.parametrize("samples", [1, 2])
def test_packed_documents_with_noisy_copies_are_what_sdpa_computes(flash, samples):
    from rope_mm.training.collator import Packer

    model = make("rope-tv-causal")
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    image, video = torch.rand(1, 4, 4) * 2 - 1, torch.rand(3, 1, 2, 2) * 2 - 1
    documents = [["a", Visual(image, True), "b", Visual(image, True)], ["c", Visual(video, True)], ["text"]]
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    packer = Packer(processor, 60, lambda n, generator: torch.zeros(n), samples=samples)
    batch = packer(documents, generators)
    (logits, patches, _), other = both(model, flash, batch.inputs())
    torch.testing.assert_close(other[0], logits, **CLOSE)
    torch.testing.assert_close(other[1], patches, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_from_images_with_every_cache(flash, cache):
    model = make()
    inputs = inputs_of(model, SEQUENCE, ["a ", Image(1, 2), "long word"])
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    flash.switch(model)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), plain)
    if cache == "dynamic":  # transformers itself refuses a static cache with flash attention
        assert torch.equal(model.generate(**inputs, **options), plain)


def test_videos_are_generated_frame_after_frame(flash):
    model = make("rope-tv-causal")
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())

    def generate(window):
        generator = torch.Generator().manual_seed(0)
        grid = Video(4, 2, 2)
        return processor.generate_images(model, ["a", "bcd"], grid, generator, 2, window_frames=window)

    plain = [generate(window) for window in (None, 2)]
    flash.switch(model)
    for window, videos in zip((None, 2), plain, strict=True):
        torch.testing.assert_close(generate(window), videos, **CLOSE)


def test_a_mask_of_another_form_is_refused_with_flex_attention_named(flash):
    model, ids = make(), torch.ones(1, 3).long()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    flash.switch(model)
    with pytest.raises(ValueError, match=r"takes no attention_mask of another form .*take flex_attention"):
        model(ids, attention_mask=mask)


def test_training_with_flash_attention_is_refused_where_it_has_no_backward():
    with pytest.raises(ValueError, match="flash_attention_2 has no backward on cpu; take sdpa or eager"):
        with_attention(read_config(), "flash_attention_2", torch.device("cpu"))
    config = with_attention(read_config(), "flash_attention_3", torch.device("cuda"))
    assert config._attn_implementation == "flash_attention_3"


def test_runs_are_those_of_text_and_blocks():
    blocks = torch.tensor([1, 2, 3, 3, 4, 5, 5, -5, -5, 1, 2, 9, 9])
    documents = torch.tensor([0] * 9 + [1] * 4)
    valid = torch.tensor([True] * 11 + [False] * 2)
    assert find_runs(blocks, documents, valid) == [
        Run(0, 2, True), Run(2, 4, False), Run(4, 5, True), Run(5, 7, False), Run(7, 9, False),
        Run(9, 11, True),
    ]  # fmt: skip


SIZES = st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=6)


@given(rows=st.lists(SIZES, min_size=1, max_size=3), past=st.integers(0, 2), seed=st.integers(0, 99))
def test_calls_see_what_the_mask_function_sees(rows, past, seed):
    ids, documents, length = [], [], max(sum(size for size, _, _ in row) for row in rows)
    for row in rows:
        ids.append([])
        documents.append([])
        number = block = 0
        for size, shared, new in row:
            if new and not past:
                number, block = number + 1, 0
            ids[-1] += [block + 1] * size if shared else range(block + 1, block + 1 + size)
            block = ids[-1][-1]
            documents[-1] += [number] * size
        ids[-1] += range(block + 1, block + 1 + length - len(ids[-1]))
        documents[-1] += [number] * (length - len(documents[-1]))
    blocks, documents = torch.tensor(ids), torch.tensor(documents)
    valid = torch.rand(len(rows), past + length, generator=torch.Generator().manual_seed(seed)) > 0.2
    size = past + length + 1
    seen = torch.zeros(len(rows) * length, len(rows) * size, dtype=torch.bool)
    for call in make_varlen_mask(blocks, documents, valid, past, size).calls:
        queries = torch.arange(len(seen)) if call.queries is None else call.queries
        keys = torch.arange(seen.shape[1]) if call.keys is None else call.keys
        query_spans = queries.split(call.query_ends.diff().tolist())
        key_spans = keys.split(call.key_ends.diff().tolist())
        for q, k in zip(query_spans, key_spans, strict=True):
            visible = torch.ones(len(q), len(k), dtype=torch.bool)
            seen[q[:, None], k] |= visible.tril(len(k) - len(q)) if call.causal else visible
    rule = make_mask_fn(blocks, documents, past)
    b, q, k = torch.meshgrid(*map(torch.arange, (len(rows), length, size)), indexing="ij")
    wanted = rule(b, torch.tensor(0), q + past, k)
    wanted &= torch.nn.functional.pad(valid, (0, 1))[:, None] & valid[:, past:, None]
    found = seen.view(len(rows), length, len(rows), size)
    assert torch.equal(found[torch.arange(len(rows)), :, torch.arange(len(rows))], wanted)
    assert found.sum() == wanted.sum()  # no row sees another
