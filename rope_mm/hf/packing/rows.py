"""Examples of text, images and videos in rows: the arguments of one forward."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from rope_mm.checks.arguments import parameters_of, spelling
from rope_mm.hf.image_grids import PACES
from rope_mm.hf.packing.examples import IGNORED, Example
from rope_mm.hf.packing.leaks import VARLEN, is_flash
from rope_mm.hf.position_ids import place_inputs
from rope_mm.hf.rotary_embedding import scheme_of
from rope_mm.positions.packing import first_fit
from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme

# what says how much of a padded image is real; such images may be padded to one size
SIZED = ("image_sizes", "pixel_attention_mask")


@dataclass(frozen=True)
class Placer:
    """Places one example as its model places it alone; it holds no weights.

    Attributes:
        config: the model's.
        known: the arguments of the model's forward.
        device: where the positions go.
        scheme: by which `set_rope` lets the model place tokens; None for the model's own rule.
        part: has the model's own get_rope_index; None where it counts tokens.
    """

    config: Any
    known: tuple[str, ...]
    device: str
    scheme: Scheme | None = None
    part: Any = None

    def place(self, example: Example) -> Tensor:
        """Token positions and the position on each axis (1 + a, s); token positions alone (1, s) of text.

        Raises:
            ValueError: image tokens that do not match their grids, or a method that needs other arguments.
        """
        numbers = torch.arange(len(example))[None]
        ids, given = example.tokens["input_ids"][None], dict(example.media)
        given["mm_token_type_ids"] = example.kinds[None]
        if self.scheme is not None:
            placed = place_inputs(self.config, self.scheme, ids, None, None, **given)
            return torch.cat((numbers.to(placed.positions), placed.positions[0].T))
        if self.part is None:
            return numbers
        method = type(self.part).get_rope_index
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        names = inspect.signature(method).parameters
        try:
            placed = method(self.part, **{name: x for name, x in given.items() if name in names})[0]
        except (TypeError, StopIteration) as error:
            raise ValueError(
                f"get_rope_index of {type(self.part).__name__} cannot place an example: {error}"
            ) from error
        return torch.cat((numbers.to(placed), placed[:, 0]))


def make_placer(model: nn.Module) -> Placer:
    """The placer of a model, whatever stands around it (peft, DDP)."""
    base = text_model(model)
    try:
        scheme = scheme_of(base)
    except ValueError:  # its own rope
        scheme = None
    owner = next((part for part in base.modules() if hasattr(type(part), "get_rope_index")), None)
    part = without_weights(owner) if owner is not None and scheme is None else None
    return Placer(base.config, parameters_of(type(base)), str(base.device), scheme, part)


def text_model(model: nn.Module) -> Any:
    """The outermost model of transformers.

    Raises:
        ValueError: a model without one, or one that takes no position_ids.
    """
    base = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if base is None or "position_ids" not in parameters_of(type(base)):
        name = type(model if base is None else base).__name__
        raise ValueError(f"{name} takes no position_ids, so its documents cannot be packed; pad them instead")
    return base


def without_weights(module: nn.Module) -> Any:
    """A module of the same class with the plain attributes alone, to call a method that reads no weights."""
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    for name, value in vars(module).items():
        if not (name.startswith("_") or isinstance(value, Tensor) or callable(value)):
            copy.__dict__[name] = value
    return copy


def pack_examples(
    examples: Sequence[Example], placer: Placer, max_length: int, pad_id: int, masked: bool
) -> dict[str, Any]:
    """The arguments of a forward of examples in rows.

    Args:
        examples: none longer than a row.
        placer: of the model.
        max_length: tokens of a row; flash-attention gets one row of all examples.
        pad_id: the token that fills rows.
        masked: whether the batch brings its mask, for models that make none of token positions.
    """
    flash = is_flash(placer.config)
    numbers = first_fit([len(x) for x in examples], max_length)
    rows = (
        [[examples[n] for row in numbers for n in row]]
        if flash
        else [[examples[n] for n in row] for row in numbers]
    )
    batch: dict[str, Any] = pack_tokens(rows, pad_id)
    positions = [torch.cat([placer.place(x) for x in row], 1).T for row in rows]
    ids = pad_sequence(positions, batch_first=True).movedim(-1, 0)
    ids = ids.to(widest_float(placer.device)) if ids.is_floating_point() else ids
    batch["position_ids"] = ids if len(ids) > 1 else ids[0]
    batch["use_cache"] = False
    order = [x for row in rows for x in row]
    for name in dict.fromkeys(name for x in order for name in x.media if name not in PACES):
        batch[name] = join_media(name, [x.media for x in order])
    if flash:
        lengths = torch.tensor([0, *map(len, order)])
        ends, longest = lengths.cumsum(0).int(), int(lengths.max())
        batch |= dict(zip(VARLEN, (ends, ends, longest, longest), strict=True))
    elif masked:
        batch["attention_mask"] = make_mask(placer.config, ids[0].long())
    return batch


def pack_tokens(rows: Sequence[Sequence[Example]], pad_id: int) -> dict[str, Tensor]:
    """What has a value for each token, (b, s) by name; no label at an example's first token."""
    names = dict.fromkeys(name for row in rows for x in row for name in x.tokens)
    fills = {"input_ids": pad_id, "labels": IGNORED}
    packed = {}
    for name in names:
        columns = [torch.cat([x.tokens.get(name, torch.zeros_like(x.kinds)) for x in row]) for row in rows]
        packed[name] = pad_sequence(columns, batch_first=True, padding_value=fills.get(name, 0))
    for number, row in enumerate(rows):
        ends = torch.tensor([0, *map(len, row)]).cumsum(0)
        packed["labels"][number, ends[:-1]] = IGNORED
    return packed


def join_media(name: str, given: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Pixels or grids of examples one after another.

    Raises:
        ValueError: pixels of several sizes, of a model that is not given the sizes.
    """
    parts = [media[name] for media in given if name in media]
    sizes = {part.shape[1:] for part in parts}
    if len(sizes) > 1:
        sized = all(any(key in media for key in SIZED) for media in given if name in media)
        if len({len(size) for size in sizes}) > 1 or not (sized or parts[0].dim() == 5):
            shapes = ", ".join(str(tuple(x.shape)) for x in parts)
            raise ValueError(
                f"{name} of these examples are of the shapes {shapes}, "
                "which do not stand in one tensor; let the processor make images of one size"
            )
        most = [max(axis) for axis in zip(*sizes, strict=True)]
        parts = [
            pad(x, [n for axis in range(x.dim() - 1, 0, -1) for n in (0, most[axis - 1] - x.shape[axis])])
            for x in parts
        ]
    return torch.cat(parts)


def make_mask(config: Any, numbers: Tensor) -> Any:
    """The mask that transformers makes of token positions (b, s), for models that do not ask it to."""
    text = config.get_text_config()
    dtype = text.dtype or torch.get_default_dtype()
    given = {"config": text, "attention_mask": None, "position_ids": numbers}
    given["inputs_embeds"] = torch.empty(*numbers.shape, 1, dtype=dtype)
    given[spelling(create_masks_for_generate, "cache") or "cache"] = None
    return create_masks_for_generate(**given)
