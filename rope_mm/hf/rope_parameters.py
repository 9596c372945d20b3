"""Schemes from the configs of transformers, and back into their `rope_parameters`.

A config has numbers: theta, the rotated fraction, an extension, sections. Which channels pair, which axis
owns which pairs and where tokens stand follows from its `model_type`, by FAMILIES. transformers is not
imported: any object with the attributes will do.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from rope_mm.registry import Registry
from rope_mm.schemes.extensions import EXTENSIONS, Extension, Linear
from rope_mm.schemes.frequencies import apportion
from rope_mm.schemes.scheme import Scheme, floor_int, read_extension
from rope_mm.schemes.zoo import SCHEMES

HALF, INTERLEAVED = SCHEMES["flat"], SCHEMES["flat"].replace(pairing="interleaved")
QWEN2_VL = SCHEMES["m-rope-qwen2-vl"].replace(axis_shares=(16, 24, 24))
QWEN2_5_VL = SCHEMES["m-rope-qwen2.5-vl"].replace(axis_shares=(16, 24, 24), options=(("rate", 2.0),))
QWEN3_VL = SCHEMES["m-rope-qwen3-vl"].replace(axis_shares=(24, 20, 20))
GLM4V = SCHEMES["m-rope-glm-4.1v"].replace(axis_shares=(8, 12, 12), fraction=1.0)
TOWER = SCHEMES["qwen2-vl-vision"]

BASES = {
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text gemma3n_text "
    "gemma4_text phi phi3 gpt_neox stablelm persimmon nemotron falcon starcoder2 granite smollm3 olmo "
    "olmo2 olmo3 olmoe exaone4 glm4_moe gpt_oss": HALF,
    "gptj glm glm4 cohere cohere2 ernie4_5 llama4_text": INTERLEAVED,
    "deepseek_v2 deepseek_v3": SCHEMES["deepseek-mla"],
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_5_VL,
    "qwen2_5_omni_text": SCHEMES["tm-rope"].replace(axis_shares=(16, 24, 24)),
    "qwen3_vl_text qwen3_vl_moe_text": QWEN3_VL,
    "qwen3_5_text qwen3_5_moe_text": SCHEMES["m-rope-qwen3.5"],
    "glm4v_text": GLM4V,
    "ernie4_5_vl_moe_text": SCHEMES["m-rope-ernie-4.5-vl"].replace(axis_shares=(20, 22, 22)),
    "qwen2_vl_vision qwen2_5_vl_vision qwen2_5_omni_vision_encoder qwen3_vl_vision qwen3_vl_moe_vision "
    "qwen3_5_vision qwen3_5_moe_vision glm4v_vision ernie4_5_vl_moe_vision": TOWER,
    "pixtral": SCHEMES["pixtral"],
    "dinov3_vit": SCHEMES["dinov3"],
    "llama4_vision_model": SCHEMES["llama4-vision"],
    "gemma4_vision": SCHEMES["gemma4-vision"],
    "kimi_k25_vision": SCHEMES["kimi-vision"],
    "sam3_vit_model": SCHEMES["sam2"],  # its layers without windows multiply positions by window / grid
}
FAMILIES: Registry[Scheme] = Registry(
    "model_type",
    {model_type: base for names, base in BASES.items() for model_type in names.split()},
    listing="`sorted(rope_mm.hf.rope_parameters.FAMILIES)`",
)

ALIASES = {"su": "longrope", "mrope": "default", "axial": "default"}
ROPE_TYPES = [name for name in EXTENSIONS if name not in ("ntk", "riflex")]  # of transformers
HF_NAMES = {  # our fields in transformers' names
    "original_max_positions": "original_max_position_embeddings",
    "short": "short_factor",
    "long": "long_factor",
}
# the axis of each number of `mrope_section`; t, y, x for the others
SECTIONS = {"yx-then-t": (1, 2, 0)}


def text_config(config: Any) -> Any:
    """The config of the text of a composite one; any other as it is."""
    for part in ("thinker_config", "text_config"):
        if (inner := getattr(config, part, None)) is not None:
            return text_config(inner)
    return config


def read_head_dim(config: Any, layer_type: str | None = None) -> int:
    """Channels of a head, those that are not rotated included; of a composite config, its text's.

    Raises:
        ValueError: a config that has neither head_dim nor sizes to divide.
    """
    config = layer_config(text_config(config), layer_type)
    rope, rest = (getattr(config, f"qk_{part}_head_dim", None) for part in ("rope", "nope"))
    if rope and rest:  # head_dim is the rotated part alone there
        return rope + rest
    width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (width // heads if width and heads else 0)
    if not head_dim:
        raise ValueError(f"{type(config).__name__} has no head_dim, nor hidden_size and num_attention_heads")
    return head_dim


def layer_config(config: Any, layer_type: str | None) -> Any:
    """The config that layers of one type see, where they differ in more than their rotation (Gemma 4)."""
    if getattr(config, "is_heterogeneous", False) and layer_type:
        return config.per_layer_config[layer_type]
    return config


def read_rope(config: Any, layer_type: str | None) -> dict[str, Any]:
    """The one dict of `rope_parameters` that layers of this type follow.

    Raises:
        ValueError: one for each layer type and none of them, or an unknown one, asked for.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = list(getattr(config, "layer_types", None) or ())
    nested = [key for key, value in rope.items() if isinstance(value, Mapping) or key in kinds]
    known = nested or sorted(set(kinds))
    if nested and layer_type is None:
        raise ValueError(f"layers are rotated in different ways; give layer_type, one of {', '.join(known)}")
    if layer_type is not None and layer_type not in known:
        raise ValueError(f"layer_type {layer_type!r} is unknown; there are: {', '.join(known) or 'none'}")
    chosen = rope[layer_type] if nested else rope
    if chosen is None:
        raise ValueError(f"layers of type {layer_type!r} are not rotated")
    return {key: value for key, value in chosen.items() if value is not None}


def from_hf_config(config: Any, layer_type: str | None = None) -> Scheme:
    """The rotary scheme of a model of transformers, read from its config; of a composite one, its text's.

    Layers without any rotation (SmolLM3, Llama 4) are the model's own: the scheme is that of the others.

    Args:
        config: of transformers, or anything with a `model_type` in FAMILIES; a tower's is its
            `vision_config`. Of a model type that is not in FAMILIES its rotary module is made and probed.
        layer_type: which layers, where they differ: "full_attention" or "sliding_attention".

    Raises:
        ValueError: no config; an unknown model_type, rope_type or layer_type; numbers missing;
            sections that do not make up the head.
    """
    rate = getattr(getattr(config, "vision_config", None), "tokens_per_second", None)
    config = text_config(config)
    if not hasattr(config, "model_type"):
        raise ValueError(f"a {type(config).__name__} has no model_type; give a config, such as model.config")
    if config.model_type not in FAMILIES and ".configuration_" in type(config).__module__:
        from rope_mm.hf.infer_scheme import derive_scheme  # the only part that needs transformers

        return derive_scheme(config, layer_type)
    return scheme_of_family(config, FAMILIES[config.model_type], layer_type, rate=rate)


def scheme_of_family(
    config: Any,
    base: Scheme,
    layer_type: str | None,
    rate: float | None = None,
    fraction: float | None = None,
) -> Scheme:
    """The scheme of a config by what its family omits.

    Args:
        config: of one text or one tower.
        base: the family's scheme, whose numbers the config replaces.
        layer_type: which layers, where they differ.
        rate: positions per second of a video; None for the family's.
        fraction: the part of the channels that is rotated; None for the config's.

    Raises:
        ValueError: numbers missing, or sections that do not make up the head.
    """
    rope = read_rope(config, layer_type)
    config, head_dim = layer_config(config, layer_type), read_head_dim(config, layer_type)
    theta = next(filter(None, (rope.get("rope_theta"), getattr(config, "rope_theta", None), base.theta)))
    changes = {
        "theta": float(theta),
        **({"fraction": fraction} if fraction else read_parts(config, rope, head_dim)),
        **family_fields(config, base, rate),
    }
    scheme = base.replace(**changes, extensions=read_rope_type(config, rope))
    return scheme.replace(axis_shares=read_sections(rope, scheme, head_dim))


def read_parts(config: Any, rope: dict[str, Any], head_dim: int) -> dict[str, float]:
    """`fraction`, and `still` where rope_type is "proportional".

    Raises:
        ValueError: an odd number of rotated channels.
    """
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if rope.get("rope_type") == "proportional":
        return {"fraction": 1.0, "unrotated_fraction": 1 - part}
    given = getattr(config, "qk_rope_head_dim", None) or getattr(config, "rotary_dim", None)
    rotated = given or int(head_dim * part)
    if rotated % 2 or not rotated:
        raise ValueError(f"{rotated} of {head_dim} channels are rotated, which makes no whole pairs")
    return {"fraction": rotated / head_dim}


def family_fields(config: Any, base: Scheme, rate: float | None) -> dict[str, Any]:
    """Fields that single families keep elsewhere: a tower's merging, a video's pace, DeepSeek's pairing."""
    options = {"merge": getattr(config, "spatial_merge_size", None), "rate": rate}
    given = tuple((name, options[name] or number) for name, number in base.options if name in options)
    half = getattr(config, "rope_interleave", True) is False
    return {"options": given or base.options, "pairing": "half" if half else base.pairing}


def read_rope_type(config: Any, rope: dict[str, Any]) -> list[Extension]:
    """The extension that `rope_type` names, with its numbers; none for "default".

    Raises:
        ValueError: an unknown rope_type, or a number that it needs and the config lacks.
    """
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    name = ALIASES.get(name, name)
    if name == "proportional":
        return [Linear(factor=rope["factor"])] if rope.get("factor", 1.0) != 1 else []
    if name == "default":
        return []
    if name not in ROPE_TYPES:
        known = ", ".join(["default", "proportional", *ROPE_TYPES])
        raise ValueError(f"transformers has no rope_type {name!r}; it has {known}")
    longest = getattr(config, "max_position_embeddings", None)
    name_of_original = HF_NAMES["original_max_positions"]
    original = getattr(config, name_of_original, None) or rope.get(name_of_original)
    known = {**rope, name_of_original: longest if name == "dynamic" else original or longest}
    if longest and original:
        known.setdefault("factor", longest / original)
    numbers = {f.name: known.get(HF_NAMES.get(f.name, f.name)) for f in fields(EXTENSIONS[name])}
    given = {field: number for field, number in numbers.items() if number is not None}
    return [read_extension({"rope_type": name, **given})]


def read_sections(rope: dict[str, Any], scheme: Scheme, head_dim: int) -> tuple[float, ...] | None:
    """Pairs of each axis in the order of the axes, from `mrope_section` or as the family has them.

    Raises:
        ValueError: sections that do not sum to the pairs, or of an ownership that is not the family's.
    """
    if scheme.axis_shares is None:
        return None
    section, pairs = rope.get("mrope_section"), scheme.pairs(head_dim)
    order = SECTIONS.get(scheme.ownership, (0, 1, 2))
    shares = tuple(section[order.index(axis)] for axis in range(3)) if section else scheme.axis_shares
    if sum(shares) != pairs:
        raise ValueError(
            f"mrope_section {list(section or shares)} must sum to the {pairs} rotated pairs of a head"
        )
    strided = rope.get("mrope_interleaved")
    if strided is not None and strided != (scheme.ownership == "stride3"):
        raise ValueError(f"mrope_interleaved is {strided}, but models of this type own {scheme.ownership!r}")
    return shares


def to_rope_parameters(scheme: Scheme, head_dim: int | None = None) -> dict[str, Any]:
    """The `rope_parameters` with which a model of transformers of the right family rotates by this scheme.

    Pairing, ownership and layout are the family's; `original` of DynamicNTK is its max_position_embeddings.

    Args:
        scheme: the scheme.
        head_dim: channels of a head, needed where axes share the pairs: `mrope_section` counts them.

    Raises:
        ValueError: no Scheme; a field that no family has and rope_parameters cannot express, or
            head_dim missing.
    """
    if not isinstance(scheme, Scheme):
        raise ValueError(f"scheme is a {type(scheme).__name__}; give a Scheme, such as SCHEMES['flat']")
    check_expressible(scheme)
    rope = {"rope_type": "axial" if scheme.ladder != "shared" else "default", "rope_theta": scheme.theta}
    rope |= write_extension(scheme)
    if scheme.unrotated_fraction:
        rope |= {
            "rope_type": "proportional",
            "partial_rotary_factor": write_part(1 - scheme.unrotated_fraction, 2, head_dim),
        }
    elif scheme.fraction != 1 and scheme.channel_offset != "end":  # DeepSeek's is qk_rope_head_dim
        rope["partial_rotary_factor"] = write_part(scheme.fraction, 1, head_dim)
    if scheme.axis_shares is not None:
        if head_dim is None:
            raise ValueError("mrope_section counts the pairs of each axis; give head_dim")
        counts = apportion(scheme.pairs(head_dim), scheme.axis_shares)
        rope["mrope_section"] = [counts[axis] for axis in SECTIONS.get(scheme.ownership, (0, 1, 2))]
    if scheme.ownership == "stride3":
        rope["mrope_interleaved"] = True
    return rope


def write_part(part: float, divisor: int, head_dim: int | None) -> float:
    """A part of the channels that transformers reads back as ours, though it cuts part * channels down.

    Args:
        part: the part that is rotated.
        divisor: transformers cuts part * head_dim / divisor to a whole number.
        head_dim: channels of a head; None checks every even number up to 1,024.

    Raises:
        ValueError: a part for which no number near it reads back.
    """
    rounded = math.ceil(part * 1e9 - 1e-3) / 1e9
    for written in (rounded, rounded + 1e-9):
        heads = [head_dim] if head_dim else range(2, 1025, 2)
        if all(int(written * d // divisor) == floor_int(part * d / divisor) for d in heads):
            return written
    raise ValueError(f"a part of {part} would be read back as another one; give head_dim")


def write_extension(scheme: Scheme) -> dict[str, Any]:
    """rope_type and its numbers, nothing without an extension.

    Raises:
        ValueError: extensions that no rope_type is.
    """
    if not scheme.extensions:
        return {}
    (extension, *more), names = scheme.extensions, {kind: name for name, kind in EXTENSIONS.items()}
    name = names[type(extension)]
    if more or extension.axes or name not in ROPE_TYPES or (scheme.unrotated_fraction and name != "linear"):
        raise ValueError(
            f"rope_parameters cannot express extensions={scheme.extensions} with "
            f"unrotated_fraction={scheme.unrotated_fraction}"
        )
    numbers = {HF_NAMES.get(field, field): value for field, value in asdict(extension).items()}
    own = ("axes", HF_NAMES["original_max_positions"]) if name == "dynamic" else ("axes",)
    lists = {key: list(x) if isinstance(x, tuple) else x for key, x in numbers.items() if key not in own}
    return {"rope_type": name, **{key: x for key, x in lists.items() if x is not None}}


def check_expressible(scheme: Scheme) -> None:
    """Refuse what neither rope_parameters nor any family can express.

    Raises:
        ValueError: with the fields that differ from the nearest family.
    """

    def other_fields(base: Scheme) -> list[str]:
        ours, theirs = without_config_fields(scheme), without_config_fields(base)
        return [f.name for f in fields(Scheme) if getattr(ours, f.name) != getattr(theirs, f.name)]

    if differing := min(map(other_fields, FAMILIES.values()), key=len):
        differing = ", ".join(f"{name}={getattr(scheme, name)!r}" for name in differing)
        raise ValueError(
            f"rope_parameters cannot express {differing}, and no model of transformers has it by itself"
        )


def without_config_fields(scheme: Scheme) -> Scheme:
    """The scheme without the fields that a config holds."""
    options = tuple(option for option in scheme.options if option[0] not in ("merge", "rate"))
    shares = scheme.axis_shares and (1,) * len(scheme.axis_order or scheme.axes)
    return scheme.replace(
        theta=Scheme.theta,
        fraction=1.0,
        unrotated_fraction=0.0,
        extensions=(),
        options=options,
        axis_shares=shares,
    )
