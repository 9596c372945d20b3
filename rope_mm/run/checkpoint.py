"""Checkpoints are numbered folders, step-000500, each whole or absent: written aside, flushed, renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], object],
    *,
    keep: int = 2,
    main: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> Path:
    """The checkpoint of this step, made by `write(path)`; afterwards the newest `keep` remain.

    A kill at any moment leaves the earlier checkpoints, or the new one as well, never a part of it. A step
    that is saved already stays as it is. With several processes all call it and write, the main one finishes:

        save(out, step, acc.save_state, main=acc.is_main_process, wait=acc.wait_for_everyone)

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
    remedy = "the earlier ones are whole: free space, and the same command goes on from the newest"
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


@contextmanager
def aside(partial: Path, name: str, remedy: str) -> Iterator[None]:
    """Whatever is raised where a file or folder cannot be written, as one sentence; its part is removed.

    Raises:
        OSError: in place of those of torch and safetensors, too.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise OSError(f"{name} could not be written ({reason(error)}); {remedy}") from error


def reason(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder; None where there is none."""
    return max(steps(folder), key=step_of, default=None)


def verify(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        ValueError: a file that is missing, cut short or changed.
    """
    remedy = "delete it to fall back to the one before, or start anew with --restart"
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
    """Remove what interrupted calls left of checkpoints."""
    for path in Path(folder).glob(".step-*.partial"):
        shutil.rmtree(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; it loses its number first, so that half of one is never taken for a whole."""
    shutil.rmtree(path.rename(hidden(path)))


def hidden(path: Path) -> Path:
    """The sibling in which a file or folder is prepared; its suffix tells writers the format."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder to the disk and list it: name -> [bytes, sha256]."""
    files = list_files(folder)
    manifest = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush(path)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """A file made by `write(path)`, such as a picture's `save`: the old one or the new one, never a part.

    Raises:
        OSError: what could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(hidden(path), str(path), "what was there is as it was"):
        write(hidden(path))
        flush(hidden(path))
    hidden(path).replace(path)


def write_folder(
    folder: Path,
    write: Callable[[Path], object],
    *,
    main: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Replace or add the files of a folder that `write(path)` makes: none unless all; other files stay.

    Processes share the work as in `save`.

    Raises:
        OSError: what could not be written.
    """
    partial = hidden(folder)
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    with aside(partial, str(folder), "what was there is as it was: free space, and give the same command"):
        write(partial)
        wait()
    if main:
        for file in list_files(partial):
            flush(file)
            (final := folder / file.relative_to(partial)).parent.mkdir(parents=True, exist_ok=True)
            file.replace(final)
        shutil.rmtree(partial)
    wait()


def list_files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_text(path: Path, text: str) -> None:
    """A text file: the old one or the new one, never a part."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # other systems open no folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
