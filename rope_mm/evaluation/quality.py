"""What heads draw in how many passes, and what their training took: a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure

REAL = "real test images"
TOOK = {"steps": ".0f", "TFLOP": ".2f", "CPU minutes": ".1f", "weights": ".0f"}  # how each is written
PERCENT = "recognised", "worst", "precision", "recall", "coverage"
MARKERS = "os^vD"
Runs = dict[str, list[dict[str, Any]]]  # head -> seeds -> TOOK, and "marks" by the number of passes


def write_table(real: Mapping[str, float], runs: Runs) -> str:
    """Two tables in Markdown: marks of every head and number of passes, and what training took."""
    lines = [[REAL, "", *(write_mark(name, [real[name]]) for name in real)]]
    for head, seeds in runs.items():
        for count in seeds[0]["marks"]:
            marks = [run["marks"][count] for run in seeds]
            lines.append([head, count, *(write_mark(name, [mark[name] for mark in marks]) for name in real)])
    names = [f"{name}, %" if name in PERCENT else name for name in real]
    took = [
        [head, *(markdown.spread([run[name] for run in seeds], form) for name, form in TOOK.items())]
        for head, seeds in runs.items()
    ]
    marks = markdown.table(["head", "passes", *names], lines, "---:")
    return f"{marks}\n\n{markdown.table(['training', *TOOK], took, '---:')}\n"


def write_mark(name: str, values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    share = name in PERCENT
    return markdown.spread([value * (100 if share else 1) for value in values], ".1f" if share else ".2f")


def draw_figure(path: Path, real: Mapping[str, float], runs: Runs) -> None:
    """Passes against marks: a line for the mean of each head's seeds, a small marker for each of them.

    Raises:
        ValueError: no matplotlib.
    """
    figure = new_figure(10, 4)
    axes = dict(zip(("frechet", "recognised", "coverage"), figure.subplots(1, 3), strict=True))
    ticks = sorted({int(count) for seeds in runs.values() for count in seeds[0]["marks"]})
    for mark, panel in axes.items():
        for number, (head, seeds) in enumerate(runs.items()):
            counts = list(map(int, seeds[0]["marks"]))
            seen = [[run["marks"][str(count)][mark] for run in seeds] for count in counts]
            look = f"C{number}{MARKERS[number % len(MARKERS)]}"
            panel.plot(counts, list(map(mean, seen)), f"{look}-", fillstyle="none", label=head)
            panel.plot(counts, seen, look, fillstyle="none", markersize=3)
        panel.axhline(real[mark], color="grey", linestyle="--", label=REAL)
        panel.set(title=mark, xlabel="passes of the model for a picture", xscale="log")
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
    axes["frechet"].set_yscale("log")
    axes["recognised"].legend()
    save_figure(path, figure)
