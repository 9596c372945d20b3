"""A scheme in `config.rope_parameters`, so that it is saved with the model, and read again."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rope_mm.scheme import Scheme

NAME = "rope_mm"


class NotSetYet:
    """Stands for the factor of cosine and sine until `set_rope(model)`; no tensor can be multiplied by it."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any):
        raise ValueError("this model was saved with a scheme; call rope_mm.hf.set_rope(model) first")


def not_yet(config: Any, *_: Any, layer_type: str | None = None, **__: Any) -> tuple[Tensor, NotSetYet]:
    """What transformers is told of a saved scheme: so many frequencies, and a factor that refuses."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get(layer_type, config.rope_parameters)
    pairs = int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return torch.linspace(1, 0.1, pairs), NotSetYet()


ROPE_INIT_FUNCTIONS[NAME] = not_yet  # pyright: ignore[reportArgumentType]


def write(config: Any, schemes: dict[str | None, Scheme], refusing: bool) -> None:
    """Enter schemes, one for each type of layer, in a config; refusing, its models wait for `set_rope`."""
    old: Any = getattr(config, "rope_parameters", None) or {}
    kind = {"rope_type": NAME} if refusing else {}  # towers know one rope_type and could not be loaded
    new = {
        layer: {**(old.get(layer) if layer else old), **kind, NAME: scheme.to_dict()}
        for layer, scheme in schemes.items()
    }
    config.rope_parameters = new.get(None) or {**old, **new}


def read(config: Any, layer: str | None) -> Scheme:
    """The scheme that a config was given for layers of this type."""
    rope = getattr(config, "rope_parameters", None) or {}
    entries = (rope.get(layer) or {}) if layer else rope
    if NAME not in entries:
        raise ValueError(
            f"{type(config).__name__} holds no scheme of ours; give set_rope one, or load a model that was "
            "saved after set_rope"
        )
    return Scheme.from_dict(entries[NAME])


def fill_learned(learned: Tensor, folder: str, key: str) -> None:
    """Read a learned Omega from the weights beside a config."""
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with safe_open(path, "pt") as weights:
            for name in filter(lambda name: name.endswith(key), weights.keys()):
                learned.data.copy_(weights.get_tensor(name))
                return
    raise ValueError(
        f"the saved Omega was learned, but no *.safetensors in {folder!r} holds {key!r}; load the model from "
        "the folder where it was saved"
    )
