"""What image heads reach after how much training: a table and a figure.

Points lie on the way of one run each: its learning rate is still to fall there, and a whole run of that
length may end closer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.evaluation.head_comparison import MARKERS, REAL, Runs, name_column, write_metric

SHOWN = "frechet", "accuracy", "recall"
COMPUTE, REAL_POINT = "TFLOP", "real"
# of a seed: numbers of steps -> the metrics after these, each by its number of passes
Curve = dict[int, dict[str, dict[str, float]]]


def name_metric(name: str, source: str) -> str:
    """The name of a metric in the log of a run.

    Args:
        name: of the metric.
        source: of the images: a number of passes, or REAL_POINT.
    """
    return f"{name}/{source}"


def log_point(found: Mapping[str, Mapping[str, float]], real: Mapping[str, float]) -> dict[str, float]:
    """What the log of a run holds of a point; the metrics of real images tell by which classifier it is.

    Args:
        found: number of passes -> metrics.
        real: metrics of real images.
    """
    sources = {**found, REAL_POINT: real}
    return {
        name_metric(name, source): sources[source][name] for source in sources for name in sources[source]
    }


def read_curve(
    lines: Iterable[Mapping[str, Any]], passes: Sequence[str], real: Mapping[str, float]
) -> tuple[Curve, int]:
    """The points of a run, from its log, and how many of another evaluation were dropped.

    Of a step that is logged twice, the later line counts. A point is of another evaluation if it lacks a
    number of passes, or if the same real images have other metrics there: another classifier, or others.

    Args:
        lines: of the log, oldest first.
        passes: numbers of passes to look for.
        real: metrics of real images, by the evaluation of this command.
    """
    points = {line["step"]: line for line in lines if any(key.endswith(f"/{REAL_POINT}") for key in line)}
    wanted = {name_metric(name, count) for name in real for count in passes}
    curve = {
        step: {count: {name: line[name_metric(name, count)] for name in real} for count in passes}
        for step, line in points.items()
        if wanted <= line.keys()
        and all(
            math.isclose(line.get(name_metric(name, REAL_POINT), math.nan), value, rel_tol=1e-6)
            for name, value in real.items()
        )
    }
    return curve, len(points) - len(curve)


def has_curves(real: Mapping[str, float], runs: Runs) -> bool:
    """Whether a run has a point before its end, and images are enough for a distance."""
    return "frechet" in real and any(len(run["curve"]) > 1 for seeds in runs.values() for run in seeds)


def best_points(seeds: Sequence[dict[str, Any]]) -> list[tuple[float, str, list[dict[str, float]]]]:
    """The compute, the number of passes with the smallest mean distance there, and each seed's metrics.

    Steps that were not evaluated in every seed are no points.

    Args:
        seeds: the runs of a head, with `curve`.
    """
    points = []
    for step in sorted(set.intersection(*(set(run["curve"]) for run in seeds)), key=int):
        found = [run["curve"][step] for run in seeds]
        best = min(found[0], key=lambda count: mean(metrics[count]["frechet"] for metrics in found))
        compute = mean(run[COMPUTE] for run in seeds) * int(step) / seeds[0]["steps"]
        points.append((compute, best, [metrics[best] for metrics in found]))
    return points


def write_curves(real: Mapping[str, float], runs: Runs) -> str:
    """A table in Markdown: a line for each head and point, at its best number of passes.

    Args:
        real: metrics of real images.
        runs: each head's runs, one for each seed, with `curve`.
    """
    shown = [name for name in SHOWN if name in real]
    lines = [
        [head, f"{compute:.3g}", count, *(write_metric(name, [m[name] for m in found]) for name in shown)]
        for head, seeds in runs.items()
        for compute, count, found in best_points(seeds)
    ]
    titles = ["head", COMPUTE, "best passes", *map(name_column, shown)]
    return markdown.table(titles, lines, "---:") + "\n"


def draw_curves(path: Path, real: Mapping[str, float], runs: Runs) -> None:
    """Compute against metrics: a line for the mean of each head's seeds, a small marker for each of them.

    Args:
        path: of the PNG file.
        real: metrics of real images.
        runs: each head's runs, one for each seed, with `curve`.

    Raises:
        ValueError: no matplotlib.
    """
    figure = new_figure(10, 4)
    shown = [name for name in SHOWN if name in real]
    for name, panel in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for number, (head, seeds) in enumerate(runs.items()):
            points = best_points(seeds)
            compute = [point[0] for point in points]
            found = [[metrics[name] for metrics in point[2]] for point in points]
            style = f"C{number}{MARKERS[number % len(MARKERS)]}"
            panel.plot(compute, list(map(mean, found)), f"{style}-", fillstyle="none", label=head)
            panel.plot(compute, found, style, fillstyle="none", markersize=3)
        panel.axhline(real[name], color="grey", linestyle="--", label=REAL)
        panel.set(
            title=name, xlabel=f"{COMPUTE} of training", yscale="log" if name == "frechet" else "linear"
        )
        if name == "accuracy":
            panel.legend()
    save_figure(path, figure)
