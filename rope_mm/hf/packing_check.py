"""Whether packed examples give the logits and the loss of each alone, for any collator."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.packed_rows import VARLEN, is_flash
from rope_mm.hf.row_packing import Placer, make_placer, pack_examples, text_model
from rope_mm.hf.training_examples import IGNORED, Example, encode_example

LOG = logging.getLogger(__name__)


@torch.no_grad()
def needs_mask(model: nn.Module, placer: Placer) -> bool:
    """Whether a model keeps documents apart only by a mask that comes with the batch, by a small forward.

    Raises:
        ValueError: a model that does not keep them apart by either.
    """
    base = text_model(model)
    examples = [probe_example(base.config, begin, n) for begin, n in ((0, 7), (7, 5))]
    try:
        alone = torch.cat([run(base, pack_examples([x], placer, 7, 0, False)) for x in examples], 1)
    except Exception as error:  # on another device than its kernels, in shards, without weights
        LOG.warning(
            "%s could not run the small forward that proves that it keeps documents apart (%s: %s); "
            "packed_equals_alone proves it where it runs",
            *(type(base).__name__, type(error).__name__, error),
        )
        return False
    found: Any = []
    for masked in (False, True)[: 1 if is_flash(base.config) else 2]:
        try:
            packed = run(base, pack_examples(examples, placer, 12, 0, masked))
        except Exception as error:  # a mask of a form that the model does not take
            found.append(f"{type(error).__name__}: {error}")
            continue
        found.append((packed - alone).abs().max().item() / alone.abs().max().item())
        if found[-1] <= tolerance(alone):
            return masked
    wrong = f"{found[0]:.1e} of their size" if isinstance(found[0], float) else found[0]
    raise ValueError(
        f"{type(base).__name__} by {base.config.get_text_config()._attn_implementation} does not keep packed "
        f"documents apart: in a small forward outputs differ from those of each alone by {wrong}. Layers "
        "that carry a state (Mamba, linear attention), two-way attention and offsets are not served; pad "
        "its examples instead, or try attn_implementation='sdpa'"
    )


def tolerance(outputs: Tensor) -> float:
    """The largest difference, as a part of the largest output, that rounding makes."""
    return max(1e-4, 8 * torch.finfo(outputs.dtype).eps)


def probe_example(config: Any, begin: int, n: int) -> Example:
    """n tokens of text that are no special ones of a config."""
    text = config.get_text_config()
    special = {
        x
        for part in (config, text)
        for name, x in vars(part).items()
        if re_token(name) and isinstance(x, int)
    }
    ids = [token for token in range(text.vocab_size) if token not in special][begin : begin + n]
    tokens = torch.tensor(ids)
    return Example({"input_ids": tokens, "labels": tokens}, {}, torch.zeros_like(tokens))


def re_token(name: str) -> bool:
    """Whether a config's field names a token."""
    return name.endswith(("token_id", "token_index"))


def run(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The logits (b, s, n) of a batch, or the last states of a model without a head; dropout is off."""
    modes = [(module, module.training) for module in model.modules()]
    deltas = [(part, part.rope_deltas) for part in model.modules() if hasattr(part, "rope_deltas")]
    device = model.device
    moved = {name: to_device(x, device) for name, x in batch.items() if name != "labels"}
    try:
        model.eval()
        with torch.no_grad():
            return model(**moved)[0]
    finally:
        for module, mode in modes:
            module.training = mode
        for part, delta in deltas:
            part.rope_deltas = delta


def to_device(x: Any, device: torch.device) -> Any:
    """A value of a batch on a device."""
    if isinstance(x, dict):
        return {name: to_device(one, device) for name, one in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x
