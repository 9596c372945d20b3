"""Tokenizers: of bytes, of the words of the training texts, or any of Hugging Face's."""

from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"  # stands where a patch is
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PIECE = Regex(r" ?\w+| ?[^\w\s]|\s")  # a word or a punctuation mark, with the space before it


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


OWN_TOKENIZERS: dict[str, Callable[[Iterable[str]], PreTrainedTokenizerBase]] = {
    "bytes": lambda texts: ByT5Tokenizer(extra_ids=0),
    "words": word_level_tokenizer,
}


def load_tokenizer(name: str = "bytes", texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer with the image token.

    Args:
        name: "bytes", which needs no file, "words", a folder or a hub name.
        texts: whose words "words" knows.

    Raises:
        ValueError: a name that transformers cannot load, or texts without a word.
    """
    if name in OWN_TOKENIZERS:
        tokenizer = OWN_TOKENIZERS[name](texts)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"no tokenizer {name!r}: give bytes, words, a folder or a hub name ({reason})"
            ) from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def knows_words(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether every word of a text has a token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer.unk_token_id not in ids


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that have no token, each once; [] for spaces alone, or without offsets."""
    if not tokenizer.is_fast:
        return []
    read = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
    unknown = dict.fromkeys(text[a:b].strip() for i, (a, b) in spans if i == tokenizer.unk_token_id)
    return [word for word in unknown if word]


def check_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Refuse texts with a word that has no token.

    Raises:
        ValueError: with the first such text, and those words of it.
    """
    for text in dict.fromkeys(texts):
        if not knows_words(tokenizer, text):
            unknown = ", ".join(map(repr, unknown_words(tokenizer, text))) or "a word or space"
            raise ValueError(
                f"the tokenizer has no token for {unknown} in {text!r}; use words of the training data"
            )
