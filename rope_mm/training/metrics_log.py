"""The metrics of a run: one JSON object per line in metrics.jsonl, and a progress bar."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from rope_mm.files import write_text

FILE = "metrics.jsonl"


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, above the progress bar if there is one.

    Args:
        text: the line.
        file: stderr where none is given.
    """
    tqdm.write(text, file=file or sys.stderr)


class Log:
    """The metrics of a run, step by step.

        with Log(folder, total=1000, step=start, desc="gan") as log:
            log(step, **{"loss/critic": 0.69})         # first log, then save the step's checkpoint

    Resumed at a step, it drops the lines after it, and writes no line of that step again; step 0 starts a
    new file. So an interrupted and resumed run leaves the same file as an uninterrupted one.

    Args:
        folder: where metrics.jsonl lies.
        total: the last step of the run.
        step: the step at which the run starts or resumes.
        desc: text before the bar.
        main: False in every process but one; then nothing is written.
        bar: a bar that redraws itself, or a line now and then; None: a bar where stderr is a terminal.
        pause: seconds between such lines.
        also: called with every line, `also({name: value}, step=step)`, such as `Accelerator.log`.

    Raises:
        ValueError: a metrics.jsonl that holds something else.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        step: int = 0,
        *,
        desc: str = "",
        main: bool = True,
        bar: bool | None = None,
        pause: float = 10.0,
        also: Callable[..., object] = lambda metrics, step: None,
    ):
        self.total, self.desc, self.main, self.pause, self.also = total, desc, main, pause, also
        self.file: TextIO | None = None
        self.bar: tqdm | None = None
        self.printed = -math.inf
        self.start, self.written = step, set()  # names in the lines of the step that is resumed at
        if not main:
            return
        path = Path(folder) / FILE
        write_text(path, "".join(kept := kept_lines(path, step)))
        self.written = {tuple(line) for line in map(json.loads, kept) if line["step"] == step}
        self.file = path.open("a", encoding="utf-8")
        if sys.stderr.isatty() if bar is None else bar:
            self.bar = tqdm(total=total, initial=step, desc=desc or None, dynamic_ncols=True)

    def __call__(self, step: int, aside: Mapping[str, float] | None = None, /, **metrics: Any) -> None:
        """Write a line of finite numbers, tensors of one number, or text.

        Args:
            step: the step that the line is about.
            aside: numbers that are shown and not written, such as speed.
            metrics: name -> value.

        Raises:
            ValueError: a number that is not finite.
        """
        line = {"step": step} | {name: read_metric(name, value, step) for name, value in metrics.items()}
        if self.file is None or (step == self.start and tuple(line) in self.written):
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        line |= aside or {}
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.items()}
        del shown["step"]
        sent = {name: x for name, x in line.items() if name not in ("step", "ETA")}
        self.also(sent, step=step)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(shown)
            if "warning" in shown:
                say(f"{step}: {shown['warning']}")
        elif step >= self.total or "warning" in shown or time.monotonic() - self.printed >= self.pause:
            self.printed = time.monotonic()
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            say(f"{self.desc} {step}/{self.total}  {numbers}".strip())

    def close(self) -> None:
        """Close the file and the bar."""
        for part in (self.file, self.bar):
            if part is not None:
                part.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metric(name: str, value: Any, step: int) -> float | str:
    """A metric as it is written.

    Args:
        name: of the metric.
        value: a number, a tensor of one number, or text.
        step: that the message names.
    """
    if isinstance(value, str):
        return value
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{name} is {number} at step {step}; restart with lower learning rates")
    return number


def kept_lines(path: Path, step: int) -> list[str]:
    """The lines up to a step of a file of metrics; a torn last line is dropped."""
    if step <= 0 or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: is not a line of metrics; repair or delete the file"
                ) from None
    return kept


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics, oldest first; a last line that a kill has cut is dropped."""
    return [json.loads(line) for line in kept_lines(Path(folder) / FILE, sys.maxsize)]
