"""A model and its optimiser on their devices, in a precision that whoever calls the model chooses."""

from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rope_mm.registry import Registry


def prepare_model(
    model: nn.Module,
    accelerator: Accelerator,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    compile: str = "",
    checkpointing: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, wrapped where there are several processes, and AdamW of its weights; see `precision`.

    `compile` is a backend of torch.compile, such as "inductor", or "" for none; with `checkpointing`, blocks
    are computed anew in the backward instead of kept.

    Raises:
        ValueError: mixed precision fp16, a backend that torch does not know.
    """
    if compile:
        Registry("backend of torch.compile", dict.fromkeys(torch.compiler.list_backends(())))[compile]
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 overflows in a gradient penalty; take mixed precision bf16, or no")
    if checkpointing:
        old = "gradient_checkpointing_enable"  # its name in earlier versions of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
        enable({"use_reentrant": False})  # the other kind allows no penalty
    adam = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay)
    wrapped, adam = accelerator.prepare(model, adam)
    for name in ("forward", "_original_forward"):  # accelerate's autocast, which penalties could not leave
        vars(model).pop(name, None)
    if compile:
        model.compile(backend=compile)
    return wrapped, adam


def precision(accelerator: Accelerator, full: bool = False) -> AbstractContextManager:
    """Context of a forward: what accelerate was told, or float32 in full."""
    if full:
        return torch.autocast(accelerator.device.type, enabled=False)
    return accelerator.autocast()


def sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds but a part of the weights."""
    return accelerator.distributed_type == DistributedType.FSDP
