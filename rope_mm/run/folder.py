"""A run's folder: the configuration that made it, the versions it ran with, its checkpoints."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from rope_mm.run import checkpoint

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def open_folder(out: Path, identity: str, accelerator: Accelerator, restart: bool) -> None:
    """Make the folder of a run, or refuse one that holds another run; `restart` empties it first.

    `identity` is all that the run depends on, the number of processes too where a batch depends on it.

    Raises:
        ValueError: with the first line that differs.
    """
    stored, folder = out / "run.yaml", out / "checkpoints"
    begun = checkpoint.latest(folder) is not None and stored.exists() and not restart
    if begun and (old := stored.read_text()) != identity:
        there, here = next(pair for pair in zip_lines(old, identity) if pair[0] != pair[1])
        raise ValueError(
            f"{out} holds a run of another configuration ({there.strip()!r} there, {here.strip()!r} here); "
            "choose another --out, or begin it anew with --restart"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not begun:
            checkpoint.clear(folder)
            for name in ("samples", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / "result.json").unlink(missing_ok=True)
        versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        checkpoint.write_text(stored, identity)
        checkpoint.write_text(out / "versions.json", json.dumps(versions, indent=1))
    accelerator.wait_for_everyone()


def is_done(out: Path, identity: str) -> bool:
    """Whether a folder holds a run that has its result; its identity may say more before these lines."""
    made = out / "run.yaml"
    if not made.exists() or not (out / "result.json").exists():
        return False
    return f"\n{made.read_text(encoding='utf-8')}".endswith(f"\n{identity}")


def zip_lines(old: str, new: str) -> list[tuple[str, str]]:
    """Lines of two texts side by side, the shorter one filled up."""
    a, b = old.splitlines(), new.splitlines()
    size = max(len(a), len(b)) + 1
    return list(zip(a + [""] * (size - len(a)), b + ["(end)"] * (size - len(b)), strict=True))


def resume(out: Path, accelerator: Accelerator) -> int:
    """Load the newest checkpoint, if there is one; the step from which to go on.

    Raises:
        ValueError: a checkpoint that is not whole.
    """
    newest = checkpoint.latest(out / "checkpoints")
    if newest is None:
        return 0
    checkpoint.verify(newest)
    accelerator.load_state(str(newest))
    return checkpoint.step_of(newest)


def save(out: Path, step: int, accelerator: Accelerator) -> None:
    """Write the checkpoint of a step, whole or not at all."""
    checkpoint.save(
        out / "checkpoints",
        step,
        lambda path: accelerator.save_state(str(path)),
        main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
