"""A tokenizer of whole words, made of the texts that are to be learned."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PIECE = Regex(r" ?\w+| ?[^\w\s]|\s")  # a word or a mark, with the space before it


def word_level_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of texts, each with the space before it, the first one, too.

    Raises:
        ValueError: texts without a word.
    """
    split = Split(PIECE, "isolated")
    pieces = sorted({piece for text in set(texts) for piece, _ in split.pre_tokenize_str(f" {text}")})
    if not pieces:
        raise ValueError("a tokenizer of words is made of texts, and there are none; take bytes")
    numbers = {piece: number for number, piece in enumerate((PAD, END, UNKNOWN, *pieces))}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    joined = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.decoder = joined  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def check_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Refuse texts with a word that has no token.

    Raises:
        ValueError: with the first such text.
    """
    for text in dict.fromkeys(texts):
        if tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"{text!r} has words that the model was not taught; use those of its data")
