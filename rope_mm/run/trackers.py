"""Where metrics go besides the run's folder: tensorboard, wandb and trackio, by accelerate."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from rope_mm.choice import Choice
from rope_mm.run.sources import flatten, known_keys

TRACKERS = Choice("tracker", {name: name for name in ("tensorboard", "wandb", "trackio")})  # -> its package


def read_trackers(names: str) -> list[Any] | None:
    """The trackers of "tensorboard,wandb", as an Accelerator's `log_with`; None of "".

    Raises:
        ValueError: an unknown one, or one whose package is missing.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if (package := TRACKERS[name]) not in map(str, get_available_trackers()):
            raise ValueError(f"tracker {name!r} needs a package: pip install {package}, or leave it out")
    return wanted or None


def begin_trackers(accelerator: Accelerator, out: Path, config: Any) -> None:
    """Tell the accelerator's trackers, if it has any, the name of a run's folder and the configuration."""
    if not accelerator.log_with:
        return
    entries = flatten(asdict(config), known_keys(type(config)), "")
    plain = {key: value if isinstance(value, int | float | str) else str(value) for _, key, value in entries}
    accelerator.init_trackers(out.name, plain)


def end_trackers(accelerator: Accelerator) -> None:
    """Let trackers write what they hold back."""
    for tracker in accelerator.trackers:
        tracker.finish()
