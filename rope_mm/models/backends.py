"""Attention backends of transformers that models here train with."""

from typing import NamedTuple

import torch

from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.registry import Registry


class Backend(NamedTuple):
    """Whether it heeds a mask of any form, and the devices on which torch has no backward of it."""

    masked: bool = True
    backwardless: tuple[str, ...] = ()


ATTENTIONS = Registry(
    "attention",
    {
        "sdpa": Backend(),
        "eager": Backend(),
        "flex_attention": Backend(backwardless=("cpu", "mps")),
        "flash_attention_2": Backend(masked=False),
    },
)


def with_attention(config: RopeMMConfig, attention: str, device: torch.device) -> RopeMMConfig:
    """The config, whose models are to train on a device with a backend of ATTENTIONS.

    Raises:
        ValueError: an unknown backend, and one that cannot train there or on pictures and packed documents.
    """
    backend = ATTENTIONS[attention]
    if not backend.masked:
        raise ValueError(
            f"attention {attention} takes no mask, by which patches see each other and packed documents do "
            "not; take sdpa, eager or flex_attention"
        )
    if device.type in backend.backwardless:
        raise ValueError(f"attention {attention} has no backward on {device.type}; take sdpa or eager")
    config._attn_implementation = attention
    return config
