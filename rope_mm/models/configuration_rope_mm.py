"""The model's config: what its weights need, in Hugging Face's names."""

import json
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rope_mm.models.tokenizers import IMAGE_TOKEN
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme

VIDEO_ATTENTIONS = "causal", "full"
IGNORED_KEYS = ("rope_type",)  # transformers writes it into every rope_parameters


@strict
class RopeMMConfig(PreTrainedConfig):
    """Sizes of a small multimodal transformer and its rotary scheme; fields not listed are transformers'.

    Attributes:
        head_dim: channels of a head; 0 for hidden_size / num_attention_heads.
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch; the last or only frame is repeated where they do not divide.
        video_attention: "causal", a frame sees those before it and videos are generated frame by frame; or
            "full", all frames see each other and a video is generated in one pass.
        num_channels: channels of an image.
        bounded_patches: whether patches end in tanh, for pixels in (-1, 1).
        patch_initializer_range: standard deviation of the patch embedding's initial weights; 0 for
            initializer_range. At 0.2 / sqrt(p), patches of p numbers are embedded as large as those of 2 x 2.
        image_token_id: the token that stands where a patch is.
        rope_parameters: `{"scheme": "rope-tv"}`, the name of a scheme, with any of its fields to change, such
            as `"extensions": [{"rope_type": "yarn", "factor": 4.0, "original_max_positions": 512}]`; or a
            Scheme, whose fields are then written out. `theta` is kept under transformers' name, rope_theta.
    """

    model_type = "rope_mm"
    ignore_keys_at_rope_validation = {"scheme", *(field.name for field in fields(Scheme))}

    vocab_size: int = 260
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0
    patch_size: int = 2
    temporal_patch_size: int = 1
    video_attention: str = "causal"
    num_channels: int = 1
    bounded_patches: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.1
    patch_initializer_range: float = 0.0
    tie_word_embeddings: bool = True
    image_token_id: int = 259
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_parameters: dict[str, Any] | Scheme | None = None

    def __post_init__(self, **kwargs: Any):
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError("num_attention_heads and num_key_value_heads must be at least 1")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_parameters = write_rope(self.rope_parameters or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that do not fit together.

        Raises:
            ValueError: with the two numbers.
        """
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers patch_size num_channels head_dim"
        for name in (*sizes.split(), "temporal_patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.video_attention not in VIDEO_ATTENTIONS:
            raise ValueError(
                f"video_attention must be one of {', '.join(VIDEO_ATTENTIONS)}, not {self.video_attention!r}"
            )
        self.scheme.omega(self.head_dim)

    @property
    def scheme(self) -> Scheme:
        """The rotary scheme that `rope_parameters` name; it is parsed once for the same values."""
        rope = self.rope_parameters or {}
        try:
            return parse_rope(json.dumps(rope))
        except TypeError:  # assigned after the config was made: a Scheme, or extensions that are no dicts
            return read_rope(write_rope(rope))

    @property
    def patch_width(self) -> int:
        """Numbers in one patch."""
        return self.temporal_patch_size * self.num_channels * self.patch_size**2


def write_rope(rope_parameters: dict[str, Any] | Scheme) -> dict[str, Any]:
    """`rope_parameters` as JSON holds them: a scheme's name, or its fields, and transformers' rope_theta.

    Raises:
        ValueError: an unknown scheme or field, a rope_type beside the scheme.
    """
    rope = rope_parameters.to_dict() if isinstance(rope_parameters, Scheme) else dict(rope_parameters)
    if isinstance(rope.get("scheme"), Scheme):
        rope = rope.pop("scheme").to_dict() | rope
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type {rope['rope_type']!r} stands beside the scheme; write it into its extensions, "
            '"extensions": [{"rope_type": ..., "factor": ...}]'
        )
    if "layout" not in rope:
        rope.setdefault("scheme", "rope-tv")
    if "theta" in rope:
        rope["rope_theta"] = rope.pop("theta")
    scheme = read_rope(rope)
    if "extensions" in rope:
        rope["extensions"] = scheme.to_dict().get("extensions", [])
    return {"rope_theta": scheme.theta, **rope}


@lru_cache(maxsize=64)
def parse_rope(text: str) -> Scheme:
    """The scheme of `rope_parameters` in JSON."""
    return read_rope(write_rope(json.loads(text)))


def read_rope(rope_parameters: dict[str, Any]) -> Scheme:
    """The scheme that `rope_parameters` name or write out, with its fields changed as they say."""
    names = {"rope_theta": "theta"}
    changes = {
        names.get(key, key): value for key, value in rope_parameters.items() if key not in IGNORED_KEYS
    }
    named = changes.pop("scheme", None)
    return read_scheme(named, **changes) if named else Scheme.from_dict(changes)


def read_config(**settings: Any) -> RopeMMConfig:
    """A config from settings, each of which must be one of its own fields.

    Raises:
        ValueError: a setting it does not have (transformers would keep it in silence).
    """
    own, inherited = ({field.name for field in fields(kind)} for kind in (RopeMMConfig, PreTrainedConfig))
    if unknown := sorted(set(settings) - own):
        near = get_close_matches(unknown[0], own - inherited, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        listing = "`help(rope_mm.models.RopeMMConfig)` lists them"
        raise ValueError(f"the model has no field {unknown[0]!r}; {hint}{listing}")
    try:
        return RopeMMConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"model: {error.__cause__ or error}".replace("\n", " ")) from error


def config_for(
    tokenizer: PreTrainedTokenizerBase, channels: int, rope: Mapping[str, Any], model: Mapping[str, Any]
) -> RopeMMConfig:
    """The config of a training script: its data's tokenizer and channels, its rope, and fields of the model.

    Args:
        tokenizer: gives the vocabulary and special tokens.
        channels: of images.
        rope: fields of rope_parameters.
        model: other fields of the config.

    Raises:
        ValueError: as `read_config`, and fields that have a key of their own.
    """
    if "num_channels" in model or "rope_parameters" in model:
        raise ValueError("model.num_channels is data.channels, and model.rope_parameters are rope: set those")
    return read_config(
        **model,
        num_channels=channels,
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters=dict(rope),
    )
