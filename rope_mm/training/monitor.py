"""When to stop a run or to warn: numbers that are not finite, modes that get lost, scores that diverge."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from rope_mm.files import write_file
from rope_mm.training.distributed import all_reduce_max

KEPT = "coverage", "modes"  # marks that fall when a generator loses modes
LOST = 0.25  # part of the best such mark whose loss is worth a warning
MOST = 10  # steps one after another that are left out
GAP = 20.0  # where a logistic loss has a slope below 3e-9


def finite(terms: Mapping[str, Tensor]) -> bool:
    """Whether all of a step's numbers are finite; one wait for the device."""
    return bool(torch.stack([term.detach().float() for term in terms.values()]).isfinite().all())


class NaNGuard:
    """Where told to "skip", leaves out an update whose gradient is not finite, and the others of its step.

    All processes leave out the same. `steps` counts those left out, `row` the ones just before this step;
    both are part of a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, on_nan: Literal["stop", "skip"]):
        self.accelerator, self.tripped, self.steps, self.row = accelerator, False, 0, 0
        accelerator.register_for_checkpointing(self)
        if on_nan == "skip":
            for wrapped in accelerator._optimizers:
                wrapped.optimizer.register_step_pre_hook(self.inspect)

    def inspect(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """Take the gradients from an optimiser that is about to step: it then changes nothing."""
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        found = [weight.grad for weight in weights if weight.grad is not None]
        mine = {str(i): (g.to_local() if isinstance(g, DTensor) else g).sum() for i, g in enumerate(found)}
        self.tripped = self.tripped or bool(all_reduce_max(self.accelerator, bool(mine) and not finite(mine)))
        if self.tripped:
            optimizer.zero_grad()

    def excuse(self, step: int, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Say and count that a step was left out; those of its terms that are finite."""
        self.tripped, self.steps, self.row = False, self.steps + 1, self.row + 1
        left = {name: term for name, term in terms.items() if finite({name: term})}
        if self.accelerator.is_main_process:
            names = ", ".join(name for name in terms if name not in left) or "a gradient"
            print(f"left out: step {step}, {names} not finite", file=sys.stderr, flush=True)
        return left

    def counted(self) -> dict[str, int]:
        """How many steps were left out, where some were."""
        return {"steps_left_out": self.steps} if self.steps else {}

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"steps": self.steps, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self.row = state["steps"], state["row"]


def keep_batch(path: Path, step: int, terms: Mapping[str, Tensor], batches: Sequence[Any]) -> None:
    """Write what a step lost and the batches it saw, for `torch.load`."""
    lost = {name: float(term) for name, term in terms.items()}
    kept = {"step": step, "terms": lost, "batches": list(batches)}
    write_file(path, lambda partial: torch.save(kept, partial))


def warning(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What a run's metrics so far, oldest first, warn of and the usual cure, in one sentence; or None.

    Reads the marks of evaluations (coverage, modes) and the mean scores `real` and `fake`.
    """
    return lost_modes(lines) or diverging(lines)


def lost_modes(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether a mark fell at each of the last two evaluations, and by a quarter of its best in all."""
    for name in KEPT:
        marks = [line[name] for line in lines if name in line]
        if len(marks) < 3 or not marks[-3] > marks[-2] > marks[-1]:
            continue
        if marks[-1] < (1 - LOST) * (best := max(marks)):
            return (
                f"{name} fell to {marks[-1]:.4g} from {best:.4g}: the generator loses modes; raise the "
                "gammas of r1 and r2, or lower optim.lr"
            )
    return None


def diverging(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether the mean scores stand further apart than a loss has a slope, twice as far as halfway before."""
    scores = [(line["real"], line["fake"]) for line in lines if "real" in line and "fake" in line]
    if len(scores) < 2:
        return None
    gaps, levels = [abs(a - b) for a, b in scores], [abs(a + b) / 2 for a, b in scores]
    halfway, (real, fake) = (len(scores) - 1) // 2, scores[-1]
    seen = f"the mean scores, {real:.4g} of real and {fake:.4g} of drawn images,"
    if gaps[-1] > max(GAP, 2 * gaps[halfway]):
        return f"{seen} diverge: the critic wins; raise the gammas of r1 and r2, or lower optim.critic_lr"
    if levels[-1] > max(GAP, 2 * levels[halfway]):
        return (
            f"{seen} drift, as a relativistic loss leaves them free to; add centring: 0.01 to loss.penalties"
        )
    return None
