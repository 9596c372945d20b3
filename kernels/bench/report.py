"""What a bench found, as a JSON file, and where it was found."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def version(package: str) -> str:
    """The version of an installed package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of this checkout, with + where files have changed since; "unknown" outside of git."""
    try:
        found = [
            subprocess.run(["git", *ask], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for ask in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + "+" * bool(found[1])


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def provenance(packages: Iterable[str]) -> dict[str, str]:
    """Where, with what, by which command and at which commit."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
    }


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file under another name, then give it its own: so no reader sees half of it."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """The content as JSON, whole."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
