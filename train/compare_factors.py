"""Which factor matters: the layout, the allocation of frequencies to axes, or theta? A factorial experiment.

    python train/compare_factors.py --config configs/factors/full.yaml --processes 2

Every layout is crossed with every allocation. Seed 0 runs every cell at every theta, and theta is chosen for
each cell by questions of a validation part, which are not those that are reported. The other seeds run at the
chosen theta. The same command again resumes; --processes shares the runs among processes of one thread each.
tables.md, factors.json and factors.png are written to OUTPUT_DIR.
Extras: rope-mm[train,plots].
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from compare_schemes import FREE, Benchmark, CompareSchemes, check, read_run, train
from tqdm import tqdm

from rope_mm.data.synthetic.qa_tasks import make_qa_samples
from rope_mm.evaluation.factor_comparison import (
    VALIDATION,
    Result,
    choose_thetas,
    complete_layouts,
    draw_factors,
    write_tables,
)
from rope_mm.evaluation.qa import encode_qa
from rope_mm.files import write_text
from rope_mm.training.config import option, run
from rope_mm.training.threads import choose_threads

NOT_OF_A_RUN = (*FREE, "layouts", "allocations", "thetas", "skipped", "processes", "augment", "baselines")


@dataclass(frozen=True, kw_only=True)
class CompareFactors(CompareSchemes):
    """Cross layouts with allocations and thetas; the same command again resumes."""

    layouts: dict[str, dict[str, Any]] = option({}, "name of a layout -> fields of rope_parameters")
    allocations: dict[str, dict[str, Any]] = option({}, "name of an allocation -> fields of rope_parameters")
    thetas: list[float] = option([10.0, 100.0, 1000.0], "of which each cell is given its best", above=0)
    skipped: dict[str, str] = option({}, "layout/allocation -> why this cell makes no sense")
    processes: int = option(1, "that share the runs", minimum=1)


class Cell(NamedTuple):
    """A row of the experiment.

    Attributes:
        name: layout/allocation, or a key of `schemes`.
        rope: fields of rope_parameters.
        thetas: at which it is run.
    """

    name: str
    rope: dict[str, Any]
    thetas: list[float]


class Run(NamedTuple):
    """One model to train: a cell's name and fields, theta, seed."""

    cell: str
    rope: dict[str, Any]
    theta: float
    seed: int


class FactorBenchmark(Benchmark):
    """Also has the validation part: other questions of the untrained forms, half as many."""

    def __init__(self, config: CompareSchemes):
        super().__init__(config)
        for task, forms in config.untrained.items():
            for form, sizes in forms.items():
                samples = make_qa_samples(task, sizes, -(-config.eval_samples // 2), VALIDATION)
                encoded = [encode_qa(sample, self.size, self.tokenizer) for sample in samples]
                self.questions[VALIDATION, task, form] = encoded


def list_cells(config: CompareFactors) -> list[Cell]:
    """The product of layouts and allocations but for skipped cells, then the further rows.

    A further row that names a theta is run at that one alone.

    Raises:
        ValueError: a skipped cell that does not exist.
    """
    product = {
        f"{layout}/{allocation}": {**place, **allot}
        for layout, place in config.layouts.items()
        for allocation, allot in config.allocations.items()
    }
    if unknown := sorted(set(config.skipped) - set(product)):
        raise ValueError(f"skipped names {unknown}, which are not among {list(product)}")
    crossed = [
        Cell(name, rope, config.thetas) for name, rope in product.items() if name not in config.skipped
    ]
    rows = [
        Cell(name, rope, [rope["theta"]] if "theta" in rope else config.thetas)
        for name, rope in config.schemes.items()
    ]
    return crossed + rows


def check_levels(config: CompareFactors, cells: Sequence[Cell]) -> None:
    """Refuse an experiment whose analysis of variance would have no residual, before anything is trained.

    Raises:
        ValueError: fewer than two levels of a factor, those of incomplete layouts not counted.
    """
    layouts = complete_layouts(cell.name for cell in cells)
    crossed = [cell.name.partition("/") for cell in cells]
    allocations = {allocation for layout, _, allocation in crossed if allocation and layout in layouts}
    levels = {"layouts": set(layouts), "allocations": allocations, "thetas": set(config.thetas)}
    for factor, found in levels.items():
        if len(found) < 2:
            raise ValueError(
                f"{factor} must have two or more levels, each crossed with all others, not {sorted(found)}; "
                "give more, such as those of --config configs/factors/full.yaml, or compare named schemes by "
                "train/compare_schemes.py"
            )


def first_runs(cells: Sequence[Cell], thetas: Sequence[float]) -> list[Run]:
    """Seed 0 of every cell at every theta, one theta after another, so that any part of it is balanced."""
    own = [theta for cell in cells for theta in cell.thetas if theta not in thetas]
    every = dict.fromkeys([*thetas, *own])
    return [Run(cell.name, cell.rope, theta, 0) for theta in every for cell in cells if theta in cell.thetas]


def later_runs(cells: Sequence[Cell], chosen: dict[str, float], seeds: int) -> list[Run]:
    """The other seeds at the theta chosen for each cell, one seed after another."""
    return [Run(cell.name, cell.rope, chosen[cell.name], seed) for seed in range(1, seeds) for cell in cells]


@cache
def make_benchmark(config: str) -> tuple[CompareFactors, FactorBenchmark]:
    """A configuration from its JSON, and its questions; made once in each process."""
    read = CompareFactors(**json.loads(config))
    choose_threads(read.threads)
    return read, FactorBenchmark(read)


def finish_run(config: str, fields: tuple[Any, ...]) -> dict[str, Any]:
    """The result of a run: read where it is finished, trained and written else.

    Args:
        config: as JSON, which other processes are given.
        fields: the fields of a Run.
    """
    chosen = Run(*fields)
    read, benchmark = make_benchmark(config)
    rope = {**chosen.rope, "theta": chosen.theta}
    settings = {name: value for name, value in asdict(read).items() if name not in NOT_OF_A_RUN}
    settings |= {"rope": rope, "seed": chosen.seed, "moves": read.augment.get(chosen.cell, {})}
    if chosen.cell in read.baselines:
        settings["baseline"] = read.baselines[chosen.cell]
    name = f"{chosen.cell.replace('/', '_')}-theta{chosen.theta:g}-{chosen.seed}.json"
    path = Path(read.output_dir) / "runs" / name
    if done := read_run(path, settings):
        return done
    alone = replace(read, schemes={chosen.cell: rope})
    result = {"settings": settings, **train(alone, benchmark, chosen.cell, chosen.seed, tqdm(disable=True))}
    write_text(path, json.dumps(result, indent=1))
    return result


def finish_runs(config: CompareFactors, plan: Sequence[Run], title: str) -> list[Result]:
    """The results of runs in their order, by as many processes as the configuration says.

    Args:
        config: of the experiment.
        plan: the runs.
        title: of the bar that shows how many are finished.
    """
    text, runs = json.dumps(asdict(config)), list(map(tuple, plan))
    if config.processes == 1:
        done = list(tqdm(map(partial(finish_run, text), runs), title, len(plan)))
    else:
        # by a name that other processes can import, also where this file is run as __main__
        from compare_factors import finish_run as finish_there

        # not forked: torch's threads would not survive it
        with ProcessPoolExecutor(config.processes, get_context("spawn")) as pool:
            done = list(tqdm(pool.map(partial(finish_there, text), runs), title, len(plan)))
    return [
        Result(one.cell, one.theta, one.seed, round_metrics(result["metrics"]))
        for one, result in zip(plan, done, strict=True)
    ]


def round_metrics(metrics: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of right answers with four digits, which float32 has more than enough of."""
    return {
        kind: {
            task: {form: round(share, 4) for form, share in forms.items()} for task, forms in tasks.items()
        }
        for kind, tasks in metrics.items()
    }


def main(config: CompareFactors) -> None:
    """Run what is not finished; the tables of all runs.

    Raises:
        ValueError: a configuration that makes no experiment, runs of another one in its folder.
    """
    cells = list_cells(config)
    check_levels(config, cells)
    check(replace(config, schemes={cell.name: cell.rope for cell in cells}))
    if config.seeds < 2:
        raise ValueError(f"seeds must be 2 or more, not {config.seeds}: one leaves no noise to compare with")
    first = finish_runs(config, first_runs(cells, config.thetas), "seed 0")
    chosen = choose_thetas(first)
    later = finish_runs(config, later_runs(cells, chosen, config.seeds), "other seeds")
    at_choice = {one.cell: one for one in first if one.theta == chosen[one.cell]}
    at_theta = [at_choice[cell.name] for cell in cells] + later
    out, tables = Path(config.output_dir), write_tables(first, at_theta)
    report = {
        "settings": {name: value for name, value in asdict(config).items() if name not in FREE},
        "theta": chosen,
        "runs": [result._asdict() for result in first + later],
    }
    write_text(out / "factors.json", json.dumps(report))
    write_text(out / "tables.md", tables)
    draw_factors(out / "factors.png", first, at_theta)
    print(f"{tables}\n{out}/tables.md, factors.json, factors.png")


if __name__ == "__main__":
    run(main, CompareFactors, lock=True)
