"""The loop of every training script: steps, samples and checkpoints, from where the last one stopped."""

import time
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor

from rope_mm.run.folder import agree, resume, save
from rope_mm.run.log import Log
from rope_mm.run.stop import Stop


class Pace(Protocol):
    """How long a run is, and every how many steps something happens in it."""

    out: str
    steps: int
    log_every: int
    sample_every: int
    checkpoint_every: int


class Training(Protocol):
    """What is trained; `tokens` counts those it has read."""

    accelerator: Accelerator
    tokens: int

    def begin(self, step: int) -> None:
        """Make ready to go on from a step."""
        ...

    def step(self, step: int) -> dict[str, Tensor]:
        """Train a step; what it lost."""
        ...

    def look(self, path: Path) -> dict[str, float]:
        """Write samples to files that begin with this path; their marks."""
        ...

    def save_model(self, path: Path) -> None:
        """Write the model."""
        ...


def train(training: Training, pace: Pace, out: Path) -> dict[str, float]:
    """Train from the last checkpoint on, or from the start; the marks at the end.

    Raises:
        KeyboardInterrupt: somebody asked to stop; a checkpoint was saved.
    """
    accelerator = training.accelerator
    step, marks = resume(out, accelerator), None
    training.begin(step)
    then, read = time.perf_counter(), training.tokens
    with Stop() as stop, Log(out, pace.steps, step, desc=pace.out, main=accelerator.is_main_process) as log:
        while step < pace.steps:
            terms = training.step(step)
            step += 1
            last = step == pace.steps
            if last or step % pace.log_every == 0:
                numbers = {name: float(term) for name, term in terms.items()}
                speed = (training.tokens - read) / (time.perf_counter() - then)
                log(step, {"tokens/s": speed}, **numbers)
            if last or step % pace.sample_every == 0:
                marks = training.look(out / "samples" / f"step-{step:06d}")
                if marks:
                    log(step, **marks)
            stopping = agree(accelerator, stop.asked)
            if last or stopping or step % pace.checkpoint_every == 0:
                save(out, step, accelerator)
            if stopping and not last:
                raise KeyboardInterrupt
            if last or step % pace.log_every == 0:
                then, read = time.perf_counter(), training.tokens
    if marks is None:  # the run was whole already
        marks = training.look(out / "samples" / f"step-{step:06d}")
    training.save_model(out / "model")
    return marks
