import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from rope_mm.evaluation.position_baselines import (
    BASELINES,
    Alibi,
    ContinuousBias,
    LearnedEmbedding,
    add_baseline,
)
from rope_mm.models import RopeMMForConditionalGeneration, read_config
from rope_mm.models.sequences import collate, encode
from rope_mm.models.tokenizers import load_tokenizer
from rope_mm.segments import Image


def make_model(layout="compact", seed=0):
    torch.manual_seed(seed)
    config = read_config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        patch_size=2,
        rope_parameters={"layout": layout, "freq_scale": 0.0},
    )
    return RopeMMForConditionalGeneration(config).eval()


def make_inputs(model, *documents):
    tokenizer = load_tokenizer()
    return collate(encode(documents, tokenizer, model.config.scheme)).inputs()


def random_patches(model, count):
    return torch.randn(count, model.config.patch_width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_on_text_the_bias_of_alibi_has_the_softmax_of_blooms(heads):
    length = 9
    positions = torch.arange(float(length))[None, :, None]
    bias = Alibi(heads, 1)(positions[:, :, None] - positions[:, None])
    theirs = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(1, heads, 1, length)
    future = torch.ones(length, length).triu(1).bool()
    ours, wanted = (x.masked_fill(future, -torch.inf).softmax(-1) for x in (bias, theirs))
    torch.testing.assert_close(ours, wanted)


@given(shift=st.integers(-50, 50), seed=st.integers(0, 99))
def test_biases_depend_on_differences_of_positions_only(shift, seed):
    positions = torch.randint(0, 20, (2, 5, 3), generator=torch.Generator().manual_seed(seed)).float()
    torch.manual_seed(seed)
    for bias in (Alibi(4, 3), ContinuousBias(4, 3)):
        made, moved = (bias(p[:, :, None] - p[:, None]) for p in (positions, positions + shift))
        assert made.shape == (2, 4, 5, 5)
        torch.testing.assert_close(made, moved)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_lets_no_token_see_a_later_one_or_another_document(name):
    model = make_model()
    add_baseline(model, name)
    short = make_inputs(model, ["ab", Image(1, 2), "c"])
    both = make_inputs(model, ["ab", Image(1, 2), "c"], ["ab", Image(1, 2), "cdefgh"])
    patches = random_patches(model, 2)
    alone = model(**short, patches=patches).logits
    beside = model(**both, patches=patches.repeat(2, 1)).logits
    count = alone.shape[1]
    torch.testing.assert_close(beside[:1, :count], alone)
    torch.testing.assert_close(beside[1:, :count], alone)


@pytest.mark.parametrize("name", BASELINES)
def test_with_a_baseline_the_order_of_patches_changes_the_answer_and_without_it_does_not(name):
    answers = []
    for baseline in (None, name):
        model = make_model()
        if baseline:
            add_baseline(model, baseline)
            # the first weights are small or leave the bias constant
            with torch.no_grad():
                for weight in model.model.baseline.parameters():
                    weight.normal_(std=1.0)
        patches = random_patches(model, 4)
        inputs = make_inputs(model, ["a", Image(2, 2), "b"])
        forward, backward = (model(**inputs, patches=p).logits[:, -1] for p in (patches, patches.flip(0)))
        answers.append((forward - backward).abs().max().item())
    assert answers[0] < 1e-5 < 1e-3 < answers[1]


@pytest.mark.parametrize("name", ["continuous-bias", "learned-embedding"])
def test_the_weights_of_a_baseline_are_trained(name):
    model = make_model()
    before = model.num_parameters()
    add_baseline(model, name)
    assert model.num_parameters() > before
    inputs = make_inputs(model, ["a", Image(2, 2), "b"])
    labels = inputs["input_ids"]
    model(**inputs, patches=random_patches(model, 4), labels=labels, num_items_in_batch=9).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.model.baseline.parameters())


@pytest.mark.parametrize("position", [-1.0, 0.5, 128.0])
def test_learned_embeddings_refuse_positions_without_a_vector(position):
    with pytest.raises(ValueError, match="vectors for whole numbers, 0 to 127"):
        LearnedEmbedding(8, 1)(torch.tensor([[[0.0], [position]]]))
