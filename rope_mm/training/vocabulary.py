"""The words of a run: its folder keeps its tokenizer of words, as its weights fit no other vocabulary."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rope_mm.models.tokenizers import knows_words, load_tokenizer, unknown_words
from rope_mm.training import checkpoint

FOLDERS = ("tokenizer", "model")  # of a run, where its tokenizer lies; the second one at its end


def find_word_tokenizer(
    output_dir: Path, texts: Iterable[str], restart: bool, changed_data: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of the words of texts; a run that goes on with changed data has that of its beginning.

    Args:
        output_dir: the run's folder.
        texts: of all rows.
        restart: whether the run begins anew.
        changed_data: whether it goes on with data that may have changed.

    Raises:
        ValueError: changed data with a word that the run did not begin with.
    """
    begun = checkpoint.latest(output_dir / "checkpoints") is not None and not restart
    kept = [output_dir / name for name in FOLDERS if (output_dir / name).is_dir()]
    if not (begun and changed_data and kept):
        return load_tokenizer("words", texts)
    tokenizer = load_tokenizer(str(kept[0]))
    for text in dict.fromkeys(texts):
        if not knows_words(tokenizer, text):
            words = ", ".join(map(repr, unknown_words(tokenizer, text)))
            raise ValueError(
                f"the run in {output_dir} began without {words or 'a word'} in {text!r}, so its tokenizer "
                "has no token for it; keep to its words, or start anew with --restart, where --tokenizer "
                "bytes would read any words"
            )
    return tokenizer


def keep_tokenizer(output_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer of a run to its folder, where `find_word_tokenizer` finds it."""
    tokenizer.save_pretrained(output_dir / FOLDERS[0])
