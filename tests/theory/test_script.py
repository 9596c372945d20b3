"""train/theory.py as its user runs it, on the shortest of its chapters."""

import json
import sys

import pytest
import theory
from PIL import Image

from rope_mm.training.config import run


def test_a_chapter_becomes_a_figure_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "CHAPTERS", {"damping": theory.CHAPTERS["damping"]})
    run(theory.main, theory.Theory, ["--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "damping.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "out" / "theory.json").read_text())
    assert numbers["damping"]["largest_error"] < 1e-9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["damping.png", "theory.json"]


@pytest.mark.slow
def test_particles_come_to_the_target_in_three_ways_and_are_the_frames_of_an_animation(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "FILM_STEPS", 20)
    monkeypatch.setattr(theory, "CHAPTERS", {"particles": theory.CHAPTERS["particles"]})
    run(theory.main, theory.Theory, ["--output_dir", str(tmp_path)])
    numbers = json.loads((tmp_path / "theory.json").read_text())["particles"]
    assert all(numbers[name]["kl_end"] < numbers[name]["kl_start"] / 50 for name in theory.PANELS)
    with Image.open(tmp_path / "particles.webp") as film:
        assert film.n_frames == 11  # every second step, and the start
        first = film.convert("RGB").tobytes()
        film.seek(10)
        assert film.convert("RGB").tobytes() != first


@pytest.mark.slow
def test_phase_portraits_arrive_only_with_a_zero_centred_penalty():
    from matplotlib.figure import Figure

    distance = {name: row["distance_at_60"] for name, row in theory.phase(Figure(), 0).items()}
    assert distance["ns, r1 0.3"] < 1e-3
    assert distance["wgan"] == pytest.approx(1, abs=1e-4)  # its circle
    assert distance["wgan, one-centred penalty 0.2"] > 1.2
    assert 0.1 < distance["ns"] < 1


@pytest.mark.slow
def test_alternating_thresholds_and_averages_are_as_published():
    from matplotlib.figure import Figure

    for row in theory.steps(Figure(), 0).values():
        assert "threshold" not in row or row["threshold"] == pytest.approx(row["formula"], rel=1e-4)
    assert theory.averages(Figure(), 0)["closer"] > 10


def test_help_says_what_is_written(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        run(theory.main, theory.Theory, ["--help"])
    assert "theory.json" in capsys.readouterr().out


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^2$"):
        run(theory.main, theory.Theory, ["--output_dir", str(tmp_path)])
    assert "pip install 'rope-mm[plots]'" in capsys.readouterr().err
