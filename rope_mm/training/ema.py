"""An exponential moving average of a model's weights."""

from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rope_mm.training.distributed import whole

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """average <- d * average + (1 - d) * weights, in float32 or wider; buffers are copied.

        ema = Ema(generator, decay=0.999)
        ema.update(generator)                   # after every optimizer step
        images = ema.model(noise)
        torch.save(ema.state_dict(), path)

    Args:
        model: what is averaged; `.model` is its copy, in eval mode, without gradients.
        decay: d, in [0, 1).
        warm_up: after n updates d is at most (1 + n) / (10 + n), so that the start is soon forgotten.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, model: Model, decay: float = 0.999, warm_up: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}; 0.999 averages some 1000 steps")
        self.decay, self.warm_up, self.updates = decay, warm_up, 0
        self.model = deepcopy(model).eval().requires_grad_(False)
        for average in self.model.parameters():
            average.data = average.data.to(torch.promote_types(average.dtype, torch.float32))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the present weights; the model may be wrapped for several processes."""
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        averages: list[Tensor] = list(self.model.parameters())
        weights = [whole(new).to(old) for old, new in zip(averages, model.parameters(), strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for old, new in zip(self.model.buffers(), model.buffers(), strict=True):
            old.copy_(new)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates behind them."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
