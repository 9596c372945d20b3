"""train/gaussians.py as its user runs it, with small networks and few steps."""

import json
import sys
from pathlib import Path

import gaussians
import pytest
import torch

from rope_mm.training.config import load, run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "adversarial" / "gaussians.yaml"


SMALL = {"width": 32, "batch_size": 64, "samples": 500, "steps": 4}
FREE, HELD = "{loss: ns}", "{penalties: {r1: 0.1, r2: 0.1}, method: fd}"


def train(out, seeds="[0, 1]", rows=None, **settings):
    """The numbers of a run, without the time that it took."""
    flags = {"output_dir": out, "seeds": seeds}
    flags |= {f"rows.{name}": row for name, row in (rows or {"free": FREE, "held": HELD}).items()}
    flags |= {f"settings.{name}": value for name, value in (SMALL | settings).items()}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    run(gaussians.main, gaussians.Gaussians, words)
    numbers = json.loads((out / "gaussians.json").read_text())
    return {name: {k: v for k, v in row.items() if "seconds" not in k} for name, row in numbers.items()}


@pytest.fixture
def double():
    """float64, in which rounding does not grow to anything within a few steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "row",
    [
        {"loss": "rpgan", "penalties": {"r1": 0.1, "r2": 0.2}},
        {"loss": "ns", "penalties": {"r1": 0.1}, "method": "fd"},
        {"loss": "rasgan", "penalties": {"zero-centred": 0.1}, "critic_steps": 2},
        {"loss": "gan-qp", "distance": "l1"},
        {"loss": "energy"},
        {"loss": "drift", "final_width_ratio": 0.1},
        {"loss": "mean-shift"},
        {"loss": "wflow", "widths": [0.05], "iterations": 5},
    ],
    ids=str,
)
def test_seeds_trained_together_give_the_results_of_seeds_trained_alone(row, double):
    row, settings = gaussians.Row(**row), gaussians.Settings(width=16, batch_size=32, samples=50)
    both, alone = (gaussians.GanExperiment(row, settings, seeds) for seeds in ([3, 5], [5]))
    for step in range(10):
        both.step(step / 10)
        alone.step(step / 10)
    drawn = both.samples()
    torch.testing.assert_close(drawn[1:], alone.samples())
    assert (drawn[0] - drawn[1]).abs().max() > 0.1
    for one, other in zip(both.critic.parameters(), alone.critic.parameters(), strict=True):
        torch.testing.assert_close(one[1:], other)


def test_penalties_spread_samples_over_the_grid(tmp_path):
    found = train(tmp_path, seeds="[0]", steps=200, width=64, batch_size=128, samples=2000)
    assert found["held"]["kl"][0] < found["free"]["kl"][0] / 2
    assert found["true samples"]["modes"] == [25]
    assert found["true samples"]["quality"][0] > 0.98
    assert (tmp_path / "gaussians.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seeds_make_the_same_numbers_and_finished_rows_are_kept(tmp_path, capsys):
    first = train(tmp_path / "a")
    assert [len(row["kl"]) for row in first.values()] == [2, 2, 2]
    assert "| held |" in capsys.readouterr().out
    before = (tmp_path / "a" / "held.pt").stat().st_mtime_ns
    (tmp_path / "a" / "free.pt").unlink()
    assert train(tmp_path / "a") == first == train(tmp_path / "b")
    assert (tmp_path / "a" / "held.pt").stat().st_mtime_ns == before


def test_a_row_is_trained_anew_when_it_or_the_settings_change(tmp_path):
    def drawn(row, steps=4):
        train(tmp_path, rows={"mine": row}, steps=steps)
        return torch.load(tmp_path / "mine.pt", weights_only=True)["samples"]

    first = drawn(FREE)
    assert not torch.equal(drawn("{loss: lsgan}"), first)
    assert not torch.equal(drawn(FREE, steps=5), first)
    assert torch.equal(drawn(FREE), first)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{loss: rsgann}", "did you mean 'rsgan"),
        ("{penalties: {centring: 0.1}}", "'centring' is one of scores"),
        ("{penalties: {r1: 0.1}, method: exact}", "method 'exact' is unknown"),
        ("{loss: gan-qp, distance: l3}", "distance 'l3' is unknown"),
        ("{penalties: {one-centred: 0.1}, method: fd}", "take 'autograd'"),
        ("{loss: drift, penalties: {r1: 0.1}}", "drift has no critic that penalties"),
        ("{loss: drift, widths: []}", "widths must have at least one number"),
        ("{loss: wflow, widths: [0.0]}", "widths must be above 0, not 0.0"),
        ("{critic_steps: 0}", "critic_steps must be at least 1, not 0"),
        ("{lose: ns}", "rows.mine must be"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_before_any_is(row, reason, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train(tmp_path, rows={"fine": FREE, "mine": row})
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_rows_name_the_configuration_and_missing_matplotlib_names_the_installation(
    tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(gaussians.main, gaussians.Gaussians, ["--output_dir", str(tmp_path)])
    assert "configs/adversarial/gaussians.yaml" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^2$"):
        train(tmp_path)
    assert "pip install 'rope-mm[plots]'" in capsys.readouterr().err


def test_the_configuration_of_the_published_table_can_be_trained():
    config = load(gaussians.Gaussians, ["--config", str(CONFIG)])
    assert config.settings == gaussians.Settings()
    for row in config.rows.values():
        gaussians.GanExperiment(row, gaussians.Settings(width=8, batch_size=4), [0]).step(0.5)
