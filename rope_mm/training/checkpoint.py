"""Checkpoints: numbered folders, step-000500, each whole or absent: written aside, flushed, renamed."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rope_mm.files import aside, flush, hidden, list_files

MANIFEST = "manifest.json"


class Stateful(Protocol):
    """What has a state to save."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Continue from it."""
        ...


class Count:
    """A number that an interrupted run continues with."""

    def __init__(self):
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        """The number."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from what `state_dict` returned."""
        self.count = state["count"]


class TrainingState:
    """All state of a run but models and optimizers, each part under its name.

    Args:
        parts: name -> what has a state.
    """

    def __init__(self, parts: Mapping[str, Stateful]):
        self.parts = dict(parts)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: a state with other parts.
        """
        if state.keys() != self.parts.keys():
            raise ValueError(
                f"the checkpoint has the states {', '.join(state)}, this run has {', '.join(self.parts)}; "
                "start anew with --restart"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], object],
    *,
    keep: int = 2,
    main: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> Path:
    """The checkpoint of a step, made by `write(path)`; afterwards only the newest `keep` remain.

    A kill at any moment leaves the earlier checkpoints, or the new one as well, never a part of it. A step
    that is saved already stays as it is. With several processes all call it and write, the main one finishes:

        save(out, step, acc.save_state, main=acc.is_main_process, wait=acc.wait_for_everyone)

    Args:
        folder: of all checkpoints.
        step: the number of this one.
        write: fills a folder.
        keep: how many checkpoints remain.
        main: whether this is the main process.
        wait: waits for all processes.

    Raises:
        ValueError: keep below 1.
        OSError: what could not be written, on a full disk; the part of it that was is removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, not {keep}")
    final = Path(folder) / f"step-{step:06d}"
    partial = hidden(final)
    if final.exists():
        return final
    if main:
        clear_partial(folder)
        partial.mkdir(parents=True)
    wait()
    remedy = "the earlier ones are whole: free space, and the same command resumes from the newest"
    with aside(partial, f"checkpoint {final}", remedy):
        write(partial)
        wait()
        if main:
            write_manifest(partial)
    if main:
        partial.rename(final)
        flush(final.parent)
        for path in steps(folder)[:-keep]:
            remove(path)
    wait()
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder; None where there is none."""
    return max(steps(folder), key=step_of, default=None)


def verify(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        ValueError: a file that is missing, cut short or changed.
    """
    remedy = "delete it to use the one before, or start anew with --restart"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(f"checkpoint {path} is damaged: it has no readable {MANIFEST}; {remedy}") from None
    for name, (size, digest) in manifest.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing; {remedy}")
        if file.stat().st_size != size:
            found = f"{name} has {file.stat().st_size} bytes, its manifest says {size}"
            raise ValueError(f"checkpoint {path} is damaged: {found}; {remedy}")
        if sha256(file) != digest:
            raise ValueError(f"checkpoint {path} is damaged: {name} is not what was written; {remedy}")


def step_of(path: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """All checkpoints of a folder, oldest first."""
    return sorted((p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def clear(folder: Path) -> None:
    """Remove all checkpoints of a folder, newest first."""
    for path in reversed(steps(folder)):
        remove(path)
    clear_partial(folder)


def clear_partial(folder: Path) -> None:
    """Remove the unfinished checkpoints of interrupted calls."""
    for path in Path(folder).glob(".step-*.partial"):
        shutil.rmtree(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; it loses its number first, so that a half-deleted one is not taken for a whole."""
    shutil.rmtree(path.rename(hidden(path)))


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder to the disk and list it: name -> [bytes, sha256]."""
    files = list_files(folder)
    manifest = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush(path)


def sha256(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
