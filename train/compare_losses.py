"""The same training under several losses and seeds: a table, mean +- spread, and a picture.

    make bench-gan
    python train/compare_losses.py --config configs/adversarial/stacked-digits.yaml --out runs/losses

Each run is one of `train/adversarial.py` in OUT/<loss>-<seed>: the same command again resumes the one that
was interrupted and does not train again what is done. The picture wants matplotlib:
pip install rope-mm[plots].
"""

import json
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

from adversarial import Adversarial
from adversarial import main as train
from tqdm import tqdm

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.files import write_text
from rope_mm.training.config import run
from rope_mm.training.gan import GANConfig
from rope_mm.training.log import read_metrics
from rope_mm.training.loop import fingerprint
from rope_mm.training.run_dir import is_done

Runs = dict[str, list[dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class CompareLosses(Adversarial):
    """Train under every loss with every seed; the configuration is that of `train/adversarial.py`.

    A row is a loss and its penalties, "rpgan+r1+r2", whose gammas are those of `loss.penalties`.
    OUT/table.md, OUT/losses.json and OUT/losses.png are written as runs end.
    """

    out: str = "runs/losses"
    seeds: int = 3
    losses: list[str] = field(default_factory=lambda: ["ns", "rsgan", "rpgan+r1+r2", "gan-qp"])
    mark: str = "kl"  # what the picture shows over the steps


def objective(row: str, loss: GANConfig) -> GANConfig:
    """The loss of a row such as "rpgan+r1+r2".

    Raises:
        ValueError: a penalty without a gamma.
    """
    name, *penalties = row.split("+")
    if lacking := [penalty for penalty in penalties if penalty not in loss.penalties]:
        raise ValueError(f"losses: {row!r} needs a gamma, loss.penalties.{lacking[0]}")
    return replace(loss, name=name, penalties={penalty: loss.penalties[penalty] for penalty in penalties})


def runs(config: CompareLosses) -> list[tuple[str, Adversarial]]:
    """Every run with its row; all rows of one seed before the next, so that each has a number early.

    Raises:
        ValueError: nothing to compare.
    """
    if config.seeds < 1 or not config.losses:
        raise ValueError(f"there is nothing to compare: {config.seeds} seeds, {len(config.losses)} losses")
    common = {f.name: getattr(config, f.name) for f in fields(Adversarial)}
    found = []
    for seed, row in product(range(config.seed, config.seed + config.seeds), config.losses):
        own = {"out": f"{config.out}/{row}-{seed}", "seed": seed, "loss": objective(row, config.loss)}
        found.append((row, Adversarial(**common | own)))
    return found


def result(config: Adversarial) -> dict[str, float]:
    """The marks of a run, trained as far as it is not yet; none of a dry run."""
    out = Path(config.out)
    if config.restart or not is_done(out, fingerprint(config)):
        train(config)
    if config.dry_run:
        return {}
    return json.loads((out / "result.json").read_text())


def table(rows: Runs) -> str:
    """Markdown: a row for each loss, mean ± standard deviation of every mark over the seeds."""
    names = list(next(iter(rows.values()))[0])
    cells = {
        loss: [markdown.spread([mark[name] for mark in marks], ".4g", ".2g") for name in names]
        for loss, marks in rows.items()
    }
    lines = [[loss, len(rows[loss]), *row] for loss, row in cells.items()]
    return markdown.table(["loss", "seeds", *names], lines) + "\n"


def draw(path: Path, curves: dict[str, list[list[dict]]], mark: str) -> None:
    """A mark over the steps, a colour for each loss and a line for each seed.

    Raises:
        ValueError: no matplotlib, no such mark.
    """
    figure = new_figure(7, 5)
    axes = figure.subplots()
    for number, (loss, seeds) in enumerate(curves.items()):
        for seed, metrics in enumerate(seeds):
            seen = [(line["step"], line[mark]) for line in metrics if mark in line]
            if not seen:
                raise ValueError(f"the runs have no mark {mark!r}")
            label = loss if seed == 0 else None
            axes.plot(*zip(*seen, strict=True), f"C{number}.-", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel=mark, yscale="log")
    axes.legend()
    save_figure(path, figure, dpi=120)


def main(config: CompareLosses) -> None:
    """Run what is not yet done; table and picture after each run.

    Raises:
        ValueError: as `train/adversarial.py`; no matplotlib.
    """
    out, rows, curves = Path(config.out), {}, {}
    for name, each in (bar := tqdm(runs(config), desc="losses")):
        bar.set_postfix_str(each.out)
        marks = result(each)
        if not marks:
            continue
        rows.setdefault(name, []).append(marks)
        curves.setdefault(name, []).append(read_metrics(Path(each.out)))
        write_text(out / "losses.json", json.dumps(rows, indent=1))
        write_text(out / "table.md", table(rows))
        draw(out / "losses.png", curves, config.mark)
    if rows:
        print(f"\n{table(rows)}\n{out}/table.md   {out}/losses.png")


if __name__ == "__main__":
    run(main, CompareLosses)
