"""Accuracies of several schemes over several seeds: means, spreads, and which differences are noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.checks.extras import extra

SHUFFLES = 10_000
Summary = dict[str, dict[str, dict[str, Any]]]  # kind -> task -> what `describe` gives


def estimate_noise(scores: Tensor) -> dict[str, float | None]:
    """How far means of schemes differ by chance.

    Args:
        scores: accuracies (scheme, seed) in [0, 1].

    Returns:
        `differ`, Tukey's honest significant difference at 5 % of scheme means, the noise being what is left
        of the scores without scheme and seed; None with one seed. `p`, that of any difference at all: how
        often labels shuffled within each seed spread the means as far.
    """
    schemes, seeds = scores.shape
    centred = scores.double() - scores.double().mean(0)
    freedom = (schemes - 1) * (seeds - 1)
    differ = None
    if freedom:
        with extra("train"):
            from scipy.stats import studentized_range
        variance = (centred - centred.mean(1, keepdim=True)).square().sum().item() / freedom
        differ = float(studentized_range.ppf(0.95, schemes, freedom)) * (variance / seeds) ** 0.5
    shuffle = torch.rand(SHUFFLES, schemes, seeds, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = centred.expand(SHUFFLES, -1, -1).gather(1, shuffle).mean(2).square().sum(1)
    reached = int((shuffled >= centred.mean(1).square().sum() - 1e-12).sum())
    return {"differ": differ, "p": (1 + reached) / (1 + SHUFFLES)}


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Summary:
    """`describe` of each kind and task, and of "all", the mean of the tasks.

    Args:
        runs: scheme -> runs, one for each seed, with accuracies in run["metrics"][kind][task][form].
    """
    summary: Summary = {}
    first = next(iter(runs.values()))[0]["metrics"]
    for kind, tasks in first.items():
        scores = {
            task: torch.tensor(
                [[mean(run["metrics"][kind][task]) for run in seeds] for seeds in runs.values()]
            )
            for task in tasks
        }
        scores["all"] = torch.stack(list(scores.values())).mean(0)
        summary[kind] = {task: describe(list(runs), score) for task, score in scores.items()}
    return summary


def describe(schemes: Sequence[str], scores: Tensor) -> dict[str, Any]:
    """Scores, means and spreads by scheme, and the noise.

    Args:
        schemes: their names.
        scores: accuracies (scheme, seed).

    Returns:
        Also `best`: the schemes whose means differ from the best one by no more than noise.
    """
    means, noise = scores.mean(1).tolist(), estimate_noise(scores)
    spread = scores.std(1).tolist() if scores.shape[1] > 1 else [0.0] * len(means)
    margin = noise["differ"] or 0.0
    return {
        "scores": dict(zip(schemes, scores.tolist(), strict=True)),
        "mean": dict(zip(schemes, means, strict=True)),
        "spread": dict(zip(schemes, spread, strict=True)),
        "best": [name for name, score in zip(schemes, means, strict=True) if score >= max(means) - margin],
        **noise,
    }


def mean(forms: Mapping[str, float]) -> float:
    """The mean over a task's forms."""
    return sum(forms.values()) / len(forms)


def write_table(summary: Summary) -> str:
    """The summary as tables in Markdown, the best scheme first; bold are those that noise may explain."""
    text = "Right answers in %, mean ± standard deviation over seeds.\n"
    for kind, tasks in summary.items():
        order = sorted(tasks["all"]["mean"], key=lambda name: -tasks["all"]["mean"][name])
        rows = []
        for name in order:
            percent = ([100 * score for score in task["scores"][name]] for task in tasks.values())
            cells = zip((markdown.spread(scores, ".1f") for scores in percent), tasks.values(), strict=True)
            rows.append([name, *(f"**{cell}**" if name in t["best"] else cell for cell, t in cells)])
        margins = ["-" if t["differ"] is None else f"{100 * t['differ']:.1f}" for t in tasks.values()]
        rows.append(["differ by more than noise if by", *margins])
        rows.append(["p of no difference", *(f"{t['p']:.4f}" for t in tasks.values())])
        text += f"\n{markdown.table([f'{kind} sizes', *tasks], rows, '---:')}\n"
    return text


def draw_figure(path: Path, summary: Summary) -> None:
    """Write a panel for every kind and task: a dot for each seed, a bar for the mean, the noise shaded.

    Args:
        path: of the PNG file.
        summary: as `summarise` gives it.

    Raises:
        ValueError: no matplotlib.
    """
    columns = max(map(len, summary.values()))
    figure = new_figure(2.2 * columns, 2.8 * len(summary))
    grid = figure.subplots(len(summary), columns, sharey=True, squeeze=False)
    for row, (kind, tasks) in zip(grid, summary.items(), strict=True):
        for axes in row[len(tasks) :]:
            axes.set_visible(False)
        for axes, (task, numbers) in zip(row, tasks.items(), strict=False):
            names, best = list(numbers["mean"]), 100 * max(numbers["mean"].values())
            axes.barh(names, [100 * numbers["mean"][name] for name in names], color="lightsteelblue")
            for place, name in enumerate(names):
                scores = [100 * score for score in numbers["scores"][name]]
                axes.plot(scores, [place] * len(scores), "k.", markersize=3)
            axes.axvspan(best - 100 * (numbers["differ"] or 0), best, color="orange", alpha=0.3, linewidth=0)
            axes.set(title=f"{task}, {kind}", xlim=(0, 100))
            axes.tick_params(labelsize=7)
    grid[0, 0].invert_yaxis()
    save_figure(path, figure)
