"""One model on every backend, packed or not, with layers computed anew, under transformers' Trainer."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from rope_mm import SCHEMES, Image, Text, Video
from rope_mm.models import (
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.models.masks import find_document_ids
from rope_mm.models.position_ids import pack_position_ids, unpack_position_ids
from rope_mm.nn.attention import Attention, make_block_ids, make_mask_fn
from rope_mm.positions.packing import pack

SEQUENCE = ["see ", Image(2, 3), " and ", Video(2, 2, 2), "."]
ANEW = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # before 5.23
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(scheme="rope-tv", **settings):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme}, **settings)
    return RopeMMForConditionalGeneration(config)


def inputs_of(model, *sequences, side="left"):
    inputs = build_batch(sequences, load_tokenizer(), model.config.scheme, side).inputs()
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    torch.manual_seed(1)
    return inputs | {"patches": torch.randn(places, model.config.patch_width)}


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_attention_backend_gives_the_same_outputs(backend, side, uncompiled):
    model = make().eval()
    inputs = inputs_of(model, SEQUENCE, ["ab", Image(1, 2)], side=side)
    there = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs)
        model.set_attn_implementation(backend)
        other = model(**inputs)
        torch.testing.assert_close(other.logits[there], plain.logits[there], **CLOSE)
        torch.testing.assert_close(other.patches, plain.patches, **CLOSE)


def test_the_definition_of_attention_is_what_the_model_computes():
    model = make().eval()
    layer = model.model.blocks[0].attention
    positions, x = torch.rand(1, 5, 3, dtype=torch.float64), torch.randn(1, 5, 32)
    angles, token = model.model.rotary.angles(positions), torch.arange(5)
    mask = make_mask_fn(torch.tensor([[1, 2, 2, 3, 4]]))(torch.tensor(0), token[:1], token[:, None], token)
    mine, _ = layer(x, angles, mask[None, None])
    plain, _ = Attention.forward(layer, x, angles, mask[None, None])
    with torch.no_grad():
        attended = Attention(32, 4, 2, 8, 1e-6)
        attended.load_state_dict(layer.state_dict())
        torch.testing.assert_close(attended(x, angles, mask[None, None])[0], mine)
    assert torch.equal(mine, plain)


def test_eager_attention_returns_weights_that_follow_the_blocks():
    model = make().eval()
    model.set_attn_implementation("eager")
    out = model(**inputs_of(model, SEQUENCE), output_attentions=True, output_hidden_states=True)
    blocks = make_block_ids([Text(4), Image(2, 3), Text(5), Video(2, 2, 2), Text(1)])
    assert len(out.attentions) == 2
    assert len(out.hidden_states) == 3
    assert torch.equal(out.attentions[0][0, 0] > 0, blocks[None] <= blocks[:, None])


def test_flash_attention_that_is_not_installed_is_refused():
    with pytest.raises(ImportError, match=r"FlashAttention2 .* installed"):
        make().set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("scheme", ["rope-tv", "mixed"])
def test_gradient_checkpointing_gives_the_same_gradients(scheme):
    gradients = []
    for anew in (False, True):
        model = make(scheme).train()
        if anew:
            getattr(model, f"{ANEW}_checkpointing_enable")()
        one, two = inputs_of(model, SEQUENCE), inputs_of(model, ["ab", Image(3, 2)])
        outs = [model(**one), model(**two)]  # two forwards before one backward, as a GAN has them
        sum(out.patches.square().mean() + out.logits.square().mean() for out in outs).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def packed(model, *sequences):
    """Sequences packed in one row, each with positions of its own."""
    rows = [build_batch([sequence], load_tokenizer(), model.config.scheme).inputs() for sequence in sequences]
    keys = "input_ids", "position_ids", "block_ids"
    return {key: torch.cat([row[key] for row in rows], -1) for key in keys}


@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope", "flux2"])
def test_packed_documents_do_not_see_each_other(scheme):
    model = make(scheme).eval()
    first, second = ["one ", Image(2, 2)], [Image(2, 3), "two"]  # two images meet
    inputs = packed(model, first, second)
    patches = torch.randn(10, 4)
    out = model(**inputs, patches=patches)
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 1] += 1
    noisy = patches.clone()
    noisy[:4] += 1
    other = model(**changed, patches=noisy)
    assert torch.equal(out.logits[0, 8:], other.logits[0, 8:])
    assert not torch.equal(out.logits[0, :8], other.logits[0, :8])
    for sequence, tokens, shown in ((first, slice(0, 8), patches[:4]), (second, slice(8, None), patches[4:])):
        alone = model(
            **build_batch([sequence], load_tokenizer(), model.config.scheme).inputs(), patches=shown
        )
        torch.testing.assert_close(out.logits[:, tokens], alone.logits, **CLOSE)
    positions, number = pack([[Text(4), Image(2, 2)], [Image(2, 3), Text(3)]], model.config.scheme.layout)
    assert torch.equal(inputs["position_ids"][1:, 0].T, positions)
    assert torch.equal(find_document_ids(inputs["position_ids"][0].long(), None, None)[0], number)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_the_flattening_collator_of_transformers_packs_as_well(ends, mask):
    model = make().eval()
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (1, 4, 6)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=ends)
    batch = {k: v for k, v in collate(rows).items() if torch.is_tensor(v) or isinstance(v, int)}
    if mask:  # with which transformers' own models forget the documents
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    out = model(**batch)
    alone = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(out.logits, torch.cat(alone, 1), **CLOSE)
    with pytest.raises(ValueError, match=r"packed documents cannot be cached.*use_cache=False"):
        model(**batch, use_cache=True)


def test_text_that_continues_after_padding_is_one_document():
    count = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert find_document_ids(count, mask, None) is None
    assert find_document_ids(count, None, None) is not None


def test_unpacked_position_ids_are_the_positions_that_were_packed():
    positions, mask = torch.rand(2, 5, 3, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    ids = pack_position_ids(positions, mask)
    count, again = unpack_position_ids(ids, SCHEMES["rope-tv"], None)
    assert torch.equal(again, positions)
    assert count.tolist() == [[0, 1, 2, 3, 4], [-2, -1, 0, 1, 2]]


def test_the_trainer_of_transformers_learns_text_after_images(tmp_path):
    model = make()
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    black, white = torch.full((1, 2, 4), -1.0), torch.full((1, 2, 4), 1.0)
    rows = [[black, "night"], [white, "day"]] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        **{f"{ANEW}_checkpointing": True},
        remove_unused_columns=False,
        report_to=[],
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=lambda batch: processor(documents=batch, return_labels=True),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.05 < losses[0]
    model.eval()
    generated = model.generate(
        **processor(documents=[[black, "n"], [white, "d"]]), max_new_tokens=2, do_sample=False
    )
    assert processor.batch_decode(generated[:, -2:]) == ["ig", "ay"]
