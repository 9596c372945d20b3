"""Attention backends of transformers that the models here train with."""

import torch

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.registry import Registry

NOT_ON_CPU = "cpu", "mps"

# name -> the devices on which it has no backward
ATTENTIONS: Registry[tuple[str, ...]] = Registry(
    "attention",
    {
        "sdpa": (),
        "eager": (),
        "flex_attention": NOT_ON_CPU,
        "flash_attention_2": NOT_ON_CPU,
        "flash_attention_3": NOT_ON_CPU,
    },
)


def with_attention(config: RopeMMConfig, attention: str, device: torch.device) -> RopeMMConfig:
    """The config of models that train on a device with a backend of ATTENTIONS.

    Args:
        config: is changed and returned.
        attention: a key of ATTENTIONS.
        device: of the training.

    Raises:
        ValueError: an unknown backend, or one that has no backward there.
    """
    if device.type in ATTENTIONS[attention]:
        raise ValueError(f"attention {attention} has no backward on {device.type}; take sdpa or eager")
    config._attn_implementation = attention
    return config
