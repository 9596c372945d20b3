"""The loop of every training script: steps, samples and checkpoints, from where the last one stopped."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from accelerate import Accelerator
from torch import Tensor

from rope_mm.run.alarm import finite, keep_batch, warning
from rope_mm.run.checkpoint import write_text
from rope_mm.run.folder import agree, open_folder, resume, save
from rope_mm.run.log import Log, read_metrics
from rope_mm.run.profile import profiled
from rope_mm.run.speed import Speed, peak_flops
from rope_mm.run.stop import Stop, exit_code
from rope_mm.run.trackers import tracking


class Pace(Protocol):
    """What a configuration says of a run: how long it is, and every how many steps something happens."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def sample_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def restart(self) -> bool: ...


class Training(Protocol):
    """What is trained; of all processes, `tokens` counts those read, `flops` what the model did with them."""

    accelerator: Accelerator
    tokens: int
    flops: float

    def begin(self, step: int) -> None:
        """Make ready to go on from a step."""
        ...

    def step(self, step: int) -> dict[str, Tensor]:
        """Train a step; what it lost."""
        ...

    def batches(self, step: int) -> list[Any]:
        """What this process read, or would read, in a step."""
        ...

    def look(self, path: Path) -> dict[str, float]:
        """Write samples to files that begin with this path; their marks."""
        ...

    def save_model(self, path: Path) -> None:
        """Write the model."""
        ...

    def remarks(self) -> dict[str, float]:
        """What a result says beside the marks."""
        ...


def carry_out(training: Training, config: Pace, out: Path, identity: str, profile: int = 0) -> None:
    """Train in a folder that holds this run or none; its result is written there and printed.

    Raises:
        KeyboardInterrupt: as from `train`.
        ValueError: a folder of another run, a damaged checkpoint, a loss that is not finite.
    """
    accelerator = training.accelerator
    open_folder(out, identity, accelerator, config.restart)
    with tracking(accelerator, out, config):
        result = train(training, config, out, profile) | training.remarks()
    if accelerator.is_main_process:
        write_text(out / "result.json", json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
        print(f"samples: {out}/samples   model: {out}/model")


def train(training: Training, pace: Pace, out: Path, profile: int = 0) -> dict[str, float]:
    """Train from the last checkpoint on, or from the start; the marks at the end.

    After the first steps so many are profiled, and rotary's share of their time is printed.

    Raises:
        KeyboardInterrupt: somebody asked to stop; a checkpoint was saved. Its argument is the exit code.
        ValueError: a loss that is not finite; what was read is kept.
    """
    accelerator = training.accelerator
    step, marks = resume(out, accelerator), None
    training.begin(step)
    take = profiled(training.step, profile, print) if profile else training.step
    peak = peak_flops(accelerator.device)
    speed = Speed(peak and peak * accelerator.num_processes)
    then, read, done = time.perf_counter(), training.tokens, training.flops
    told = {"main": accelerator.is_main_process, "also": accelerator.log}
    with Stop() as stop, Log(out, pace.steps, step, desc=str(out), **told) as log:
        while step < pace.steps:
            terms = take(step)
            step += 1
            if agree(accelerator, not finite(terms)):
                refuse(training, out, step, terms)
            last = step == pace.steps
            logging = last or step % pace.log_every == 0
            if logging:
                passed = time.perf_counter() - then
                log(step, speed(training.tokens - read, training.flops - done, passed), **terms)
            if last or step % pace.sample_every == 0:
                marks = look(training, out, step, log)
            stopping = agree(accelerator, stop.asked)
            if last or stopping or step % pace.checkpoint_every == 0:
                save(out, step, accelerator)
            if stopping and not last:
                raise KeyboardInterrupt(exit_code(stopping))
            if logging:
                then, read, done = time.perf_counter(), training.tokens, training.flops
    if marks is None:  # the run was whole already
        marks = training.look(samples(out, step))
    training.save_model(out / "model")
    return marks


def samples(out: Path, step: int) -> Path:
    """What the files of a step's samples begin with."""
    return out / "samples" / f"step-{step:06d}"


def look(training: Training, out: Path, step: int, log: Log) -> dict[str, float]:
    """Samples and marks of a step; the marks are logged, and what they and the losses so far warn of."""
    marks = training.look(samples(out, step))
    if marks:
        log(step, **marks)
    if training.accelerator.is_main_process and (alarm := warning(read_metrics(out))):
        log(step, warning=alarm)
    return marks


def refuse(training: Training, out: Path, step: int, terms: Mapping[str, Tensor]) -> NoReturn:
    """End a run whose numbers of this step, counted from 1, are not finite, and keep what they came from.

    Raises:
        ValueError: always.
    """
    process = training.accelerator
    share = f"-{process.process_index}" if process.num_processes > 1 else ""
    path = out / f"nan-step-{step}{share}.pt"
    keep_batch(path, step, terms, training.batches(step - 1))
    lost = [name for name, term in terms.items() if not term.isfinite()] or ["another process's"]
    raise ValueError(
        f"{', '.join(lost)} not finite at step {step}: its batches are in {path}, the last checkpoint is as "
        "it was; begin anew with lower rates or, of a critic, larger penalties"
    )
