"""Experiment trackers besides the run's folder: tensorboard, wandb and trackio, by accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from rope_mm.registry import Registry
from rope_mm.training.config import flatten
from rope_mm.training.config_keys import known_keys

TRACKERS = Registry("tracker", {name: name for name in ("tensorboard", "wandb", "trackio")})  # -> its package


def read_trackers(names: str) -> list[Any] | None:
    """The trackers of "tensorboard,wandb", as an Accelerator's `log_with`; None of "".

    Raises:
        ValueError: an unknown one, or one whose package is missing.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if (package := TRACKERS[name]) not in map(str, get_available_trackers()):
            raise ValueError(f"tracker {name!r} needs a package: pip install {package}, or run without it")
    return wanted or None


@contextmanager
def tracking(accelerator: Accelerator, output_dir: Path, config: Any) -> Iterator[None]:
    """While entered, the accelerator's trackers, if it has any, receive the run's metrics.

    Args:
        accelerator: made with `log_with`.
        output_dir: the run's folder, by whose name trackers know it.
        config: all keys of the run.
    """
    if accelerator.log_with:
        entries = flatten(asdict(config), known_keys(type(config)), "")
        plain = {k: v if isinstance(v, int | float | str) else str(v) for _, k, v in entries}
        accelerator.init_trackers(output_dir.name, plain)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
