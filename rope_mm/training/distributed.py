"""What several processes have together: rows through which a gradient comes back, and one answer."""

from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor


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
    """Rows (processes * b, ...) of all processes, one after another, of rows (b, ...) here.

    Each process then has the loss of the whole batch and gives back its own part of the gradient, times the
    number of processes: the mean that DDP takes over them is the gradient of the whole batch.
    """
    return rows if accelerator.num_processes == 1 else Gather.apply(rows, accelerator)  # pyright: ignore


def all_reduce_max(accelerator: Accelerator, number: int) -> int:
    """The largest number of any process: all must answer alike, or some would wait for the others."""
    if accelerator.num_processes == 1:
        return number
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(cast(Tensor, numbers).max())
