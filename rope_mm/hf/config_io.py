"""A scheme in `config.rope_parameters`: saved with the model, and read again."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm.schemes.scheme import Scheme

NAME, ATTENTION_FIELD = "rope_mm", "_attn_implementation_internal"
PENDING_MESSAGE = (
    "this model was saved with a scheme; call rope_mm.hf.set_rope(model) first, of a part of a model with "
    "that part"
)


class PendingScheme:
    """The factor of cosine and sine until `set_rope(model)`; no tensor can be multiplied by it."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any):
        raise ValueError(PENDING_MESSAGE)


def pending_frequencies(
    config: Any, *_: Any, layer_type: str | None = None, **__: Any
) -> tuple[Tensor, PendingScheme]:
    """What transformers gets for a saved scheme: as many frequencies as it has, and a factor that refuses."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get(layer_type, config.rope_parameters)
    pairs = int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return torch.linspace(1, 0.1, pairs), PendingScheme()


def mark_pending(*_: Any, **__: Any) -> None:
    """The attention of a model that waits for its saved scheme."""
    raise ValueError(PENDING_MESSAGE)


class Running(str):
    """The attention of a config whose model runs its scheme; a copy of the config alone waits again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self if any(isinstance(copied, nn.Module) for copied in memo.values()) else str(self)


def holds_scheme(config: Any) -> bool:
    """Whether a config holds a scheme, for all layers or by their types."""
    rope = getattr(config, "rope_parameters", None) or {}
    return any(NAME in entry for entry in (rope, *rope.values()) if isinstance(entry, dict))


def is_pending(config: Any) -> bool:
    """Whether a config holds a scheme that `rope_type` does not name and its model does not run yet."""
    rope = getattr(config, "rope_parameters", None) or {}
    silent = NAME in rope and rope.get("rope_type") != NAME
    return silent and not isinstance(vars(config).get("attn_implementation"), Running)


def waits_for_scheme(module: Any, config: Any) -> bool:
    """Whether a rotary module, or a model of this config, still waits for the scheme it was saved with."""
    return is_pending(config) or PendingScheme in map(type, vars(module).values())


def get_attention(config: Any) -> Any:
    """The attention of a config; while it waits, the one that refuses, whatever was asked for."""
    return NAME if is_pending(config) else vars(config).get(ATTENTION_FIELD)


def set_attention(config: Any, name: Any) -> None:
    """Set the attention of a config; one that waits keeps what was asked for."""
    if name != NAME or not is_pending(config):
        vars(config)[ATTENTION_FIELD] = name


ROPE_INIT_FUNCTIONS[NAME] = pending_frequencies  # pyright: ignore[reportArgumentType]
ALL_ATTENTION_FUNCTIONS.register(NAME, mark_pending)
setattr(PreTrainedConfig, ATTENTION_FIELD, property(get_attention, set_attention))


def scheme_entries(config: Any, schemes: dict[str | None, Scheme], by_rope: bool) -> dict[str, Any]:
    """The fields of a config that holds schemes by layer type; models loaded from it wait for `set_rope`.

    Where `rope_type` cannot make them wait, for towers know one and others none, their attention does.
    """
    old: Any = getattr(config, "rope_parameters", None) or {}
    kind = {"rope_type": NAME} if by_rope else {}
    new = {
        layer: {**(old.get(layer) if layer else old), **kind, NAME: scheme.to_dict()}
        for layer, scheme in schemes.items()
    }
    rope = {"rope_parameters": new.get(None) or {**old, **new}}
    return rope if by_rope else {**rope, "attn_implementation": Running(NAME)}


def activate(model: Any) -> None:
    """Give a model that waited the attention that was asked for, or else its default."""
    asked = vars(model.config).get(ATTENTION_FIELD)
    model.set_attn_implementation(
        model._check_and_adjust_attn_implementation(asked if asked != NAME else None)
    )


def read(config: Any, layer: str | None) -> Scheme:
    """The scheme that a config holds for layers of this type."""
    rope = getattr(config, "rope_parameters", None) or {}
    entry = (rope.get(layer) or {}) if layer else rope
    if NAME not in entry:
        raise ValueError(
            f"{type(config).__name__} holds no scheme of ours; give set_rope one, or load a model that was "
            "saved after set_rope"
        )
    return Scheme.from_dict(entry[NAME])


def load_learned_omega(learned: Tensor, folder: str, name: str, end: str) -> None:
    """Read a learned Omega from the weights that were saved with a config.

    Args:
        learned: the parameter to fill, (a, r) or (h, a, r).
        folder: where the model was saved.
        name: the weight's full name, taken where it is there.
        end: the end of its name, for parts that were saved alone.

    Raises:
        ValueError: no such weight, or several.
    """
    found: dict[str, Tensor] = {}
    for path in Path(folder).glob("*.safetensors") if folder else ():
        with safe_open(path, "pt") as weights:
            keys = [key for key in weights.keys() if f".{key}".endswith(f".{end}")]  # noqa: SIM118
            found |= {key: weights.get_tensor(key) for key in keys}
    found = {name: found[name]} if name in found else found
    if [omega.shape for omega in found.values()] != [learned.shape]:
        held = {key: tuple(omega.shape) for key, omega in found.items()} or "none"
        raise ValueError(
            f"the saved Omega was learned, but no *.safetensors in {folder!r} hold one of the shape "
            f"{tuple(learned.shape)} for {name!r}: {held}; set name_or_path of the model, or of the part "
            "that set_rope is given, to the folder where it, and no other part, was saved"
        )
    learned.data.copy_(next(iter(found.values())))
