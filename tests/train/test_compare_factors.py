"""The factorial experiment on models of toy size: which runs it makes, how it goes on, what it writes."""

import json
from dataclasses import replace
from pathlib import Path

import compare_factors as factors
import pytest

from rope_mm.models.configuration_rope_mm import read_rope
from rope_mm.training.config import load

CONFIGS = Path(__file__).parents[2] / "configs" / "factors"
TOY = """
steps: 2
global_batch_size: 4
documents: 16
eval_samples: 4
threads: 1
seeds: 3
thetas: [100.0, 10.0]
model: {patch_size: 8, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1}
layouts: {grid: {layout: grid}, tv: {layout: rope-tv}}
allocations: {chunk: {ownership: chunk}, own: {ownership: chunk, ladder: own}}
schemes: {flat: {layout: flat}, still: {layout: flat, freq_scale: 0.0, theta: 7.0}}
augment: {flat: {rescale: 2.0}}
trained: {cell: {2x3: {rows: 2, columns: 3, cell: 8}}}
untrained: {cell: {3x2: {rows: 3, columns: 2, cell: 8}}, sprite: {1x1: {size: 8}}}
"""


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "toy.yaml").write_text(TOY)
    return ["--config", str(tmp_path / "toy.yaml"), "--output_dir", str(tmp_path / "out")]


def configure(flags):
    return load(factors.CompareFactors, flags)


def test_an_experiment_without_layouts_names_the_key_and_a_configuration():
    with pytest.raises(ValueError, match=r"layouts must have two or more.* configs/factors/full\.yaml"):
        factors.main(load(factors.CompareFactors, ["--schemes", "{}"]))


def test_seed_0_has_every_cell_at_every_theta_one_theta_after_another(flags):
    config = configure(flags)
    plan = factors.first_runs(factors.list_cells(config), config.thetas)
    crossed = ["grid/chunk", "grid/own", "tv/chunk", "tv/own", "flat"]
    expected = [(cell, theta, 0) for theta in (100.0, 10.0) for cell in crossed] + [("still", 7.0, 0)]
    assert [(run.cell, run.theta, run.seed) for run in plan] == expected
    assert plan[1].rope == {"layout": "grid", "ownership": "chunk", "ladder": "own"}


def test_other_seeds_run_at_the_theta_of_their_cell_one_seed_after_another(flags):
    cells = factors.list_cells(configure(flags))[:2]
    plan = factors.later_runs(cells, {"grid/chunk": 10.0, "grid/own": 100.0}, 3)
    found = [(run.cell, run.theta, run.seed) for run in plan]
    assert found == [
        ("grid/chunk", 10.0, 1),
        ("grid/own", 100.0, 1),
        ("grid/chunk", 10.0, 2),
        ("grid/own", 100.0, 2),
    ]


def test_questions_of_the_validation_part_are_other_ones_of_the_same_forms(flags):
    questions = factors.FactorBenchmark(configure(flags)).questions
    reported, validation = questions["untrained", "cell", "3x2"], questions["validation", "cell", "3x2"]
    assert len(reported) == 2 * len(validation) == 4
    assert [sample.sequence[1] for sample in validation] == [sample.sequence[1] for sample in reported[:2]]
    patches = {tuple(sample.patches.flatten().tolist()) for sample in reported}
    assert all(tuple(sample.patches.flatten().tolist()) not in patches for sample in validation)


def test_a_skipped_cell_must_exist(flags):
    with pytest.raises(ValueError, match=r"skipped names \['grid/chunky'\]"):
        factors.list_cells(replace(configure(flags), skipped={"grid/chunky": "a typing error"}))


@pytest.mark.parametrize(
    ("few", "message"),
    [
        ({"thetas": [100.0, 100.0]}, r"thetas must have two or more levels, .* not \[100.0\]"),
        ({"layouts": {"grid": {"layout": "grid"}}}, r"layouts must have .* not \['grid'\]"),
        ({"layouts": {}}, r"layouts must have .* not \[\]"),
        ({"allocations": {"chunk": {"ownership": "chunk"}}}, r"allocations must have .* not \['chunk'\]"),
        (
            {"skipped": {"tv/own": "a layout without all allocations"}},
            r"layouts must have .* not \['grid'\]",
        ),
    ],
)
def test_a_factor_of_one_level_is_refused_before_anything_is_trained(flags, monkeypatch, few, message):
    trained = []
    monkeypatch.setattr(factors, "train", lambda *args: trained.append(args))
    with pytest.raises(ValueError, match=message):
        factors.main(replace(configure(flags), **few))
    assert not trained


@pytest.mark.slow
def test_the_experiment_goes_on_where_it_stopped_and_writes_its_tables(flags, monkeypatch):
    config = configure(flags)
    trained, train = [], factors.train
    monkeypatch.setattr(factors, "train", lambda *args: trained.append(args[2:4]) or train(*args))
    with pytest.raises(ValueError, match="seeds must be 2 or more"):
        factors.main(replace(config, seeds=1))
    factors.main(replace(config, seeds=2))
    tables = (Path(config.output_dir) / "tables.md").read_text()
    assert len(trained) == 11 + 6 and tables.startswith("Right answers in %, seeds 0, 1;")
    factors.main(config)
    assert len(trained) == 11 + 2 * 6
    out = Path(config.output_dir)
    report, tables = json.loads((out / "factors.json").read_text()), (out / "tables.md").read_text()
    assert tables.startswith("Right answers in %, seeds 0, 1, 2;")
    assert len(report["runs"]) == len(trained)
    assert report["theta"]["still"] == 7.0
    assert "| layout x allocation |" in tables and "| `tv/own` |" in tables
    assert (out / "factors.png").stat().st_size > 1000
    (out / "runs" / "grid_own-theta100-0.json").unlink()
    factors.main(replace(config, processes=2))
    assert len(trained) == 11 + 2 * 6, "two processes of their own train what is missing"
    again = json.loads((out / "factors.json").read_text())
    assert again["runs"] == report["runs"]
    assert (out / "tables.md").read_text() == tables


def test_every_cell_of_the_full_and_the_quick_form_is_a_scheme():
    full, quick = CONFIGS / "full.yaml", CONFIGS / "quick.yaml"
    for paths in ([full], [full, quick]):
        config = configure([flag for path in paths for flag in ("--config", str(path))])
        cells = factors.list_cells(config)
        assert len(cells) == 9 * 3 - 2 + len(config.schemes)
        assert {cell.name for cell in cells} >= set(config.augment)
        for cell in cells:
            assert read_rope(cell.rope).omega(16, 4).shape[-1] == 8
