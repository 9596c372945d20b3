"""Files written whole or not at all: made aside, flushed to the disk, renamed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    from safetensors import SafetensorError
except ImportError:  # then nothing raises it
    SafetensorError = OSError


def write_text(path: Path, text: str) -> None:
    """A text file: the old one or the new one, never a part."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """A file made by `write(path)`, such as an image's `save`: the old one or the new one, never a part.

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

    Args:
        folder: where the files go.
        write: makes the files in the folder that it is given; every process calls it.
        main: whether this process moves the files to their place.
        wait: returns when all processes have called it.

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


def hidden(path: Path) -> Path:
    """The sibling in which a file or folder is prepared; its suffix gives writers the format."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def list_files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # other systems open no folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
