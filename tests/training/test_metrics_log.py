import json

import numpy as np
import pytest
import torch

from rope_mm.training.metrics_log import FILE, Log, read_metrics


def losses(folder, steps, start=0):
    with Log(folder, total=20, step=start) as log:
        for step in steps:
            log(step, critic=1 / step, generator=float(step))


def test_every_step_is_a_line(tmp_path):
    with Log(tmp_path / "new", total=2) as log:
        log(1, critic=0.5, generator=torch.tensor(2.0), note="warm-up")
        log(2, critic=np.float32(0.25), count=3)
    assert read_metrics(tmp_path / "new") == [
        {"step": 1, "critic": 0.5, "generator": 2.0, "note": "warm-up"},
        {"step": 2, "critic": 0.25, "count": 3.0},
    ]


@pytest.mark.parametrize("tail", ["", '{"step": 13, "cri', "12", "\n", '{"step": 13, "critic": 1.0}'])
def test_an_interrupted_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, tail):
    losses(tmp_path / "whole", range(1, 21))
    losses(tmp_path / "resumed", range(1, 13))
    with (tmp_path / "resumed" / FILE).open("a") as file:
        file.write(tail)
    losses(tmp_path / "resumed", range(11, 21), start=10)
    assert (tmp_path / "resumed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_resuming_does_not_repeat_lines_of_the_step_resumed_at(tmp_path):
    for start, names in ((1, ["critic"]), (1, ["critic", "coverage"]), (2, ["critic", "critic"])):
        with Log(tmp_path, total=2, step=start) as log:
            for name in names:
                log(start, **{name: 0.5})
    lines = [(line["step"], *list(line)[1:]) for line in read_metrics(tmp_path)]
    assert lines == [(1, "critic"), (1, "coverage"), (2, "critic"), (2, "critic")]


def test_a_last_line_without_a_newline_is_kept(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "critic": 2.0}\n{"step": 2, "critic": 1.0}')
    losses(tmp_path, [3], start=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_run_from_the_start_begins_the_file_anew(tmp_path):
    for _ in range(2):
        with Log(tmp_path, total=1) as log:
            log(0, critic=1.0)
    assert len(read_metrics(tmp_path)) == 1


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    with Log(tmp_path, total=2) as log:
        log(1, critic=1.0)
        assert len(read_metrics(tmp_path)) == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: is not a line of metrics"):
        Log(tmp_path, total=3, step=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    with Log(tmp_path, total=1) as log, pytest.raises(ValueError, match=r"critic is -?(nan|inf) at step 1"):
        log(1, critic=value)
    assert read_metrics(tmp_path) == []


def test_only_the_main_process_writes(tmp_path):
    with Log(tmp_path, total=1, main=False) as log:
        log(1, critic=1.0)
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_a_line_is_printed_from_time_to_time(tmp_path, capsys):
    with Log(tmp_path, total=100, desc="gan", bar=False, pause=3600) as log:
        for step in range(1, 101):
            log(step, critic=0.693147, phase="main")
    assert capsys.readouterr().err == (
        "gan 1/100  critic 0.6931  phase main\ngan 100/100  critic 0.6931  phase main\n"
    )


def test_a_bar_resumes_at_its_step(tmp_path, capsys):
    with Log(tmp_path, total=100, step=50, desc="gan", bar=True) as log:
        log(100, critic=0.5)
    assert "gan: 100%" in capsys.readouterr().err
    assert json.loads((tmp_path / FILE).read_text()) == {"step": 100, "critic": 0.5}
