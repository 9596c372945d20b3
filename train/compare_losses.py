"""The same training under several losses and seeds: a table, mean ± standard deviation, and a figure.

    make bench-gan
    python train/compare_losses.py --config configs/adversarial/stacked-digits.yaml --output_dir runs/losses

Each run is one of `train/adversarial.py` in OUTPUT_DIR/<loss>-<seed>: the same command again resumes the one
that was interrupted and skips those that are finished. The figure needs matplotlib: pip install
rope-mm[plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from adversarial import Adversarial, unread
from adversarial import main as train
from tqdm import tqdm

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.files import write_text
from rope_mm.training.adversarial_loss import GANConfig
from rope_mm.training.config import option, override, run
from rope_mm.training.loop import fingerprint
from rope_mm.training.metrics_log import read_metrics
from rope_mm.training.run_dir import is_done
from rope_mm.training.run_page import write_comparison_page
from rope_mm.training.unread_keys import reset_unread

Runs = dict[str, list[dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class CompareLosses(Adversarial):
    """Train with every loss and every seed; the other keys are those of `train/adversarial.py`.

    A row of `losses` is a loss and its penalties, "rpgan+r1+r2", whose gammas are those of `loss.penalties`.
    A row of `rows` has a name and the keys that it changes.
    OUTPUT_DIR/table.md, losses.json and losses.png are written after each run, index.html at the end.
    """

    output_dir: str = option("runs/losses", "folder of all runs and of the table")
    seeds: int = option(3, "runs of each loss, from seed on", minimum=1)
    losses: list[str] = option(["ns", "rsgan", "rpgan+r1+r2", "gan-qp"], "rows of the table")
    rows: dict[str, dict[str, Any]] = option({}, "further rows: name -> the keys that it changes")
    metric: str = option("kl", "what the figure shows over the steps")


def loss_of(row: str, loss: GANConfig) -> GANConfig:
    """The loss of a row such as "rpgan+r1+r2", with the gammas of `loss`.

    Raises:
        ValueError: a penalty without a gamma.
    """
    name, *penalties = row.split("+")
    if lacking := [penalty for penalty in penalties if penalty not in loss.penalties]:
        raise ValueError(f"losses: {row!r} needs a gamma, loss.penalties.{lacking[0]}")
    return replace(loss, name=name, penalties={penalty: loss.penalties[penalty] for penalty in penalties})


def runs(config: CompareLosses) -> list[tuple[str, Adversarial]]:
    """Every run with its row, all rows of one seed before the next seed.

    Raises:
        ValueError: nothing to compare.
    """
    if not config.losses and not config.rows:
        raise ValueError("losses or rows must name at least one row of the table")
    if twice := sorted(set(config.losses) & set(config.rows)):
        raise ValueError(f"losses and rows both name {twice}")
    common = Adversarial(**{f.name: getattr(config, f.name) for f in fields(Adversarial)})
    chosen = {row: without_unread(replace(common, loss=loss_of(row, config.loss))) for row in config.losses}
    for row, changes in config.rows.items():
        rest = without_unread(override(common, changes, f"rows.{row}"))
        chosen[row] = override(
            rest, changes, f"rows.{row}"
        )  # a change of its own that nothing reads is refused
    if blind := [row for row, of_row in chosen.items() if not of_row.data.label]:
        raise ValueError(f"{blind[0]} would be measured by nothing: give data.label, the column of classes")
    return [
        (row, replace(of_row, output_dir=f"{config.output_dir}/{row}-{seed}", seed=seed))
        for seed, (row, of_row) in product(range(config.seed, config.seed + config.seeds), chosen.items())
    ]


def without_unread(config: Adversarial) -> Adversarial:
    """The run with the default of each common key that its row does not read."""
    return reset_unread(config, unread(config))


def result(config: Adversarial) -> dict[str, float]:
    """The metrics of a run, trained as far as it is not yet; none of a dry run."""
    output_dir = Path(config.output_dir)
    if config.dry_run or config.restart or not is_done(output_dir, fingerprint(config)):
        train(config)
    if config.dry_run:
        return {}
    return json.loads((output_dir / "result.json").read_text())


def table(rows: Runs) -> str:
    """Markdown: a row for each loss, mean ± standard deviation of every metric over the seeds."""
    names = list(next(iter(rows.values()))[0])
    cells = {
        loss: [markdown.spread([result[name] for result in results], ".4g", ".2g") for name in names]
        for loss, results in rows.items()
    }
    lines = [[loss, len(rows[loss]), *row] for loss, row in cells.items()]
    return markdown.table(["loss", "seeds", *names], lines) + "\n"


def draw_figure(path: Path, curves: dict[str, list[list[dict]]], metric: str) -> None:
    """A metric over the steps, a colour for each loss and a line for each seed.

    Args:
        path: the file.
        curves: loss -> for each seed the lines of its metrics.jsonl.
        metric: its name.

    Raises:
        ValueError: no matplotlib, no such metric.
    """
    figure = new_figure(7, 5)
    axes = figure.subplots()
    for number, (loss, seeds) in enumerate(curves.items()):
        for seed, metrics in enumerate(seeds):
            points = [(line["step"], line[metric]) for line in metrics if metric in line]
            if not points:
                raise ValueError(f"the runs have no metric {metric!r}")
            label = loss if seed == 0 else None
            axes.plot(*zip(*points, strict=True), f"C{number}.-", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel=metric, yscale="log")
    axes.legend()
    save_figure(path, figure, dpi=120)


def main(config: CompareLosses) -> None:
    """Run what is not finished; table and figure after each run, a page at the end.

    Raises:
        ValueError: as `train/adversarial.py`; no matplotlib.
    """
    output_dir, rows, curves, folders = Path(config.output_dir), {}, {}, {}
    for name, each in (bar := tqdm(runs(config), desc="losses")):
        bar.set_postfix_str(each.output_dir)
        metrics = result(each)
        if not metrics:
            continue
        rows.setdefault(name, []).append(metrics)
        folder = folders[f"{name}, seed {each.seed}"] = Path(each.output_dir)
        curves.setdefault(name, []).append(read_metrics(folder))
        write_text(output_dir / "losses.json", json.dumps(rows, indent=1))
        write_text(output_dir / "table.md", table(rows))
        draw_figure(output_dir / "losses.png", curves, config.metric)
    if rows and config.page:
        write_comparison_page(output_dir, table(rows), ["losses.png"], asdict(config), folders)
    if rows:
        print(f"\n{table(rows)}\n{output_dir}/table.md   {output_dir}/losses.png")


if __name__ == "__main__":
    run(main, CompareLosses, lock=True)
