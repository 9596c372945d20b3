"""When to stop a run or to warn: numbers that are not finite, lost modes, scores that diverge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from rope_mm.files import write_file
from rope_mm.training.distributed import all_reduce_max
from rope_mm.training.metrics_log import say

MODE_METRICS = "coverage", "modes"  # metrics that fall when a generator loses modes
LOST_SHARE = 0.25  # part of the best such metric whose loss is worth a warning
MAX_SKIPPED = 10  # consecutive steps that are skipped before the run stops
GAP = 20.0  # of scores, where a logistic loss has a slope below 3e-9


def finite(terms: Mapping[str, Tensor]) -> bool:
    """Whether all numbers of a step are finite; waits once for the device."""
    return bool(torch.stack([term.detach().float() for term in terms.values()]).isfinite().all())


class NaNGuard:
    """With `on_nan` "skip", skips a step with a gradient that is not finite; all processes skip the same.

    Args:
        accelerator: whose optimizers are watched.
        on_nan: "stop" or "skip".

    Attributes:
        tripped: whether this step has such a gradient.
        skipped_steps: the number of steps skipped so far.
        consecutive: the number of steps skipped just before this one.
    """

    def __init__(self, accelerator: Accelerator, on_nan: Literal["stop", "skip"]):
        self.accelerator, self.tripped, self.skipped_steps, self.consecutive = accelerator, False, 0, 0
        if on_nan == "skip":
            for wrapped in accelerator._optimizers:
                wrapped.optimizer.register_step_pre_hook(self.inspect)

    def inspect(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """Take the gradients from an optimizer that is about to step, so that it changes nothing."""
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        found = [weight.grad for weight in weights if weight.grad is not None]
        mine = {str(i): (g.to_local() if isinstance(g, DTensor) else g).sum() for i, g in enumerate(found)}
        self.tripped = self.tripped or bool(all_reduce_max(self.accelerator, bool(mine) and not finite(mine)))
        if self.tripped:
            optimizer.zero_grad()

    def skip_step(self, step: int, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Report and count a skipped step; those of its terms that are finite."""
        self.tripped, self.skipped_steps = False, self.skipped_steps + 1
        self.consecutive += 1
        kept = {name: term for name, term in terms.items() if finite({name: term})}
        if self.accelerator.is_main_process:
            names = ", ".join(name for name in terms if name not in kept) or "a gradient"
            say(f"skipped: step {step}, {names} not finite")
        return kept

    def counted(self) -> dict[str, int]:
        """The number of skipped steps, where there are any."""
        return {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"skipped_steps": self.skipped_steps, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from what `state_dict` returned."""
        self.skipped_steps, self.consecutive = state["skipped_steps"], state["consecutive"]


def keep_batch(path: Path, step: int, terms: Mapping[str, Tensor], batches: Sequence[Any]) -> None:
    """Write the losses and the batches of a step, for `torch.load`.

    Args:
        path: the file.
        step: its number, from 1.
        terms: losses by name.
        batches: what was read.
    """
    losses = {name: float(term) for name, term in terms.items()}
    kept = {"step": step, "terms": losses, "batches": list(batches)}
    write_file(path, lambda partial: torch.save(kept, partial))


def warning(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What a run's metrics warn of and the usual cure, in one sentence, or None.

    Args:
        lines: the metrics so far, oldest first; read are coverage, modes, score/real and score/fake.
    """
    return lost_modes(lines) or diverging(lines)


def lost_modes(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether a metric fell at each of the last two evaluations, and by a quarter of its best in all."""
    for name in MODE_METRICS:
        values = [line[name] for line in lines if name in line]
        if len(values) < 3 or not values[-3] > values[-2] > values[-1]:
            continue
        if values[-1] < (1 - LOST_SHARE) * (best := max(values)):
            return (
                f"{name} fell to {values[-1]:.4g} from {best:.4g}: the generator loses modes; raise the "
                "gammas of r1 and r2, or lower optim.lr"
            )
    return None


def diverging(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether mean scores are further apart than a loss has a slope, and twice as far as halfway before."""
    names = "score/real", "score/fake"
    scores = [tuple(line[name] for name in names) for line in lines if all(name in line for name in names)]
    if len(scores) < 2:
        return None
    gaps, levels = [abs(a - b) for a, b in scores], [abs(a + b) / 2 for a, b in scores]
    halfway, (real, fake) = (len(scores) - 1) // 2, scores[-1]
    found = f"the mean scores, {real:.4g} of real and {fake:.4g} of generated images,"
    if gaps[-1] > max(GAP, 2 * gaps[halfway]):
        return f"{found} diverge: the critic wins; raise the gammas of r1 and r2, or lower optim.critic_lr"
    if levels[-1] > max(GAP, 2 * levels[halfway]):
        return (
            f"{found} drift together, which a relativistic loss does not prevent; add centring: 0.01 to "
            "loss.penalties"
        )
    return None
