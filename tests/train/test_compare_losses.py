"""Several losses and seeds by one command, on a model of toy size."""

import json
from pathlib import Path

import compare_losses
import pytest

from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "adversarial" / "digits.yaml"


def flags(out, **changes):
    settings = {
        "config": CONFIG, "output_dir": out, "steps": 4, "global_batch_size": 2,
        "eval_samples": 70, "sample_every": 2, "threads": 1, "page": "false",
        "model.hidden_size": 16, "model.intermediate_size": 16, "model.num_hidden_layers": 1, "seeds": 2,
        "metric": "frechet", "losses": "[ns, rpgan+r1]", **changes,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def compare(out, **changes):
    compare_losses.main(load(compare_losses.CompareLosses, flags(out, **changes)))


@pytest.mark.slow
def test_losses_are_compared_over_seeds_and_finished_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    out = tmp_path / "losses"
    compare(out)
    printed = capsys.readouterr().out
    rows = json.loads((out / "losses.json").read_text())
    assert {name: len(results) for name, results in rows.items()} == {"ns": 2, "rpgan+r1": 2}
    assert (out / "table.md").read_text() in printed
    assert (out / "losses.png").stat().st_size > 5000
    for name in ("ns-0", "ns-1", "rpgan+r1-0", "rpgan+r1-1"):
        run = (out / name / "run.yaml").read_text()
        assert f"seed: {name[-1]}" in run
        assert ("name: ns" in run) == name.startswith("ns")
        assert ("r1: 2.0" in run) == name.startswith("rpgan")
        assert "r2" not in run  # which the config has, but no row
    monkeypatch.setattr(compare_losses, "train", None)
    compare(out)
    assert json.loads((out / "losses.json").read_text()) == rows


def test_a_row_changes_the_keys_that_it_names_and_no_others(tmp_path):
    row = "{sn: {loss: {name: hinge, penalties: {}, spectral_norm: true}, critic_steps: 2}}"
    config = load(compare_losses.CompareLosses, flags(tmp_path, losses="[ns]", rows=row, seeds=1))
    (_, plain), (name, changed) = compare_losses.runs(config)
    assert name == "sn" and changed.output_dir == f"{tmp_path}/sn-0"
    assert (changed.critic_steps, changed.loss.name, changed.loss.spectral_norm) == (2, "hinge", True)
    assert changed.loss.penalties == {} and (plain.critic_steps, changed.optim) == (1, plain.optim)


@pytest.mark.slow
def test_an_interrupted_run_is_trained_to_its_end(tmp_path, monkeypatch):
    out, trained, real = tmp_path / "losses", [], compare_losses.train
    compare(out, seeds=1, losses="[ns]")
    before = (out / "losses.json").read_text()
    (out / "ns-0" / "result.json").unlink()
    monkeypatch.setattr(
        compare_losses, "train", lambda config: (trained.append(config.output_dir), real(config))
    )
    compare(out, seeds=1, losses="[ns]", page="true")
    assert trained == [str(out / "ns-0")]
    assert (out / "losses.json").read_text() == before
    page = (out / "index.html").read_text()
    assert '<a href="ns-0/index.html">ns, seed 0</a>' in page and "<td>ns</td>" in page
    assert page.count("data:image/png") == 1 and page.count("data:image/webp") == 1
    assert "<h1>ns-0</h1>" in (out / "ns-0" / "index.html").read_text()


def test_a_dry_run_prints_every_configuration_and_touches_nothing(tmp_path, capsys):
    compare(tmp_path / "losses", dry_run="true")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("output_dir: ")]
    runs = ("ns-0", "rpgan+r1-0", "ns-1", "rpgan+r1-1")
    assert printed == [f"output_dir: {tmp_path}/losses/{name}" for name in runs]
    assert not (tmp_path / "losses").exists()


def test_the_table_holds_means_and_standard_deviations():
    rows = {
        "ns": [{"kl": 1.0, "modes": 999.0}, {"kl": 3.0, "modes": 1000.0}],
        "ours": [{"kl": 0.5, "modes": 7.0}],
    }
    assert compare_losses.table(rows).splitlines() == [
        "| loss | seeds | kl | modes |",
        "| --- | --- | --- | --- |",
        "| ns | 2 | 2 ± 1.4 | 999.5 ± 0.71 |",
        "| ours | 1 | 0.5 | 7 |",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"losses": "[]"}, "losses or rows must name at least one"),
        ({"losses": "[ns+r3]"}, r"'ns\+r3' needs a gamma, loss\.penalties\.r3"),
        ({"losses": "[nss]"}, "GAN loss 'nss' is unknown"),
        ({"rows": "{ns: {steps: 1}}"}, r"losses and rows both name \['ns'\]"),
        ({"rows": "{a: {step: 1}}"}, r"rows\.a: step"),
        ({"data.label": ""}, "would be measured by nothing: give data.label"),
        ({"losses": "[]", "rows": "{b: {data: {label: ''}}}"}, "b would be measured by nothing"),
        pytest.param({"losses": "[ns]", "metric": "fid"}, "no metric 'fid'", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "losses", **changes)
