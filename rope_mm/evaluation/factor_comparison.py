"""A factorial experiment of layouts, allocations of frequencies and theta: its choices, tables and figure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.evaluation.scheme_comparison import mean, summarise, write_table
from rope_mm.evaluation.variance import Share, share_variance

VALIDATION = "validation"  # key of the questions by which theta is chosen, and of their metrics
FACTORS = "layout", "allocation", "theta"


class Result(NamedTuple):
    """What one run came to.

    Attributes:
        cell: layout/allocation, or the name of a further row.
        theta: of its frequencies.
        seed: of its weights and documents.
        metrics: right answers, kind -> task -> form -> share.
    """

    cell: str
    theta: float
    seed: int
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]

    def score(self, kind: str) -> dict[str, float]:
        """Right answers by task, and of "all", the mean of the tasks.

        Args:
            kind: "trained", "untrained" or "validation".
        """
        tasks = {task: mean(forms) for task, forms in self.metrics[kind].items()}
        return {**tasks, "all": fmean(tasks.values())}


def choose_thetas(results: Iterable[Result]) -> dict[str, float]:
    """For every cell the theta with the most right answers to the validation part, tasks counted equally.

    Args:
        results: of the seed that is for choosing; of two equal thetas the first one is taken.
    """
    best: dict[str, Result] = {}
    for result in results:
        known = best.setdefault(result.cell, result)
        if result.score(VALIDATION)["all"] > known.score(VALIDATION)["all"]:
            best[result.cell] = result
    return {cell: result.theta for cell, result in best.items()}


def make_rows(
    results: Iterable[Result], complete: Sequence[str], kind: str, task: str
) -> list[dict[str, Any]]:
    """Rows for `share_variance`, of crossed cells alone.

    Args:
        results: of runs.
        complete: the layouts that have every allocation.
        kind: "trained" or "untrained".
        task: a task, or "all".
    """
    rows = []
    for result in results:
        layout, _, allocation = result.cell.partition("/")
        if allocation and layout in complete:
            score = result.score(kind)[task]
            factors = {"layout": layout, "allocation": allocation, "theta": f"{result.theta:g}"}
            rows.append({**factors, "seed": result.seed, "score": score})
    return rows


def complete_layouts(cells: Iterable[str]) -> list[str]:
    """Layouts that have as many allocations as any: the others would unbalance the analysis."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        layout, _, allocation = cell.partition("/")
        if allocation:
            found.setdefault(layout, []).append(allocation)
    most = max(map(len, found.values()), default=0)
    return [layout for layout, allocations in found.items() if len(allocations) == most]


def share_by_task(
    results: Sequence[Result], factors: Sequence[str], blocks: Sequence[str] = (), kind: str = "untrained"
) -> dict[str, list[Share]]:
    """The variance table of each task and of "all".

    Args:
        results: of one seed at every theta, or of several seeds at the chosen theta.
        factors: of FACTORS.
        blocks: such as "seed".
        kind: "trained" or "untrained".
    """
    complete = complete_layouts(dict.fromkeys(result.cell for result in results))
    tasks = results[0].score(kind)
    return {task: share_variance(make_rows(results, complete, kind, task), factors, blocks) for task in tasks}


def variance_table(tables: Mapping[str, Sequence[Share]]) -> str:
    """Shares in % with their 95 % intervals, a column for each task; bold where p < 0.05."""
    terms = [line.term for line in next(iter(tables.values()))]
    rows = [[term, *(write_share(lines[i]) for lines in tables.values())] for i, term in enumerate(terms)]
    return markdown.table(["share of variance, %", *tables], rows, "---:")


def write_share(line: Share) -> str:
    """A share and its interval, in %."""
    text = f"{100 * line.share:.0f}"
    if line.low is not None and line.high is not None:
        text += f" ({100 * line.low:.0f} to {100 * line.high:.0f})"
    return f"**{text}**" if line.p is not None and line.p < 0.05 else text


def by_cell(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results of each cell, by seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        found.setdefault(result.cell, []).append(result)
    return found


def cross_table(results: Sequence[Result], kind: str, task: str) -> str:
    """Right answers in % of layouts (rows) under allocations (columns), mean and deviation over seeds.

    Args:
        results: of several seeds at the chosen theta.
        kind: "trained" or "untrained".
        task: a task, or "all".
    """
    cells = {cell: of for cell, of in by_cell(results).items() if "/" in cell}
    layouts, allocations = (list(dict.fromkeys(cell.split("/")[i] for cell in cells)) for i in (0, 1))

    def write(layout: str, allocation: str) -> str:
        if (runs := cells.get(f"{layout}/{allocation}")) is None:
            return "-"
        percent = [100 * run.score(kind)[task] for run in runs]
        return f"{markdown.spread(percent, '.1f')} at {runs[0].theta:g}"

    rows = [[f"`{layout}`", *(write(layout, allocation) for allocation in allocations)] for layout in layouts]
    return markdown.table([f"{task}, {kind} sizes; at theta", *allocations], rows, "---:")


def rank_cells(results: Sequence[Result]) -> dict[str, Any]:
    """`summarise` of all cells; Tukey's test is within the seeds.

    Args:
        results: of several seeds at the chosen theta.
    """
    runs = {
        cell: [
            {"metrics": {kind: run.metrics[kind] for kind in run.metrics if kind != VALIDATION}} for run in of
        ]
        for cell, of in by_cell(results).items()
    }
    return summarise(runs)


def rank_factor(results: Sequence[Result], factor: str) -> dict[str, Any]:
    """`summarise` of the levels of a factor, each the mean over the cells that have it.

    Args:
        results: of several seeds at the chosen theta.
        factor: "layout" or "allocation".
    """
    complete = complete_layouts(dict.fromkeys(result.cell for result in results))
    place = FACTORS.index(factor)
    crossed = [result for result in results if result.cell.split("/")[0] in complete and "/" in result.cell]
    crossed.sort(key=lambda result: (result.cell.split("/")[place], result.seed))
    runs: dict[str, list[dict[str, Any]]] = {}
    for (level, _), of in groupby(crossed, lambda result: (result.cell.split("/")[place], result.seed)):
        runs.setdefault(level, []).append({"metrics": average_metrics([run.metrics for run in of])})
    return summarise(runs)


def average_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over runs, kind -> task -> form, without the validation part."""
    return {
        kind: {
            task: {form: fmean(run[kind][task][form] for run in metrics) for form in forms}
            for task, forms in tasks.items()
        }
        for kind, tasks in metrics[0].items()
        if kind != VALIDATION
    }


def form_table(results: Sequence[Result], cells: Sequence[str], task: str, kind: str = "untrained") -> str:
    """Right answers in % by form of a task, which differ in size: accuracy by size.

    Args:
        results: of several seeds at the chosen theta.
        cells: rows of the table.
        task: a task.
        kind: "trained" or "untrained".
    """
    runs = by_cell(results)
    averages = {cell: average_metrics([run.metrics for run in runs[cell]])[kind][task] for cell in cells}
    forms = list(next(iter(averages.values())))
    rows = [
        [f"`{cell}`", *(f"{100 * scores[form]:.0f}" for form in forms)] for cell, scores in averages.items()
    ]
    return markdown.table([f"{task}, {kind}", *forms], rows, "---:")


def describe_seeds(reported: Sequence[Result]) -> str:
    """A sentence on the seeds, and on what seed 0, by which theta was chosen, has more than the others."""
    seeds = sorted({result.seed for result in reported})
    scores = {
        seed: fmean(result.score("untrained")["all"] for result in reported if result.seed == seed)
        for seed in seeds
    }
    more = 100 * (scores[seeds[0]] - fmean(scores[seed] for seed in seeds[1:]))
    return (
        f"Right answers in %, seeds {', '.join(map(str, seeds))}; theta was chosen by seed {seeds[0]}, by "
        f"other questions than these, and has {more:+.1f} points beside the others at untrained sizes."
    )


def write_tables(first: Sequence[Result], reported: Sequence[Result]) -> str:
    """The tables of an experiment, in Markdown.

    Args:
        first: the seed of the choice at every theta.
        reported: several seeds at the chosen theta.
    """
    text = f"{describe_seeds(reported)}\n"
    text += "\nSeed 0 at every theta, untrained sizes; the residual holds the interaction of all three.\n\n"
    text += variance_table(share_by_task(first, FACTORS)) + "\n"
    for kind in ("untrained", "trained"):
        text += f"\nAt the theta chosen for each cell, {kind} sizes:\n\n"
        text += variance_table(share_by_task(reported, FACTORS[:2], ["seed"], kind)) + "\n"
        for task in reported[0].score(kind):
            text += f"\n{cross_table(reported, kind, task)}\n"
    for factor in FACTORS[:2]:
        text += f"\nBy {factor}: {write_table(rank_factor(reported, factor))}"
    text += f"\nAll cells: {write_table(rank_cells(reported))}"
    tasks, cells = reported[0].metrics["untrained"], list(by_cell(reported))
    return text + "".join(f"\n{form_table(reported, cells, task)}\n" for task in tasks)


def draw_factors(path: Path, first: Sequence[Result], reported: Sequence[Result]) -> None:
    """Write three panels: shares of variance with theta, those at the chosen theta, and right answers.

    Args:
        path: of the PNG file.
        first: the seed of the choice at every theta.
        reported: several seeds at the chosen theta.

    Raises:
        ValueError: no matplotlib.
    """
    figure = new_figure(15, 4.6)
    shares, chosen, answers = figure.subplots(1, 3, width_ratios=(2, 2, 3))
    draw_shares(shares, share_by_task(first, FACTORS), "three thetas, one seed")
    draw_shares(chosen, share_by_task(reported, FACTORS[:2], ["seed"]), "theta chosen for each cell")
    cells = by_cell(reported)
    names = sorted(cells, key=lambda cell: fmean(run.score("untrained")["all"] for run in cells[cell]))
    for place, cell in enumerate(names):
        scores = [100 * run.score("untrained")["all"] for run in cells[cell]]
        answers.barh(place, fmean(scores), color="lightsteelblue" if "/" in cell else "wheat")
        answers.plot(scores, [place] * len(scores), "k.", markersize=3)
    answers.set_yticks(range(len(names)), names, fontsize=6)
    answers.set(title="right answers at untrained sizes, %", xlim=(0, 100), ylim=(-0.5, len(names) - 0.5))
    save_figure(path, figure)


def draw_shares(axes: Any, tables: Mapping[str, Sequence[Share]], title: str) -> None:
    """Stacked bars, one for each task.

    Args:
        axes: of matplotlib.
        tables: task -> variance table.
        title: of the panel.
    """
    below = dict.fromkeys(tables, 0.0)
    for i, line in enumerate(next(iter(tables.values()))):
        shares = [100 * lines[i].share for lines in tables.values()]
        axes.bar(list(tables), shares, bottom=list(below.values()), label=line.term, color=f"C{i}")
        below = {task: below[task] + share for task, share in zip(tables, shares, strict=True)}
    axes.set(title=title, ylabel="share of variance, %")
    axes.legend(fontsize=7, loc="lower right")
