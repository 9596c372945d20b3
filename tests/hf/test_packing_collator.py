"""PackingCollator: packed examples of text, images and videos have the logits and losses of each alone."""

import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from vision_language_models import IMAGE, TEXT, VIDEO, qwen2_5_vl, qwen2_vl, qwen3_vl, visual_inputs

from rope_mm.hf import PackingCollator, PackingReport, packed_equals_alone, rope_of, set_rope
from rope_mm.hf.packing.rows import join_media

WITHIN = 2e-6  # of the largest logit
SQUARE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE |= {"image_size": 16, "patch_size": 4}


def example(*grids, seed=0, text=3, video=False):
    """Text tokens and, between them, images or a video of these grids of patches."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(10, 80, (text,), generator=generator).tolist()
    ids = [1, 5 + seed]
    for t, y, x in grids:
        ids += [VIDEO if video else IMAGE] * (t * y * x // 4) + [7]
    if not grids:
        return {"input_ids": torch.tensor([ids + tail])}
    return visual_inputs(ids + tail, grids, video, generator)


TALL, WIDE = (1, 8, 4), (1, 4, 8)
EXAMPLES = [
    example(WIDE, seed=1),
    example(TALL, (1, 4, 4), seed=2),
    example(seed=3, text=9),
    example((2, 4, 4), seed=4, video=True),
]


def timestamped(frames, y, x, seed):
    """A video of Qwen3-VL: a timestamp and a token that opens it before each frame."""
    stamped = [token for n in range(frames) for token in [20 + n, 92, *[VIDEO] * (y * x), 93]]
    generator = torch.Generator().manual_seed(seed)
    return visual_inputs([1, 5, *stamped, 30, 31], [(frames, 2 * y, 2 * x)], True, generator)


TIMED = timestamped(3, 2, 1, 5)
QWENS = [qwen2_vl, qwen2_5_vl, qwen3_vl]


def examples_of(make):
    return [*EXAMPLES[:3], TIMED] if make is qwen3_vl else EXAMPLES


def llava():
    text = {**TEXT, "model_type": "llama", "num_hidden_layers": 2}
    vision = {**SQUARE, "model_type": "clip_vision_model", "projection_dim": 32}
    more = {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -1}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def square(images, seed, text=4):
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(10, 80, (text,), generator=generator).tolist()
    ids = torch.tensor([[1, 5, *([*[IMAGE] * 16, 7] * images), *tail]])
    pixels = {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)} if images else {}
    return {"input_ids": ids, **pixels}


def assert_equal_alone(model, examples, max_length=64, rows=None, **options):
    collator = PackingCollator(None, model, max_length, **options)
    report = packed_equals_alone(model, examples, collator)
    assert isinstance(report, PackingReport) and len(report.differences) == len(examples)
    assert report.ok, report
    assert not report.leaks and max(report.differences) < WITHIN * report.size
    assert report.loss[0] == pytest.approx(report.loss[1], rel=1e-5)
    batch = collator(examples)
    assert rows is None or len(batch["input_ids"]) == rows
    return batch


@pytest.mark.parametrize("scheme", [None, "rope-tv", "m-rope-i", "circle"])
@pytest.mark.parametrize("make", QWENS)
def test_packed_examples_of_a_qwen_vl_equal_each_alone(make, scheme):
    model = make()
    if scheme:
        set_rope(model, scheme)
    for attention, max_length in (("sdpa", 64), ("eager", 28)):
        model.set_attn_implementation(attention)
        batch = assert_equal_alone(model, examples_of(make), max_length)
        assert len(batch["position_ids"]) == 4
        starts = batch["position_ids"][0] == 0
        assert (batch["labels"][starts] == -100).all() and starts.sum() >= len(examples_of(make))


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
def test_packed_examples_of_llava_equal_each_alone(scheme):
    model = llava()
    if scheme:
        set_rope(model, scheme)
    batch = assert_equal_alone(model, [square(1, 1), square(0, 2), square(2, 3)], 45, rows=2)
    assert batch["position_ids"].shape == ((4, 2, 40) if scheme else (2, 40))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "opt"])
def test_packed_texts_equal_each_alone_by_token_numbers_or_by_a_mask(tiny, family):
    model = tiny(family, vocab_size=100, word_embed_proj_dim=64, sliding_window=4)
    texts = [{"input_ids": list(range(start, start + n))} for start, n in ((5, 9), (20, 4), (31, 7))]
    batch = assert_equal_alone(model, texts, 16, rows=2)
    assert ("attention_mask" in batch) == (family in ("gpt_oss", "opt"))


@pytest.mark.parametrize("scheme", ["rope-tv", "flat"])
def test_packed_texts_of_a_llama_with_a_scheme_equal_each_alone(tiny, scheme):
    model = tiny("llama")
    set_rope(model, scheme)
    texts = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11]}]
    batch = assert_equal_alone(model, texts, 16, rows=1)
    assert batch["position_ids"][0].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
@pytest.mark.parametrize("make", [*QWENS, llava])
def test_flash_attention_gets_one_row_and_its_lengths(make, scheme, flash):
    model = make()
    if scheme:
        set_rope(model, scheme)
    model.config.get_text_config()._attn_implementation_internal = None
    flash.switch(SimpleNamespace(config=model.config.get_text_config()))
    examples = [square(1, 1), square(0, 2), square(2, 3)] if make is llava else examples_of(make)
    batch = assert_equal_alone(model, examples, 24 if make is not llava else 45, rows=1)
    ends = [0, *torch.tensor([one["input_ids"].shape[-1] for one in examples]).cumsum(0).tolist()]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == sorted(ends)
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and "attention_mask" not in batch
    before = flash.calls["varlen"]
    model(**batch)
    assert flash.calls["varlen"] == before + 2


def test_flash_attention_without_lengths_over_several_rows_leaks_and_the_report_says_so(flash, tiny):
    model = tiny("llama")
    texts = [{"input_ids": list(range(start, start + 8))} for start in (5, 20, 31, 50)]
    right = PackingCollator(None, model, 16)
    flash.switch(model)

    def collator(examples):
        model.config._attn_implementation_internal = "sdpa"
        batch = right(examples)
        flash.switch(model)
        return batch

    report = packed_equals_alone(model, texts, collator)
    assert report.leaks == [1, 3]
    assert report.sentence.endswith("give cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k")


@pytest.mark.parametrize("family", ["mamba", "jamba", "bert", "roberta"])
def test_models_that_do_not_keep_documents_apart_are_refused(tiny, family):
    with pytest.raises(ValueError, match=r"does not keep packed documents apart|takes no position_ids"):
        PackingCollator(None, tiny(family), 16)


def trained(model, examples, collator, tmp_path, **more):
    """The outputs and arguments of the forwards of a Trainer's step, and the loss that it logs."""
    seen = []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-2:]), with_kwargs=True)
    run = {"max_steps": 1, "per_device_train_batch_size": len(examples), "learning_rate": 0.0}
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = TrainingArguments(str(tmp_path), **run, **quiet, **more)
    trainer = Trainer(model, arguments, collator, examples)
    trainer.train()
    hook.remove()
    return seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("scheme", [None, "rope-tv"])
@pytest.mark.parametrize("make", [*QWENS, llava])
def test_in_the_trainer_logits_and_loss_are_those_of_each_alone(make, scheme, tmp_path):
    model = make()
    if scheme:
        set_rope(model, scheme)
    examples = [square(1, 1), square(0, 2), square(2, 3)] if make is llava else examples_of(make)
    collator = PackingCollator(None, model, 64)
    losses, count, alone = 0.0, 0, []
    for one in map(collator.prepare, examples):
        with torch.no_grad():
            logits = model(**one.inputs() | {"labels": None}).logits[0]
        alone.append((one.tokens["input_ids"], logits))
        losses += cross_entropy(logits[:-1], one.tokens["labels"][1:], reduction="sum").item()
        count += int((one.tokens["labels"][1:] != -100).sum())
    seen, logged = trained(model, examples, collator, tmp_path, remove_unused_columns=False)
    assert len(seen) == 1 and model.config.use_cache is False and seen[0][0]["use_cache"] is False
    assert make is llava or model.config.text_config.use_cache, "the Trainer leaves the text's cache on"
    arguments, out = seen[0]
    for ids, logits in alone:
        ((row, start),) = (arguments["input_ids"].unfold(1, len(ids), 1) == ids).all(-1).nonzero().tolist()
        packed = out.logits[row, start : start + len(ids)]
        assert (packed - logits).abs().max() < WITHIN * logits.abs().max()
    assert out.loss.item() == pytest.approx(losses / count, rel=1e-5)
    assert logged == [pytest.approx(losses / count, rel=1e-4)]


def test_the_trainer_with_checkpointing_workers_and_evaluation_runs(tmp_path):
    model = qwen2_5_vl()
    set_rope(model, "rope-tv")
    collator = PackingCollator(None, model, 24, too_long="skip")
    more = {"activation_checkpointing": True, "dataloader_num_workers": 1, "remove_unused_columns": False}
    seen, logged = trained(model, EXAMPLES, collator, tmp_path, **more)
    assert len(seen) == 1 and logged[0] > 0
    assert (collator.skipped, collator.cut) == (0, 0)
    short = PackingCollator(None, model, 12, too_long="skip")
    trained(model, EXAMPLES, short, tmp_path, **more)
    assert (short.skipped, short.cut) == (3, 0)  # counted in the worker


def test_a_copy_for_another_process_has_no_weights_and_makes_the_same_batch():
    model = qwen2_5_vl()
    for scheme in (None, "rope-tv"):
        if scheme:
            set_rope(model, scheme)
        collator = PackingCollator(None, model, 64)
        copied = pickle.dumps(collator)
        assert len(copied) < 60_000
        one, other = collator(EXAMPLES), pickle.loads(copied)(EXAMPLES)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if name != "use_cache")


def test_a_scheme_that_is_set_later_places_the_next_batch():
    model = qwen2_vl()
    collator = PackingCollator(None, model, 64)
    assert not collator(EXAMPLES)["position_ids"].is_floating_point()
    handle = set_rope(model, "rope-tv")
    assert packed_equals_alone(model, EXAMPLES, collator).ok
    handle.undo()
    set_rope(model, rope_of(model))
    assert packed_equals_alone(model, EXAMPLES, collator).ok


@pytest.mark.parametrize("limit", range(2, 34))
def test_a_long_example_is_cut_at_text_and_keeps_whole_images(limit):
    model, (one,) = qwen2_vl(), [example(WIDE, TALL, (1, 4, 4), seed=5, text=6)]
    collator = PackingCollator(None, model, limit, prove=False)
    whole, cut = one["input_ids"].shape[1], collator.prepare(one)
    assert (collator.cut, collator.skipped) == (int(limit < whole), 0)
    kinds = cut.tokens["mm_token_type_ids"]
    grids = cut.media.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
    assert limit - 9 < len(cut) <= limit
    assert int(kinds.sum()) == int(grids.prod(-1).sum()) // 4
    assert len(cut.media.get("pixel_values", ())) == int(grids.prod(-1).sum())
    if len(cut) >= 2:
        assert packed_equals_alone(model, [one], collator).ok


@pytest.mark.parametrize("limit", [4, 5, 6, 7])
def test_a_cut_behind_the_token_that_opens_an_image_takes_it_away(limit):
    one = visual_inputs([1, 5, 6, 7, 92, *[IMAGE] * 4, 93, 8], [(1, 4, 4)])
    cut = PackingCollator(None, qwen2_vl(), limit, prove=False).prepare(one)
    assert cut.tokens["input_ids"].tolist() == cut.tokens["labels"].tolist() == [1, 5, 6, 7]
    assert not cut.media


def test_an_example_without_a_text_to_cut_at_is_skipped_and_said_once(caplog):
    model = qwen2_vl()
    images = visual_inputs([1, *[IMAGE] * 8], [WIDE]) | {"labels": torch.tensor([[-100] * 8 + [5]])}
    collator = PackingCollator(None, model, 6)
    batch = collator([images, example(seed=1, text=2), images])
    assert batch["input_ids"].shape == (1, 4) and "pixel_values" not in batch
    assert (collator.skipped, collator.cut) == (2, 0)
    assert [record.message for record in caplog.records] == [
        "an example of 9 tokens is longer than max_length 6 and was skipped; `cut` and `skipped` of the "
        "collator count such examples"
    ]
    with pytest.raises(
        ValueError, match="no example of this batch of 1 has anything left to predict in 6 tok"
    ):
        collator([images])


def test_grids_that_the_tokens_of_an_example_do_not_fill_are_refused():
    collator = PackingCollator(None, qwen2_vl(), 64)
    wrong = EXAMPLES[0] | {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(ValueError, match="an example has 8 image tokens, but its image_grid_thw are of 4"):
        collator([wrong])
    with pytest.raises(ValueError, match=r"too_long must be 'cut' or 'skip', not 'drop'"):
        PackingCollator(None, qwen2_vl(), 64, too_long="drop")


def packed_otherwise(change):
    """A collator whose batch is ours, changed."""

    def wrong(model, max_length=64):
        right = PackingCollator(None, model, max_length)

        def collator(examples):
            return change(dict(right(examples)))

        return collator

    return wrong


ROW_0 = r"give position_ids \(4, b, s\) whose row 0 starts at 0 in each example"
WRONG = {
    "a cache": (lambda b: b | {"use_cache": None}, "sees the examples before it.*put use_cache=False"),
    "a mask": (
        lambda b: b | {"attention_mask": torch.ones_like(b["input_ids"])},
        r"leave attention_mask \(b, s\) out$",
    ),
    "three rows": (lambda b: b | {"position_ids": b["position_ids"][1:]}, ROW_0 + "$"),
    "row 0 over the whole row": (
        lambda b: b | {"position_ids": torch.cat((torch.arange(44)[None, None], b["position_ids"][1:]))},
        ROW_0 + "$",
    ),
    "all of it": (
        lambda b: b | {"position_ids": b["position_ids"][1:], "use_cache": None,
                       "attention_mask": torch.ones_like(b["input_ids"])},
        r"put use_cache=False in the batch.* and leave attention_mask.* and " + ROW_0,
    ),
    "positions of text": (
        lambda b: b | {"position_ids": b["position_ids"][:1].expand(4, -1, -1)},
        "example 0 sees no other, but differs by .* its position_ids are not those that it has alone",
    ),
    "images in another order": (
        lambda b: b | {"image_grid_thw": b["image_grid_thw"][[1, 0, 2]]},
        "example 0 sees no other.*pixels, grids or other inputs are not its own",
    ),
    "a label over the boundary": (
        lambda b: b | {"labels": b["input_ids"]},
        "the first token of example 1 has a label, which the last token of the example before it",
    ),
    "an example that is missing": (
        lambda b: {name: x[..., 13:] if name in ("input_ids", "labels") else x for name, x in b.items()},
        "the model does not take this batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_report_says_what_is_wrong_with_a_batch(name):
    change, message = WRONG[name]
    model = qwen2_5_vl()
    report = packed_equals_alone(model, EXAMPLES[:3], packed_otherwise(change)(model))
    assert not report.ok
    assert re.search(message, str(report)), report


def test_in_the_trainer_a_text_model_needs_no_word_on_the_cache_and_elsewhere_it_does(tiny):
    model = tiny("llama")
    examples = [{"input_ids": list(range(5, 12))}, {"input_ids": list(range(20, 25))}]
    flattening = DataCollatorWithFlattening()
    assert packed_equals_alone(model, examples, flattening).ok
    report = packed_equals_alone(model, examples, flattening, in_trainer=False)
    assert report.leaks == [1] and not report.ok and "put use_cache=False" in report.sentence
    assert model.config.use_cache is True


def test_pixels_of_several_sizes_are_padded_only_where_their_sizes_are_given():
    small, large = torch.ones(1, 3, 4, 6), torch.ones(2, 3, 8, 4)
    sizes = [
        {"pixel_values": x, "image_sizes": torch.tensor([x.shape[-2:]] * len(x))} for x in (small, large)
    ]
    joined = join_media("pixel_values", sizes)
    assert joined.shape == (3, 3, 8, 6)
    assert joined.sum() == small.sum() + large.sum()
    assert torch.equal(joined[:1, :, :4, :6], small) and torch.equal(joined[1:, :, :8, :4], large)
    tiles = [{"pixel_values": torch.ones(1, n, 3, 4, 4)} for n in (2, 5)]
    assert join_media("pixel_values", tiles).shape == (2, 5, 3, 4, 4)
    with pytest.raises(ValueError, match=r"shapes \(1, 3, 4, 6\), \(2, 3, 8, 4\), which do not stand in one"):
        join_media("pixel_values", [{"pixel_values": x} for x in (small, large)])


def test_a_model_that_cannot_run_yet_is_served_with_a_word_in_the_log(caplog):
    with torch.device("meta"):
        model = qwen2_vl()
    batch = PackingCollator(None, model, 64)(EXAMPLES)
    assert batch["position_ids"].shape[0] == 4 and batch["use_cache"] is False
    assert "could not run the small forward that proves that it keeps documents apart" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft 0.21
def test_adapters_around_a_model_change_nothing_for_the_collator():
    model = qwen2_5_vl()
    set_rope(model, "rope-tv")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert packed_equals_alone(adapted, EXAMPLES, PackingCollator(None, adapted, 64)).ok
