"""The lock of an output folder: one command writes to it at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

HOLDER = ".lock-holder"  # names the process that writes to the folder


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """While entered, no other command writes to this folder; a new folder that stays empty is removed.

    Args:
        output_dir: the folder, made where there is none.

    Raises:
        ValueError: another command does; with its process number. A file in the way.
    """
    if file_in_the_way(output_dir):
        raise not_a_folder(output_dir)
    new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(output_dir / ".lock"), output_dir / HOLDER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise ValueError(
            f"{output_dir} is in use by {name}; wait for it, stop it, or choose another --output_dir"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        if new and all(file.name == ".lock" for file in output_dir.iterdir()):  # the run was refused
            (output_dir / ".lock").unlink()
            output_dir.rmdir()
        lock.release()


def file_in_the_way(folder: Path) -> Path | None:
    """The file that keeps a folder from being made: its own path or one above it."""
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return nearest if nearest.is_file() else None


def not_a_folder(folder: Path) -> ValueError:
    """The refusal of a folder that a file is in the way of, which another machine may not see."""
    return ValueError(
        f"{file_in_the_way(folder) or folder} is a file; give --output_dir a folder, which may be new"
    )
