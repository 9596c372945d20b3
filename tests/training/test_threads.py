"""Threads of torch: the environment's limit, the configuration's number, and a trial of the machine."""

import os
import subprocess
import sys

import pytest
import torch

from rope_mm.training import threads


@pytest.fixture(autouse=True)
def _unchanged_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("limit", "asked", "chosen"), [("1", 2, 1), ("1", 0, 1), ("2", 1, 1), ("", 2, 2)])
def test_the_environment_limits_what_a_configuration_asks_for(limit, asked, chosen, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert threads.choose_threads(asked) == torch.get_num_threads() == chosen


@pytest.mark.parametrize(
    ("most", "speeds", "chosen"),
    [
        (1, {}, 1),  # nothing is tried
        (2, {1: 10.0, 2: 16.0}, 2),
        (2, {1: 10.0, 2: 0.5}, 1),  # another job holds a core
        (2, {1: 10.0, 2: 10.5}, 1),
        (6, {1: 1.0, 2: 2.0, 4: 4.0, 6: 1.0}, 4),
        (8, {1: 1.0, 2: 0.9, 4: 2.0, 8: 2.1}, 4),
    ],
)
def test_the_fewest_threads_are_taken_that_more_do_not_beat_by_much(most, speeds, chosen):
    assert threads.fastest(most, speeds.__getitem__) == chosen


@pytest.mark.parametrize("limit", ["", "2"])
def test_without_a_number_the_machine_is_tried(limit, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    tried = []
    monkeypatch.setattr(threads, "speed_of", lambda count: tried.append(count) or {1: 9.0, 2: 1.0}[count])
    torch.set_num_threads(2)
    assert threads.choose_threads(0) == torch.get_num_threads() == 1
    assert tried == [1, 2]


def test_a_trial_takes_the_threads_that_it_measures():
    assert threads.speed_of(2) > 0
    assert torch.get_num_threads() == 2


def test_a_process_obeys_the_environment_before_its_configuration():
    code = "from rope_mm.training.threads import choose_threads; print(choose_threads(2))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "1\n", done.stderr
