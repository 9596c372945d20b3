"""Adversarial training with a tokenizer of the captions' words, whose sequences are shorter than bytes."""

import adversarial
import pytest
from accelerate import Accelerator

from rope_mm.training.config import load


def training(tokenizer):
    flags = ["--data.path", "digits", "--data.label", "label", "--data.size", "8", "--tokenizer", tokenizer]
    sizes = "{patch_size: 4, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1}"
    config = load(adversarial.Adversarial, [*flags, "--model", sizes, "--global_batch_size", "4"])
    return adversarial.Training(config, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def words():
    return training("words")


def test_every_caption_of_both_splits_is_made_of_known_words(words):
    tokenizer, seen = words.batcher.tokenizer, 0
    for caption in adversarial.texts_of(words.images, words.held_out):
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == caption
        seen += 1
    assert seen > 100


def test_sequences_of_words_are_less_than_half_as_long_as_those_of_bytes(words):
    lengths = [t.micro_batch(0).sequences.input_ids.shape[1] for t in (words, training("bytes"))]
    assert lengths[0] < lengths[1] / 2
    assert words.step(0)["loss/critic"].isfinite()
