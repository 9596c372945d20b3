"""The loop of every training script: steps, samples and checkpoints, from where the last one stopped."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor

from rope_mm.files import write_text
from rope_mm.training.config import at_least, dump
from rope_mm.training.distributed import all_reduce_max
from rope_mm.training.log import Log, read_metrics
from rope_mm.training.monitor import MOST, NaNGuard, finite, keep_batch, warning
from rope_mm.training.profile import profiled
from rope_mm.training.run_dir import open_folder, resume, save, write_model
from rope_mm.training.signals import Stop, exit_code
from rope_mm.training.throughput import Speed, peak_flops
from rope_mm.training.trackers import read_trackers, tracking


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every training script can be told."""

    out: str = "runs"
    seed: int = 0
    steps: int = 1_000
    log_every: int = 10
    sample_every: int = 500
    checkpoint_every: int = 500
    on_nan: Literal["stop", "skip"] = "stop"  # skip: leave out a step whose gradient is not finite
    threads: int = 0  # of torch on the CPU; 0 leaves them to torch
    profile: int = 0  # steps, after the first ones, of which rotary's share is printed
    trackers: str = ""  # tensorboard, wandb, trackio, or several with commas between
    restart: bool = False
    dry_run: bool = False

    # keys that no result depends on, or by rounding alone: a run goes on with whatever they say
    free: ClassVar[tuple[str, ...]] = (
        *("out", "log_every", "sample_every", "checkpoint_every", "on_nan", "threads", "profile"),
        *("trackers", "restart", "dry_run"),
    )


Config = TypeVar("Config", bound=Run)


def fingerprint(config: Run) -> str:
    """All that a run's result depends on, as YAML."""
    keys: Any = OmegaConf.create(dump(config))
    for key in config.free:
        *groups, name = key.split(".")
        reduce(getitem, groups, keys).pop(name)
    return OmegaConf.to_yaml(keys)


class Training(Protocol):
    """What is trained; of all processes, `tokens` counts those read, `flops` what the model did with them."""

    accelerator: Accelerator
    tokens: int
    flops: float

    def identity(self) -> str:
        """All that the run depends on: of another one its folder is refused."""
        ...

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


def launch(make: Callable[[Config, Accelerator], Training], config: Config, **how: Any) -> None:
    """Print the configuration, or train in a folder that holds this run or none; its result is written there.

    `how` are arguments of the Accelerator.

    Raises:
        KeyboardInterrupt: as from `train`.
        ValueError: numbers that make no run, a folder of another run, a damaged checkpoint, a loss that is
            not finite.
    """
    at_least(1, config, "steps", "log_every", "sample_every", "checkpoint_every")
    at_least(0, config, "threads", "profile")
    if config.dry_run:
        print(dump(replace(config, dry_run=False)), end="")
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight it saves
    out, trackers = Path(config.out), read_trackers(config.trackers)
    accelerator = Accelerator(log_with=trackers, project_dir=out, **how)
    training = make(config, accelerator)  # what cannot be used is refused before the folder is touched
    open_folder(out, training.identity(), accelerator, config.restart)
    with tracking(accelerator, out, config):
        result = train(training, config, out) | training.remarks()
    if accelerator.is_main_process:
        write_text(out / "result.json", json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
        print(f"samples: {out}/samples   model: {out}/model")


def train(training: Training, config: Run, out: Path) -> dict[str, float]:
    """Train from the last checkpoint on, or from the start; the marks at the end.

    A step is saved before its samples are drawn; those that an end left undone are drawn when it is resumed.
    After the first steps so many are profiled, and rotary's share of their time is printed.

    Raises:
        KeyboardInterrupt: somebody asked to stop; a checkpoint was saved. Its argument is the exit code.
        ValueError: a loss that is not finite; what was read is kept.
    """
    accelerator = training.accelerator
    guard = NaNGuard(accelerator, config.on_nan)
    step = resume(out, accelerator)
    training.begin(step)
    guard.steps = guard.steps if step else 0  # not those of a run that this one starts from
    take = profiled(training.step, config.profile, print) if config.profile else training.step
    peak = peak_flops(accelerator.device)
    speed = Speed(peak and peak * accelerator.num_processes)
    told = {"main": accelerator.is_main_process, "also": accelerator.log}
    with Stop() as stop, Log(out, config.steps, step, desc=str(out), **told) as log:
        marks = (
            evaluate(training, out, step, log) if step and is_due(config, step, config.sample_every) else {}
        )
        then, read, done = time.perf_counter(), training.tokens, training.flops
        while step < config.steps:
            terms, step = take(step), step + 1
            if guard.tripped and guard.row < MOST:
                terms = guard.excuse(step, terms)
            elif all_reduce_max(accelerator, guard.tripped or not finite(terms)):
                refuse(training, out, step, terms, guard.row)
            else:
                guard.row = 0
            if logged := is_due(config, step, config.log_every):
                passed = time.perf_counter() - then
                pace = speed(training.tokens - read, training.flops - done, passed)
                log(step, pace, **terms, **guard.counted())
            stopping = all_reduce_max(accelerator, stop.asked)
            if stopping or is_due(config, step, config.checkpoint_every):
                save(out, step, accelerator)
            if stopping and step < config.steps:
                raise KeyboardInterrupt(exit_code(stopping))
            if is_due(config, step, config.sample_every):
                marks = evaluate(training, out, step, log)
            if logged:
                then, read, done = time.perf_counter(), training.tokens, training.flops
    write_model(out, training.save_model, accelerator)
    return marks | guard.counted()


def is_due(config: Run, step: int, every: int) -> bool:
    """Whether a step is the last one, or one of those that something is done after."""
    return step == config.steps or step % every == 0


def evaluate(training: Training, out: Path, step: int, log: Log) -> dict[str, float]:
    """Samples and marks of a step; the marks are logged, and what they and the losses so far warn of."""
    marks = training.look(out / "samples" / f"step-{step:06d}")
    if marks:
        log(step, **marks)
    if training.accelerator.is_main_process and (alarm := warning(read_metrics(out))):
        log(step, warning=alarm)
    return marks


def refuse(
    training: Training, out: Path, step: int, terms: Mapping[str, Tensor], before: int = 0
) -> NoReturn:
    """End a run whose numbers of this step, counted from 1, are not finite, and keep what they came from.

    So many steps `before` it were left out.

    Raises:
        ValueError: always.
    """
    process = training.accelerator
    share = f"-{process.process_index}" if process.num_processes > 1 else ""
    path = out / f"nan-step-{step}{share}.pt"
    keep_batch(path, step, terms, training.batches(step - 1))
    found = [name for name, term in terms.items() if not term.isfinite()]
    lost = found or ["a gradient or another process's"]
    after = f", after {before} steps that were left out" if before else ""
    raise ValueError(
        f"{', '.join(lost)} not finite at step {step}{after}: its batches are in {path}, the last checkpoint "
        "is as it was; begin anew with lower rates or, of a critic, larger penalties"
    )
