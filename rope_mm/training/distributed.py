"""Several processes: models on their devices, rows gathered with a gradient, one answer of all."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rope_mm.registry import Registry


def prepare_model(
    model: nn.Module,
    accelerator: Accelerator,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    compile: str = "",
    checkpointing: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model on its device, wrapped where there are several processes, and AdamW of its weights.

    Its forward runs in float32; whoever calls it chooses another precision by `precision`.

    Args:
        model: a model of transformers.
        accelerator: devices and processes.
        betas: of AdamW.
        weight_decay: of AdamW.
        compile: a backend of torch.compile, such as "inductor", or "" for none.
        checkpointing: whether blocks are recomputed in the backward pass instead of kept.

    Raises:
        ValueError: mixed precision fp16, a backend that torch does not know.
    """
    if compile:
        Registry("backend of torch.compile", dict.fromkeys(torch.compiler.list_backends(())))[compile]
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 overflows in a gradient penalty; use mixed precision bf16, or no")
    if checkpointing:
        old = "gradient_checkpointing_enable"  # its name in earlier versions of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
        enable({"use_reentrant": False})  # the reentrant kind does not allow a gradient penalty
    adam = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay)
    wrapped, adam = accelerator.prepare(model, adam)
    for name in ("forward", "_original_forward"):  # accelerate's autocast, which penalties could not leave
        vars(model).pop(name, None)
    if compile:
        model.compile(backend=compile)
    return wrapped, adam


def precision(accelerator: Accelerator, full: bool = False) -> AbstractContextManager:
    """Context of a forward: accelerate's mixed precision, or float32 where `full`."""
    if full:
        return torch.autocast(accelerator.device.type, enabled=False)
    return accelerator.autocast()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds only a part of the weights (FSDP)."""
    return accelerator.distributed_type == DistributedType.FSDP


def no_sync_if(accelerator: Accelerator, model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Context in which gradients accumulate in this process and are not yet sent to the others.

    Args:
        accelerator: devices and processes.
        model: whose gradients accumulate.
        wanted: False: gradients are sent as usual.
    """
    return accelerator.no_sync(model) if wanted else nullcontext()


def grad_norm(model: nn.Module) -> Tensor:
    """Length of the gradient of all weights, also where each process holds only a part of them."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes where each holds only a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Gather(torch.autograd.Function):
    """All processes' rows; backwards this process's share, times their number."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.world, ctx.first, ctx.count = (
            accelerator.num_processes,
            accelerator.process_index * len(rows),
            len(rows),
        )
        return accelerator.gather(rows)  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0].narrow(0, ctx.first, ctx.count) * ctx.world, None


def all_gather_with_grad(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Rows (processes * b, ...) of all processes in their order, from rows (b, ...) of each.

    Each process then has the loss of the whole batch and gives back its own part of the gradient, times the
    number of processes: the mean that DDP takes over them is the gradient of the whole batch.
    """
    return rows if accelerator.num_processes == 1 else Gather.apply(rows, accelerator)  # pyright: ignore


def weighted_means(accelerator: Accelerator, values: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Means over all processes of scalars, each process with its weight.

    Args:
        accelerator: devices and processes.
        values: scalars of this process.
        weight: of this process.
    """
    if accelerator.num_processes == 1:
        return list(values)
    mine = torch.stack([*values, torch.ones_like(values[0])]).detach() * weight
    *sums, weights = cast(Tensor, accelerator.reduce(mine, "sum"))
    return [total / weights.clamp(min=1e-9) for total in sums]


def all_reduce_max(accelerator: Accelerator, number: int) -> int:
    """The largest number of any process: all must decide alike, or some would wait for the others."""
    if accelerator.num_processes == 1:
        return number
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(cast(Tensor, numbers).max())


def all_reduce_sum(accelerator: Accelerator, numbers: Tensor) -> Tensor:
    """The sums over all processes of numbers."""
    if accelerator.num_processes == 1:
        return numbers
    return cast(Tensor, accelerator.reduce(numbers.to(accelerator.device), "sum"))
