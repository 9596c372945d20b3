"""A run's folder: the configuration that made it, the versions it ran with, its checkpoints."""

import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from rope_mm.files import write_folder, write_text
from rope_mm.training import checkpoint

PACKAGES = ("torch", "transformers", "accelerate", "datasets")
DONE = ("model", "result.json")
MADE = ("checkpoints", "samples", "metrics.jsonl", *DONE)


def open_folder(out: Path, identity: str, accelerator: Accelerator, restart: bool) -> None:
    """Make the folder of a run; `restart` empties it first, and nothing else does.

    `identity` is all that the run depends on, the number of processes too where a batch depends on it.

    Raises:
        ValueError: see `check_folder`.
    """
    if not restart:
        check_folder(out, identity)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if restart:
            checkpoint.clear(out / "checkpoints")
            for name in ("samples", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / "result.json").unlink(missing_ok=True)
        versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        write_text(out / "run.yaml", identity)
        write_text(out / "versions.json", json.dumps(versions, indent=1))
    accelerator.wait_for_everyone()


def check_folder(out: Path, identity: str) -> None:
    """Refuse a folder with anything that this run would write over and cannot go on from.

    Raises:
        ValueError: with the first line that differs from another run's, or what there is of none.
    """
    stored, remedy = out / "run.yaml", "choose another --out, or begin it anew with --restart"
    known, begun = stored.exists(), checkpoint.latest(out / "checkpoints") is not None
    if known and (old := stored.read_text(encoding="utf-8")) != identity:
        there, here = next(pair for pair in zip_lines(old, identity) if pair[0] != pair[1])
        raise ValueError(
            f"{out} holds a run of another configuration ({there.strip()!r} there, {here.strip()!r} here); "
            f"{remedy}"
        )
    lacking, lost = ("checkpoint", DONE) if known else ("run.yaml", MADE)
    found = [name for name in lost if (out / name).exists()]
    if found and not (known and begun):
        raise ValueError(f"{out} holds {', '.join(found)}, but no {lacking} to go on from; {remedy}")


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


def write_model(out: Path, write: Callable[[Path], object], accelerator: Accelerator) -> None:
    """Write the model of a run to OUT/model: all of it, or where that fails, nothing."""
    main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    write_folder(out / "model", write, main=main, wait=wait)
