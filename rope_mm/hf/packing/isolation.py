"""Whether a model keeps the documents of a row apart, by a small forward of it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_mm.hf.dry_run import evaluating
from rope_mm.hf.image_grids import takes_images
from rope_mm.hf.packing.examples import Example
from rope_mm.hf.packing.leaks import TYPES, is_flash
from rope_mm.hf.packing.rows import Placer, pack_examples, text_model

LOG = logging.getLogger(__name__)


class Isolation(NamedTuple):
    """What keeps the documents of a row apart, besides token positions.

    Attributes:
        masked: whether the batch must bring its mask.
        typed: whether examples must have token_type_ids, of which the model makes its mask.
    """

    masked: bool = False
    typed: bool = False


@torch.no_grad()
def find_isolation(model: nn.Module, placer: Placer) -> Isolation:
    """What a model needs to keep documents apart, by small forwards.

    Raises:
        ValueError: a model that does not keep them apart by any of it.
    """
    base, found = text_model(model), []
    for typed in (False, True) if TYPES[0] in placer.known else (False,):
        examples = [probe_example(base.config, begin, n, typed) for begin, n in ((0, 7), (7, 5))]
        try:
            alone = torch.cat([run(base, pack_examples([x], placer, 7, 0, False)) for x in examples], 1)
        except Exception as error:  # on another device than its kernels, in shards, without weights
            LOG.warning(
                "%s could not run the small forward that proves that it keeps documents apart (%s: %s); "
                "packed_equals_alone proves it where it runs",
                *(type(base).__name__, type(error).__name__, error),
            )
            return Isolation()
        for masked in (False, True)[: 1 if is_flash(base.config) else 2]:
            try:
                packed = run(base, pack_examples(examples, placer, 12, 0, masked))
            except Exception as error:  # a mask of a form that the model does not take
                found.append(f"{type(error).__name__}: {error}")
                continue
            far = (packed - alone).abs().max().item() / alone.abs().max().item()
            if far <= tolerance(alone):
                return Isolation(masked, typed)
            found.append(f"outputs differ from those of each alone by {far:.1e} of their size")
    raise ValueError(
        f"{type(base).__name__} by {base.config.get_text_config()._attn_implementation} does not keep packed "
        f"documents apart: in a small forward {found[0]}. Layers "
        "that carry a state (Mamba, linear attention), two-way attention and offsets are not served; pad "
        "its examples instead, or try attn_implementation='sdpa'"
    )


@torch.no_grad()
def mixes_images(model: nn.Module, placer: Placer, masked: bool) -> bool:
    """Whether the mask that a model makes of images mixes documents, by a small forward.

    Masks are made of token types, so text with the types of an image shows it without pixels.

    Args:
        model: that keeps documents of text apart.
        placer: of the model.
        masked: whether it does so by a mask that comes with the batch.
    """
    base = text_model(model)
    names = [name for name in TYPES if name in placer.known]
    if not names or not takes_images(base):
        return False
    examples = []
    for begin, n, (first, stop) in ((0, 7, (2, 5)), (7, 6, (3, 6))):
        text = probe_example(base.config, begin, n)
        types = torch.zeros(n, dtype=torch.long)
        types[first:stop] = 1
        examples.append(Example(text.tokens | dict.fromkeys(names, types), {}, text.kinds))
    try:
        alone = torch.cat([run(base, pack_examples([x], placer, 7, 0, False)) for x in examples], 1)
    except Exception:  # a model that counts its images by the types
        return False
    try:
        packed = run(base, pack_examples(examples, placer, 13, 0, masked))
    except ValueError:  # refused by the hooks of `set_rope`
        return True
    return (packed - alone).abs().max().item() > tolerance(alone) * alone.abs().max().item()


def tolerance(outputs: Tensor) -> float:
    """The largest difference, as a part of the largest output, that rounding makes."""
    return max(1e-4, 8 * torch.finfo(outputs.dtype).eps)


def probe_example(config: Any, begin: int, n: int, typed: bool = False) -> Example:
    """n tokens of text that are no special ones of a config, with or without their types."""
    text = config.get_text_config()
    special = special_tokens(config)
    ids = [token for token in range(text.vocab_size) if token not in special][begin : begin + n]
    tokens = torch.tensor(ids)
    types = {TYPES[0]: torch.zeros_like(tokens)} if typed else {}
    return Example({"input_ids": tokens, "labels": tokens, **types}, {}, torch.zeros_like(tokens))


def special_tokens(config: Any) -> set[int]:
    """The tokens that a config or its text's names, as of images."""
    parts = (config, config.get_text_config())
    fields = [
        field
        for part in parts
        for field in vars(part).items()
        if field[0].endswith(("token_id", "token_index"))
    ]
    return {value for _, value in fields if isinstance(value, int)}


def run(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The logits (b, s, n) of a batch, or the last states of a model without a head."""
    return forward(model, {name: x for name, x in batch.items() if name != "labels"}, False)[0]


def forward(model: Any, batch: Mapping[str, Any], in_trainer: bool) -> Any:
    """What a model answers to a batch, without dropout; the model is left as it was.

    Args:
        model: of transformers.
        batch: the arguments of its forward.
        in_trainer: whether the cache is off in its outer config, and only there.
    """
    deltas = [(part, part.rope_deltas) for part in model.modules() if hasattr(part, "rope_deltas")]
    moved = {name: to_device(x, model.device) for name, x in batch.items()}
    try:
        with torch.no_grad(), evaluating(model), without_outer_cache(model.config, in_trainer):
            return model(**moved)
    finally:
        for part, delta in deltas:
            part.rope_deltas = delta


@contextmanager
def without_outer_cache(config: Any, off: bool) -> Iterator[None]:
    """The cache off in this config, not in those within it."""
    before = vars(config).get("use_cache")
    if off:
        config.use_cache = False
    try:
        yield
    finally:
        if off and before is None:
            del config.use_cache
        elif off:
            config.use_cache = before


def to_device(x: Any, device: torch.device) -> Any:
    """A value of a batch on a device."""
    if isinstance(x, dict):
        return {name: to_device(one, device) for name, one in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x
