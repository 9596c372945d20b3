"""OUTPUT_DIR/history.jsonl: which commands trained a run, when, from which step, and how each ended."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rope_mm import __version__
from rope_mm.files import write_text

FILE = "history.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def command() -> str:
    """The command of this process, as it may be given again."""
    program, *arguments = sys.orig_argv
    return shlex.join([Path(program).name, *arguments])


def versions() -> dict[str, str]:
    """Python, this package and those that a result depends on -> their versions."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "rope_mm": __version__} | found


def read_history(output_dir: Path) -> list[dict[str, Any]]:
    """What happened to a run, oldest first; nothing where none is recorded."""
    path = output_dir / FILE
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def record(output_dir: Path, event: str, step: int, **more: Any) -> None:
    """Add what happens to a run now.

    Args:
        output_dir: the run's folder.
        event: in words.
        step: number of steps done.
        more: what else there is to say.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = [*read_history(output_dir), {"time": now, "event": event, "step": step, **more}]
    write_text(output_dir / FILE, "".join(json.dumps(line) + "\n" for line in lines))


def record_command(
    output_dir: Path, step: int, steps: int, processes: int, constant_schedule: bool = False
) -> None:
    """Record that this command begins or goes on with a run, and the schedule of one that is extended.

    Args:
        output_dir: the run's folder.
        step: number of steps done before.
        steps: of the whole run.
        processes: how many train.
        constant_schedule: whether no rate depends on `steps`.
    """
    before = next((line["steps"] for line in reversed(read_history(output_dir)) if "steps" in line), steps)
    event = f"resumed, to step {steps}" if step else f"begun, to step {steps}"
    if step and before != steps:
        rates = "rates are constant" if constant_schedule else f"from here rates are those of {steps} steps"
        event = f"extended from {before} to {steps} steps; {rates}"
    own = {"steps": steps, "processes": processes, "command": command(), "versions": versions()}
    record(output_dir, event, step, **own)


def history_rows(lines: list[dict[str, Any]]) -> list[tuple[str, int, str, str, str]]:
    """Time, step, event, versions and command of each line, versions only where they are new.

    Args:
        lines: of `read_history`.
    """
    rows, known = [], None
    for line in lines:
        found: Mapping[str, str] | None = line.get("versions")
        new = found if found != known else None
        known = found or known
        said = ", ".join(f"{name} {number}" for name, number in (new or {}).items())
        processes = f" ({line['processes']} processes)" if line.get("processes", 1) > 1 else ""
        time = line["time"].replace("T", " ").removesuffix("+00:00")
        rows.append((time, line["step"], line["event"] + processes, said, line.get("command", "")))
    return rows
