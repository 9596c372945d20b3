"""The same training under several losses and seeds: a table, mean +- spread, and a picture.

    make bench-gan
    python train/compare_losses.py --config configs/adversarial/stacked-digits.yaml --out runs/losses

Each run is one of `train/adversarial.py` in OUT/<loss>-<seed>: the same command again resumes the one that
was interrupted and does not train again what is done. The picture wants matplotlib:
pip install rope-mm[plots].
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from adversarial import Adversarial, identify
from adversarial import main as train
from tqdm import tqdm

from rope_mm.run import checkpoint
from rope_mm.run.config import run
from rope_mm.run.log import read_metrics

Runs = dict[str, list[dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class CompareLosses(Adversarial):
    """Train under every loss with every seed; the configuration is that of `train/adversarial.py`.

    `losses` names the rows; each changes those keys of `loss` that it holds. OUT/table.md, OUT/losses.json
    and OUT/losses.png are written as runs end.
    """

    out: str = "runs/losses"
    seeds: int = 3
    losses: dict[str, Any] = field(
        default_factory=lambda: {
            "ns": {"name": "ns", "penalties": {}},
            "rsgan": {"name": "rsgan", "penalties": {}},
            "rpgan + r1 + r2": {},
            "gan-qp": {"name": "gan-qp", "penalties": {}},
        }
    )
    mark: str = "kl"  # what the picture shows over the steps


def runs(config: CompareLosses) -> list[tuple[str, Adversarial]]:
    """Every run with its row; all first seeds come first, so that each row has a number early.

    Raises:
        ValueError: no seeds, a loss with a key that the training does not have.
    """
    if config.seeds < 1 or not config.losses:
        raise ValueError(f"there is nothing to compare: {config.seeds} seeds, {len(config.losses)} losses")
    common = {f.name: getattr(config, f.name) for f in fields(Adversarial)}
    known, found = [f.name for f in fields(config.loss)], []
    for seed in range(config.seed, config.seed + config.seeds):
        for name, changes in config.losses.items():
            if unknown := sorted(set(changes) - set(known)):
                raise ValueError(f"losses.{name} has no {unknown}; a loss has {', '.join(known)}")
            out = str(Path(config.out) / f"{name.replace(' ', '')}-{seed}")
            loss = replace(config.loss, **changes)
            found.append((name, Adversarial(**(common | {"out": out, "seed": seed, "loss": loss}))))
    return found


def result(config: Adversarial) -> dict[str, float]:
    """The marks of a run, trained as far as it is not yet."""
    out = Path(config.out)
    done, made = out / "result.json", out / "run.yaml"
    whole = done.exists() and made.exists() and made.read_text().endswith("\n" + identify(config))
    if config.restart or not whole:
        train(config)
    return json.loads(done.read_text())


def table(rows: Runs) -> str:
    """Markdown: a row for each loss, mean and standard deviation of every mark over the seeds."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| loss | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for loss, marks in rows.items():
        values = torch.tensor([[mark[name] for name in names] for mark in marks], dtype=torch.float64)
        spread = values.std(0) if len(values) > 1 else torch.full_like(values[0], float("nan"))
        cells = [f"{m:.4g} ± {s:.2g}" for m, s in zip(values.mean(0).tolist(), spread.tolist(), strict=True)]
        lines.append(f"| {loss} | {len(marks)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: dict[str, list[list[dict]]], mark: str) -> None:
    """A mark over the steps, a colour for each loss and a line for each seed.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture wants matplotlib: pip install rope-mm[plots]") from None
    figure = Figure((7, 5), layout="constrained")
    axes = figure.subplots()
    for number, (loss, seeds) in enumerate(curves.items()):
        for seed, metrics in enumerate(seeds):
            seen = [(line["step"], line[mark]) for line in metrics if mark in line]
            label = loss if seed == 0 else None
            axes.plot(*zip(*seen, strict=True), f"C{number}.-", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel=mark, yscale="log")
    axes.legend()
    checkpoint.write_file(path, lambda part: figure.savefig(part, format="png", dpi=120))


def main(config: CompareLosses) -> None:
    """Run what is not yet done; table and picture after each run.

    Raises:
        ValueError: as `train/adversarial.py`; no matplotlib.
    """
    out, rows, curves = Path(config.out), {}, {}
    for name, each in (bar := tqdm(runs(config), desc="losses")):
        bar.set_postfix_str(each.out)
        marks = result(each)
        if config.dry_run or not marks:
            continue
        rows.setdefault(name, []).append(marks)
        curves.setdefault(name, []).append(read_metrics(Path(each.out)))
        checkpoint.write_text(out / "losses.json", json.dumps(rows, indent=1))
        checkpoint.write_text(out / "table.md", table(rows))
        draw(out / "losses.png", curves, config.mark)
    if rows:
        print(f"\n{table(rows)}\n{out}/table.md   {out}/losses.png")


if __name__ == "__main__":
    run(main, CompareLosses)
