"""A tokenizer of the words of texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.models import IMAGE_TOKEN, load_tokenizer

TEXTS = ["a red circle at the top left", "top left: a red circle, moving up", "what is it? "]
BYTES, WORDS = load_tokenizer("bytes"), load_tokenizer("words", TEXTS)


def encode(text):
    return WORDS(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@given(st.lists(st.sampled_from([*" ".join(TEXTS).split(" "), ""]), max_size=8).map(" ".join))
def test_texts_of_known_words_come_back_as_they_were(text):
    assert WORDS.decode(encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_texts_of_any_language_come_back_from_bytes_as_they_were(text):
    ids = BYTES(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert BYTES.decode(ids) == text


def test_a_word_is_one_token_wherever_it_stands():
    assert len(encode("top left: a red circle")) == 6
    assert encode("top red")[0] in encode("a top")
    assert len(set(encode("red red red"))) == 1


def test_other_words_are_unknown_and_no_text_spells_the_image_token():
    assert encode("a blue circle").count(WORDS.unk_token_id) == 1
    assert WORDS.convert_tokens_to_ids(IMAGE_TOKEN) not in encode(f"a {IMAGE_TOKEN}")


def test_a_saved_tokenizer_is_the_same_and_needs_no_texts(tmp_path):
    WORDS.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == WORDS.get_vocab()
    assert loaded.decode(encode(TEXTS[1])) == TEXTS[1]
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "<pad>")


def test_texts_without_words_make_no_tokenizer():
    with pytest.raises(ValueError, match="there are none; take bytes"):
        load_tokenizer("words")
