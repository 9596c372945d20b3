"""The loop of the training scripts: steps, evaluations and checkpoints, from where the last run stopped."""

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor

from rope_mm.files import write_text
from rope_mm.training import checkpoint
from rope_mm.training.checkpoint import Stateful, TrainingState
from rope_mm.training.config import check_options, dump, option
from rope_mm.training.distributed import all_reduce_max
from rope_mm.training.folder_lock import file_in_the_way, not_a_folder
from rope_mm.training.health_checks import MAX_SKIPPED, NaNGuard, finite, keep_batch, warning
from rope_mm.training.history import record, record_command
from rope_mm.training.metrics_log import Log, read_metrics, say
from rope_mm.training.model_card import write_model_card
from rope_mm.training.rotary_profile import profiled
from rope_mm.training.run_dir import (
    Identity,
    check_folder,
    locked_for_all,
    open_folder,
    resume,
    save,
    write_model,
)
from rope_mm.training.run_page import DATA, describe_lack, write_run_page
from rope_mm.training.signals import Stop, exit_code
from rope_mm.training.threads import choose_threads
from rope_mm.training.throughput import Speed, peak_flops
from rope_mm.training.trackers import read_trackers, tracking


@dataclass(frozen=True, kw_only=True)
class Run:
    """The keys of every training script."""

    output_dir: str = option("runs", "the run's folder; the same command again resumes the run in it")
    seed: int = option(0, "of all random numbers")
    steps: int = option(1_000, "steps of the optimizers; a larger number extends a finished run", minimum=1)
    log_every: int = option(10, "steps", minimum=1)
    sample_every: int = option(500, "steps; samples and metrics are made", minimum=1)
    checkpoint_every: int = option(500, "steps; the newest two checkpoints remain", minimum=1)
    on_nan: Literal["stop", "skip"] = option("stop", "at a gradient that is not finite; skip: skip its step")
    mixed_precision: Literal["", "no", "bf16"] = option("", "of forwards; empty: as accelerate is configured")
    threads: int = option(
        0,
        "of torch on the CPU, at most OMP_NUM_THREADS where that is set; 0: as many as are faster",
        minimum=0,
    )
    profile: int = option(
        0, "steps, after the first, of which rotary's share of the time is printed", minimum=0
    )
    trackers: str = option(
        "", "tensorboard, wandb, trackio, or several with commas between", check=read_trackers
    )
    page: bool = option(True, "write index.html after each evaluation: curves, samples and configuration")
    restart: bool = option(False, "delete the run in output_dir and start anew")
    extend: bool = option(False, "go on with another number of steps although the rates' schedule changes")
    dry_run: bool = option(False, "check all that needs no training, print the configuration and stop")

    # keys on which no result depends, or only by rounding: a run resumes whatever they say
    resumable_keys: ClassVar[tuple[str, ...]] = (
        *("output_dir", "log_every", "sample_every", "checkpoint_every", "on_nan", "threads", "profile"),
        *("trackers", "page", "restart", "extend", "dry_run"),
    )


Config = TypeVar("Config", bound=Run)


def fingerprint(config: Run) -> str:
    """All keys that a run's result depends on, as YAML."""
    keys: Any = OmegaConf.create(dump(config))
    for key in config.resumable_keys:
        *groups, name = key.split(".")
        reduce(getitem, groups, keys).pop(name)
    return OmegaConf.to_yaml(keys)


class Training(Protocol):
    """What a script trains.

    Attributes:
        accelerator: devices and processes.
        tokens: read so far by all processes.
        generated: images generated for the losses so far by all processes.
        flops: of the model so far, 0 where they are not counted.
    """

    accelerator: Accelerator
    tokens: int
    generated: int
    flops: float

    def identity(self) -> Identity:
        """All that the run depends on."""
        ...

    def describe(self) -> str:
        """What was resolved from the configuration, for a dry run."""
        ...

    def show_data(self, path: Path) -> None:
        """Write an image of rows as they are read, with their captions."""
        ...

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside models and optimizers, by name."""
        ...

    def begin(self, step: int) -> None:
        """Prepare to continue at a step."""
        ...

    def step(self, step: int) -> dict[str, Tensor]:
        """Train one step; its losses by name."""
        ...

    def batches(self, step: int) -> list[Any]:
        """What this process reads in a step."""
        ...

    def evaluate(self, path: Path) -> dict[str, float]:
        """Write samples to files that begin with this path; metrics."""
        ...

    def save_model(self, path: Path) -> None:
        """Write the model."""
        ...

    def extra_results(self) -> dict[str, float]:
        """What the result says beside the metrics."""
        ...


def launch(make: Callable[[Config, Accelerator], Training], config: Config, **options: Any) -> None:
    """Train in the run's folder and write its result there; or with `dry_run` check and print.

    Args:
        make: builds what is trained, and refuses what cannot be.
        config: of the script.
        options: arguments of the Accelerator.

    Raises:
        KeyboardInterrupt: as `train`.
        ValueError: a configuration, data or a folder that cannot be used, a loss that is not finite.
    """
    check_options(config)
    choose_threads(config.threads)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight it saves
    options["mixed_precision"] = config.mixed_precision or None  # None: as accelerate is configured
    output_dir, trackers = Path(config.output_dir), read_trackers(config.trackers)
    if config.dry_run:
        dry_run(make(config, Accelerator(**options)), config, output_dir)
        return
    accelerator = Accelerator(log_with=trackers, project_dir=output_dir, **options)
    with locked_for_all(output_dir, accelerator):
        training = make(config, accelerator)  # what cannot be used is refused before the folder is touched
        identity = training.identity()
        open_folder(output_dir, identity, accelerator, *folder_options(config))
        if accelerator.is_main_process:
            begin(training, config, output_dir, identity)
        with tracking(accelerator, output_dir, config):
            result = train(training, config, output_dir) | training.extra_results()
        if accelerator.is_main_process:
            if not (output_dir / "result.json").exists():
                record(output_dir, "finished", config.steps)
            write_text(output_dir / "result.json", json.dumps(result, indent=1))
            write_model_card(output_dir, result)
            if result:
                print(json.dumps(result, indent=1))
            if lack := describe_lack(result):
                print(lack)
            print(f"samples: {output_dir}/samples   model: {output_dir}/model")
            if config.page:
                lacking = write_run_page(output_dir)
                print(f"page: {output_dir}/index.html{lacking and f' ({lacking})'}")


def begin(training: Training, config: Run, output_dir: Path, identity: Identity) -> None:
    """Say what is about to be done, record it, and show the data of a new run.

    Args:
        training: what is trained.
        config: of the run.
        output_dir: its folder.
        identity: all that it depends on.
    """
    resolved = "; ".join(training.describe().splitlines())
    print(f"{describe_start(output_dir, config.steps)} in {output_dir}; {resolved}", flush=True)
    step = done_steps(output_dir)
    if step < config.steps:
        processes = training.accelerator.num_processes
        record_command(output_dir, step, config.steps, processes, identity.constant_schedule)
    if not step:
        training.show_data(output_dir / DATA)
        if (output_dir / DATA).exists():
            print(f"rows as they are read: {output_dir / DATA}", flush=True)


def done_steps(output_dir: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    newest = checkpoint.latest(output_dir / "checkpoints")
    return checkpoint.step_of(newest) if newest else 0


def describe_start(output_dir: Path, steps: int) -> str:
    """What a command is about to do: train, resume, or nothing where all steps are done."""
    if not (done := done_steps(output_dir)):
        return f"training: {steps} steps"
    return f"done before: all {steps} steps" if done >= steps else f"resuming: step {done} of {steps}"


def folder_options(config: Run) -> tuple[bool, bool, bool]:
    """What a run may do to its folder: restart, extend, go on with changed data."""
    changed = getattr(getattr(config, "data", None), "changed", False)
    return config.restart, config.extend, changed


def dry_run(training: Training, config: Run, output_dir: Path) -> None:
    """Check the folder as a run would, and print the configuration and what was resolved from it.

    Args:
        training: what would be trained.
        config: of the run.
        output_dir: of the run; nothing is written.
    """
    restart, extend, changed = folder_options(config)
    if file_in_the_way(output_dir):
        raise not_a_folder(output_dir)
    if not restart:
        check_folder(output_dir, training.identity(), extend, changed)
    training.batches(0)  # refuses sizes and lengths that do not fit what is read
    print(dump(replace(config, dry_run=False)), end="")
    for line in training.describe().splitlines():
        print(f"# {line}")


def train(training: Training, config: Run, output_dir: Path) -> dict[str, float]:
    """Train from the last checkpoint, or from the start; the metrics at the end.

    A step is saved before its evaluation; one that was interrupted is repeated when the run resumes. With
    `profile`, rotary's share of the time of some steps is printed.

    Args:
        training: what is trained.
        config: of the run.
        output_dir: its folder.

    Raises:
        KeyboardInterrupt: a signal asked to stop, and a checkpoint was saved; its argument is the exit code.
        ValueError: a loss that is not finite; what was read is kept.
    """
    accelerator = training.accelerator
    guard = NaNGuard(accelerator, config.on_nan)
    accelerator.register_for_checkpointing(TrainingState({**training.states(), "nan_guard": guard}))
    step = resume(output_dir, accelerator)
    training.begin(step)
    guard.skipped_steps = guard.skipped_steps if step else 0  # not those of a run that this one starts from
    train_step = (
        profiled(training.step, config.profile, lambda share: say(f"{share}", sys.stdout))
        if config.profile
        else training.step
    )
    metrics, meter = {}, Meter(training, config.steps)
    shown = {"main": accelerator.is_main_process, "also": accelerator.log}
    with Stop() as stop, Log(output_dir, config.steps, step, desc=str(output_dir), **shown) as log:
        if step and is_due(config, step, config.sample_every):
            metrics = evaluate(training, config, step, log, stop, saved=True)
        meter.start(step)
        while step < config.steps:
            terms, step = train_step(step), step + 1
            terms = check_terms(training, output_dir, step, terms, guard)
            if logged := is_due(config, step, config.log_every):
                log(step, meter.read(step), **terms, **guard.counted())
            stopping = all_reduce_max(accelerator, stop.asked)
            if saved := bool(stopping) or is_due(config, step, config.checkpoint_every):
                save(output_dir, step, accelerator)
            if stopping:
                raise KeyboardInterrupt(stopped(accelerator, output_dir, step, stopping))
            if is_due(config, step, config.sample_every):
                metrics = evaluate(training, config, step, log, stop, saved)
            if logged:
                meter.start(step)
    write_model(output_dir, training.save_model, accelerator)
    return metrics | guard.counted()


class Meter:
    """Speed and remaining time of a run, between two lines of its log.

    Args:
        training: counts what it has read.
        steps: of the run.
    """

    def __init__(self, training: Training, steps: int):
        self.training, self.steps = training, steps
        peak, processes = (
            peak_flops(training.accelerator.device),
            training.accelerator.num_processes,
        )
        self.speed = Speed(peak and peak * processes)

    def start(self, step: int) -> None:
        """Begin to measure after a step."""
        self.step, self.then = step, time.perf_counter()
        self.before = self.training.tokens, self.training.generated, self.training.flops

    def read(self, step: int) -> dict[str, Any]:
        """Speed since `start`, and the time that the remaining steps take at it, ETA."""
        seconds = time.perf_counter() - self.then
        now = self.training.tokens, self.training.generated, self.training.flops
        tokens, images, flops = (b - a for a, b in zip(self.before, now, strict=True))
        left = round((self.steps - step) * seconds / max(step - self.step, 1))
        return self.speed(tokens, images, flops, seconds) | {"ETA": clock(left)}


def clock(seconds: int) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def check_terms(
    training: Training, output_dir: Path, step: int, terms: dict[str, Tensor], guard: NaNGuard
) -> dict[str, Tensor]:
    """The terms of a step, those of a skipped one as far as they are finite.

    Args:
        training: what is trained.
        output_dir: where a batch is kept.
        step: its number, from 1.
        terms: losses by name.
        guard: whether the step was skipped.

    Raises:
        ValueError: numbers that are not finite.
    """
    if guard.tripped and guard.consecutive < MAX_SKIPPED:
        return guard.skip_step(step, terms)
    if all_reduce_max(training.accelerator, guard.tripped or not finite(terms)):
        refuse(training, output_dir, step, terms, guard.consecutive)
    guard.consecutive = 0
    return terms


def stopped(accelerator: Accelerator, output_dir: Path, step: int, number: int) -> int:
    """Say that a signal stopped the run, and record it; the exit code.

    Args:
        accelerator: only the main process prints.
        output_dir: of the run.
        step: the last one that was saved.
        number: of the signal.
    """
    if accelerator.is_main_process:
        name = signal.Signals(number).name
        said = f"stopped by {name} at step {step}, saved; the same command resumes"
        say(said)
        record(output_dir, f"stopped by {name}", step)
    return exit_code(number)


def is_due(config: Run, step: int, every: int) -> bool:
    """Whether a step is the last one, or one after which something periodic is done.

    Args:
        config: of the run.
        step: number of steps done.
        every: period in steps.
    """
    return step == config.steps or step % every == 0


def evaluate(
    training: Training, config: Run, step: int, log: Log, stop: Stop, saved: bool
) -> dict[str, float]:
    """Samples and metrics of a step; metrics are logged, and what they and the losses so far warn of.

    Then the page of the run is written, but for the last step's, which has the result, too.

    Args:
        training: what is trained.
        config: of the run.
        step: its number, from 1.
        log: of the run.
        stop: the signals that ask the run to stop.
        saved: whether the step is saved, so that a signal may end its evaluation.

    Raises:
        KeyboardInterrupt: as `train`, of a saved step.
    """
    output_dir = Path(config.output_dir)
    make = partial(training.evaluate, output_dir / "samples" / f"step-{step:06d}")
    metrics = stop.unless_asked(make, {}) if saved else make()
    if stopping := all_reduce_max(training.accelerator, stop.asked if saved else 0):
        raise KeyboardInterrupt(stopped(training.accelerator, output_dir, step, stopping))
    if metrics:
        log(step, **metrics)
    if training.accelerator.is_main_process:
        if message := warning(read_metrics(output_dir)):
            log(step, warning=message)
        if config.page and step < config.steps:
            write_run_page(output_dir)
    return metrics


def refuse(
    training: Training, output_dir: Path, step: int, terms: Mapping[str, Tensor], skipped: int = 0
) -> NoReturn:
    """Stop a run whose numbers are not finite, and keep the batches that they came from.

    Args:
        training: what is trained.
        output_dir: where the batches are kept.
        step: its number, from 1.
        terms: losses by name.
        skipped: how many steps were skipped just before.

    Raises:
        ValueError: always.
    """
    process = training.accelerator
    suffix = f"-{process.process_index}" if process.num_processes > 1 else ""
    path = output_dir / f"nan-step-{step}{suffix}.pt"
    keep_batch(path, step, terms, training.batches(step - 1))
    found = [name for name, term in terms.items() if not term.isfinite()]
    names = ", ".join(found) or "a gradient or another process's number"
    after = f", after {skipped} skipped steps" if skipped else ""
    raise ValueError(
        f"{names} not finite at step {step}{after}: its batches are in {path}, the last checkpoint is "
        "unchanged; restart with lower learning rates or, of a critic, larger penalties"
    )
