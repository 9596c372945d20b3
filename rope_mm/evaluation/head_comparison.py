"""What image heads reach in how many passes, and what their training took: a table and a figure."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.evaluation.image_evaluators import FEATURES

REAL = "real test images"
COSTS = {"steps": ".0f", "TFLOP": ".2f", "CPU minutes": ".1f", "weights": ".0f"}  # how each is written
PERCENT = "accuracy", "worst_class_accuracy", "precision", "recall", "coverage"
PANELS = "frechet", "accuracy", "coverage"
MARKERS = "os^vD"
NOTE = (
    f"frechet is the distance in the {FEATURES} features of a small classifier trained on this data: it "
    "compares rows of this table, and is no FID."
)
# head -> seeds -> COSTS, "metrics" by `describe_sampling`, and "curve", the metrics by steps and passes
Runs = dict[str, list[dict[str, Any]]]


def describe_sampling(passes: int, noise_scale: float) -> str:
    """The number of passes, and the scale of the noise where it is not 1."""
    return f"{passes}" if noise_scale == 1 else f"{passes}, noise * {noise_scale:g}"


def write_table(real: Mapping[str, float], runs: Runs) -> str:
    """Two tables in Markdown: metrics of every head and number of passes, and what training took.

    Args:
        real: metrics of real images.
        runs: each head's runs, one for each seed.
    """
    lines = [[REAL, "", *(write_metric(name, [real[name]]) for name in real)]]
    for head, seeds in runs.items():
        for count in seeds[0]["metrics"]:
            found = [run["metrics"][count] for run in seeds]
            cells = (write_metric(name, [metrics[name] for metrics in found]) for name in real)
            lines.append([head, count, *cells])
    took = [
        [head, *(markdown.spread([run[name] for run in seeds], form) for name, form in COSTS.items())]
        for head, seeds in runs.items()
    ]
    metrics = markdown.table(["head", "passes", *map(name_column, real)], lines, "---:")
    return f"{metrics}\n\n{NOTE}\n\n{markdown.table(['training', *COSTS], took, '---:')}\n"


def name_column(name: str) -> str:
    """The title of a metric's column."""
    return f"{name}, %" if name in PERCENT else name


def write_metric(name: str, values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, shares in percent.

    Args:
        name: of the metric.
        values: of each seed.
    """
    share = name in PERCENT
    form = ".0f" if name == "samples" else ".1f" if share else ".2f"
    return markdown.spread([value * (100 if share else 1) for value in values], form)


def draw_figure(path: Path, real: Mapping[str, float], runs: Runs) -> None:
    """Passes against metrics: a line for the mean of each head's seeds, a small marker for each of them.

    Shown are images of noise that is not scaled.

    Args:
        path: of the PNG file.
        real: metrics of real images.
        runs: each head's runs, one for each seed.

    Raises:
        ValueError: no matplotlib.
    """
    figure = new_figure(10, 4)
    shown = [name for name in PANELS if name in real]
    axes = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True))
    passes = {
        head: [int(how) for how in seeds[0]["metrics"] if how.isdecimal()] for head, seeds in runs.items()
    }
    ticks = sorted(set(chain.from_iterable(passes.values())))
    for name, panel in axes.items():
        for number, (head, seeds) in enumerate(runs.items()):
            counts = passes[head]
            seen = [[run["metrics"][str(count)][name] for run in seeds] for count in counts]
            style = f"C{number}{MARKERS[number % len(MARKERS)]}"
            panel.plot(counts, list(map(mean, seen)), f"{style}-", fillstyle="none", label=head)
            panel.plot(counts, seen, style, fillstyle="none", markersize=3)
        panel.axhline(real[name], color="grey", linestyle="--", label=REAL)
        panel.set(title=name, xlabel="passes of the model for an image", xscale="log")
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
    if "frechet" in axes:
        axes["frechet"].set_yscale("log")
    axes["accuracy"].legend()
    save_figure(path, figure)
