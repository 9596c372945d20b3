"""A collator that packs examples of text, images and videos, for transformers' Trainer and for TRL."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import get_worker_info

from rope_mm.hf.packing.examples import Example, cut_example, encode_example
from rope_mm.hf.packing.isolation import Isolation, find_isolation, mixes_images
from rope_mm.hf.packing.leaks import MIXED, TYPES
from rope_mm.hf.packing.rows import Placer, make_placer, pack_examples, text_model
from rope_mm.positions.packing import first_fit

LOG = logging.getLogger(__name__)
MOST_WORKERS = 256


class PackingCollator:
    """Packs examples of text, images and videos into rows, in which they do not see each other.

    For Trainer and TRL's SFTTrainer as `data_collator`, with `per_device_train_batch_size` examples to pack.
    Logits and losses are those of the examples alone. The batch has position_ids that start anew in each
    example, by the scheme of `set_rope` or by the model's own rule, `use_cache=False` (the Trainer switches
    the cache of a vision-language model off in its outer config only, and then documents would see each
    other), for flash-attention one row and its cumulative lengths, and pixels and grids in the order of the
    rows. A small forward of the model proves that it keeps documents apart.

    Args:
        processor: the model's processor or tokenizer; None where examples have input_ids.
        model: the model that is trained.
        max_length: tokens of a row, and the most of an example.
        too_long: "cut" an example that is longer at text, never in an image, or "skip" it.
        assistant_only_loss: whether only the assistant's tokens are predicted, where the template marks them.
        prove: whether to run the small forward.

    Attributes:
        cut: how many examples were cut, in all workers.
        skipped: how many were skipped, in all workers.

    Raises:
        ValueError: a model that does not keep documents apart; when called, a batch of which nothing is left,
            or a row of several examples with images, where the model's mask of images mixes them (Gemma 3).
    """

    def __init__(
        self,
        processor: Any,
        model: nn.Module,
        max_length: int,
        too_long: Literal["cut", "skip"] = "cut",
        assistant_only_loss: bool = False,
        prove: bool = True,
    ):
        if too_long not in ("cut", "skip"):
            raise ValueError(f"too_long must be 'cut' or 'skip', not {too_long!r}")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {max_length}")
        self.processor, self.max_length, self.too_long = processor, max_length, too_long
        self.assistant_only_loss = assistant_only_loss
        self.model: nn.Module | None = model
        self._placer = make_placer(model)
        self.counts = torch.zeros(2, MOST_WORKERS + 1, dtype=torch.long).share_memory_()
        self.isolation = find_isolation(model, self._placer) if prove else Isolation()
        self.mixes_images = prove and mixes_images(model, self._placer, self.isolation.masked)
        self.model_name = type(text_model(model)).__name__

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, for workers that are spawned."""
        return vars(self) | {"model": None, "_placer": self.placer}

    @property
    def placer(self) -> Placer:
        """Places examples as the model, as it is now, would."""
        return self._placer if self.model is None else make_placer(self.model)

    @property
    def cut(self) -> int:
        return int(self.counts[0].sum())

    @property
    def skipped(self) -> int:
        return int(self.counts[1].sum())

    def prepare(self, example: Mapping[str, Any]) -> Example | None:
        """What is packed of an example; None where it is skipped."""
        placer = self.placer
        encoded = encode_example(
            self.processor, placer.config, placer.known, example, self.assistant_only_loss
        )
        if self.isolation.typed and TYPES[0] not in encoded.tokens:
            raise ValueError(
                f"{self.model_name} makes its mask of {TYPES[0]}; without them it attends both ways to an "
                "example alone, but not in a row. Give the types that its processor makes"
            )
        if len(encoded) <= self.max_length:
            return encoded
        short = cut_example(encoded, placer.config, self.max_length) if self.too_long == "cut" else None
        self.count(short is None, len(encoded))
        return short

    def count(self, skipped: bool, tokens: int) -> None:
        """Count an example that is too long; the first one is logged."""
        if not self.counts.any():
            LOG.warning(
                "an example of %d tokens is longer than max_length %d and was %s; `cut` and `skipped` of the "
                "collator count such examples",
                tokens,
                self.max_length,
                "skipped" if skipped else "cut at text",
            )
        worker = get_worker_info()
        self.counts[int(skipped), 0 if worker is None else 1 + worker.id % MOST_WORKERS] += 1

    def refuse_images(self, examples: Sequence[Example]) -> None:
        """Refuse a row of several examples with an image in it.

        Raises:
            ValueError: such a row.
        """
        for row in first_fit([len(x) for x in examples], self.max_length):
            if len(row) > 1 and any((examples[n].kinds > 0).any() for n in row):
                raise ValueError(f"{self.model_name} {MIXED}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            examples: as a data set has them: messages, prompt and completion, or text, with image(s) and
                video(s), or what a processor made.

        Returns:
            The arguments of a forward: input_ids and labels (b, s), position_ids (b, s) or (1 + a, b, s),
            use_cache, pixels and grids; for flash-attention cumulative lengths.
        """
        if not len(examples):
            raise ValueError("a batch of no examples came; give one at least, as a list of dicts")
        kept = [example for example in map(self.prepare, examples) if example is not None]
        if not kept:
            raise ValueError(
                f"no example of this batch of {len(examples)} has anything left to predict in "
                f"{self.max_length} tokens; raise max_length, or the number of examples in a batch"
            )
        if self.mixes_images:
            self.refuse_images(kept)
        placer = self.placer
        pad_id = pad_token(self.processor, placer.config)
        return pack_examples(kept, placer, self.max_length, pad_id, self.isolation.masked)


def pad_token(processor: Any, config: Any) -> int:
    """The token that fills rows; no token attends to it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found = (getattr(x, "pad_token_id", None) for x in (tokenizer, config.get_text_config(), config))
    return next((token for token in found if isinstance(token, int) and token >= 0), 0)
