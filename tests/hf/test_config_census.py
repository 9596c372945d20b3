"""How many model types of transformers have a scheme that is read from their default config, and why not."""

import importlib
import inspect

import pytest
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rope_mm import from_hf_config
from rope_mm.hf.rope_parameters import FAMILIES, text_config

UNKNOWN_CALL, NO_FAMILY = "takes positions and gives tables in no known way", "is that of no known family"
UNEVEN, NO_MODULE, NO_HEAD = (
    "must sum to the 64 rotated pairs",
    "no rotary module can be made",
    "has no head_dim",
)
REASONS = {
    **dict.fromkeys(("efficientloftr", "glm4v_moe", "glm4v_moe_text", "glm_image"), UNKNOWN_CALL),
    **dict.fromkeys(("glm_image_text", "hunyuan_vl", "hunyuan_vl_text"), UNKNOWN_CALL),
    **dict.fromkeys(("eomt_dinov3", "qwen3_omni_moe", "qwen3_omni_moe_text"), NO_FAMILY),
    **dict.fromkeys(("qwen3_omni_moe_thinker", "qwen4_exp", "qwen4_exp_text"), NO_FAMILY),
    **dict.fromkeys(("glm4v", "glm4v_text"), UNEVEN),
    **dict.fromkeys(("edgetam_video", "sam2_video", "sam3_tracker_video"), NO_HEAD),
    **dict.fromkeys(("blt", "deepseek_ocr2_encoder"), NO_MODULE),
    "glm4_moe": "21 of 42 channels are rotated, which makes no whole pairs",
    "neomme": "is not homogeneous across layers",
}


def has_rotary(config):
    """Whether a config carries rope_parameters, and a rotary module stands beside its class."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        beside = vars(importlib.import_module(name)).values()
    except ImportError:
        return False
    kinds = (x for x in beside if inspect.isclass(x) and issubclass(x, nn.Module) and x.__module__ == name)
    rotary = any("Rotary" in x.__name__ or "RoPE" in x.__name__ for x in kinds)
    return rotary and bool(getattr(text_config(config), "rope_parameters", None))


def layer_types(config):
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    layers, used = [layer for layer, x in rope.items() if isinstance(x, dict)], text_config(config)
    used = set(getattr(used, "layer_types", None) or ())
    return [layer for layer in layers if layer in used] or layers or [None]


@pytest.mark.slow
def test_schemes_of_most_model_types_are_read_and_every_refusal_has_a_known_reason():
    read, refused = [], {}
    for model_type in sorted(CONFIG_MAPPING):
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # a config that has no default
            continue
        if model_type not in FAMILIES and not has_rotary(config):
            continue
        try:
            schemes = [from_hf_config(config, layer) for layer in layer_types(config)]
        except ValueError as error:
            refused[model_type] = str(error)
        else:
            read.append((model_type, schemes))
    assert len(read) >= 260, sorted(refused)
    assert all(len(reason) > 20 for reason in refused.values())
    assert set(refused) <= set(REASONS), {name: refused[name] for name in set(refused) - set(REASONS)}
    for name, reason in refused.items():
        assert REASONS[name] in reason, (name, reason)
