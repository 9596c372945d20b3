"""Training of the small classifiers by which generated images are evaluated."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Model = TypeVar("Model", bound=nn.Module)


def fit(
    make: Callable[[], Model],
    loss: Callable[[Model, Tensor], Tensor],
    rows: int,
    seed: int,
    *,
    epochs: int,
    batch: int,
    lr: float,
    schedule: Callable[[Optimizer, int], LRScheduler],
) -> Model:
    """A model trained by AdamW on all rows in random order; the global random state is left as it was.

    Args:
        make: the model, with random weights.
        loss: (model, row numbers) -> the loss of these rows.
        rows: how many there are.
        seed: of the weights and of the order of rows.
        epochs: how often the model sees each row.
        batch: rows of a step.
        lr: learning rate.
        schedule: (optimizer, number of steps) -> the schedule of the rate.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        rates = schedule(optimizer, epochs * (-(-rows // batch)))
        for _ in range(epochs):
            for chosen in torch.randperm(rows).split(batch):
                optimizer.zero_grad()
                loss(model, chosen).backward()
                optimizer.step()
                rates.step()
    return model.eval()
