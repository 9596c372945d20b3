"""A run that begins where another one ended: its weights, averages and optimisers, on data of one's own."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from omegaconf import OmegaConf

from rope_mm.training import checkpoint


def check_start(start: Path, identity: str, kept: Sequence[str]) -> None:
    """Refuse a folder without a run that is done, and one whose weights are of another kind.

    `identity` is the new run's configuration, of which the `kept` keys must be the old one's.

    Raises:
        ValueError: with the first key that differs; a checkpoint that is not whole.
    """
    made, newest = start / "run.yaml", checkpoint.latest(start / "checkpoints")
    if not (start / "result.json").exists() or newest is None:
        raise ValueError(f"start {start} holds no run that is done; give the --out of one, or finish it")
    checkpoint.verify(newest)
    old, new = OmegaConf.load(made), OmegaConf.create(identity)
    for key in kept:
        there, here = OmegaConf.select(old, key), OmegaConf.select(new, key)
        if there != here:
            raise ValueError(f"start {start} has another {key} ({there} there, {here} here); it must be kept")


def load_start(start: Path, accelerator: Accelerator) -> None:
    """Take over all that the last checkpoint of a run holds, once `check_start` let it pass."""
    accelerator.load_state(str(checkpoint.latest(start / "checkpoints")))
