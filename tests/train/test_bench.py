"""The bench of training at toy sizes, and its arithmetic with times that were not measured."""

import os
import re
import subprocess
import sys
from pathlib import Path

import bench
import cpu
import pretrain
import pytest
import torch

from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
TOY = bench.Size(16, 16, 1, 2, 1, 2, 128)
TABLES = bench.make_tables([TOY], 2, [64, 128], threads=2)


def cells(text):
    """The rows of a Markdown table, without its titles."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.fixture
def times(monkeypatch):
    """Contenders are called once, and take these seconds in the rounds."""
    found = {}

    def play(calls, rounds, clock):
        for call in calls.values():
            call()
        return {name: found[name] for name in calls}

    monkeypatch.setattr(cpu, "alternate", play)
    return found


def test_the_small_size_is_that_of_the_tiny_configuration():
    tiny = load(pretrain.Pretrain, ["--config", str(ROOT / "configs" / "pretrain" / "tiny.yaml")])
    sizes = bench.SMALL.settings()
    assert {name: sizes[name] for name in sizes if name in tiny.model} == {
        name: size for name, size in tiny.model.items() if name in sizes
    }
    assert sizes["num_attention_heads"] * sizes["head_dim"] == tiny.model["hidden_size"]
    assert (bench.SMALL.rows, bench.SMALL.length) == (tiny.global_batch_size, tiny.max_length)


@pytest.mark.parametrize("title", TABLES)
def test_every_table_is_measured_at_toy_sizes(title, monkeypatch):
    monkeypatch.setattr(bench, "THREADS_SECONDS", 0.05)
    text = TABLES[title]()
    assert "nan" not in text and "inf" not in text
    rows = {
        "A step on text": 2,
        "Packed and padded": 2,
        "Length, memory and time": 6,  # of each way on a CPU two, and one line of those that it has not
        "Rotary's share": 0,
        "An adversarial step": 1,
        "Threads beside another job": 2,
    }
    if not torch.cuda.is_available():
        assert len(cells(text)) == rows[title]
        assert text.count("not measured") == 2 * (title == "Length, memory and time")


def test_the_ratio_of_steps_compares_times_of_one_round_and_a_missed_goal_is_reported(times):
    times.update({"RopeMM": [2.0, 6.0, 4.0], "Llama": [1.0, 2.0, 2.0], "Qwen3": [2.0, 6.0, 4.0]})
    llama, qwen = cells(bench.steps_table([TOY], 3))
    assert llama == [
        "16 x 1",
        "2 x 128",
        "4000.0",
        "2000.0",
        "Llama",
        "2.00 (2.00 to 3.00)",
        "<= 1.1, missed",
    ]
    assert qwen[4:6] == ["Qwen3", "1.00 (1.00 to 1.00)"]
    times["Llama"] = [2.0, 6.0, 4.0]
    assert "missed" not in bench.steps_table([TOY], 3)


def test_a_slow_step_on_words_and_slow_threads_are_reported(times, monkeypatch):
    monkeypatch.setattr(bench, "adversarial_step", lambda name, flags: lambda: name)
    times.update({"words": [1.0, 2.0], "bytes": [2.0, 4.0]})
    assert cells(bench.adversarial_table(2)) == [
        ["digits.yaml", "1500.0", "3000.0", "0.50 (0.50 to 0.50)", "<= 0.67"]
    ]
    times.update({"words": [2.0, 4.0]})
    assert "missed" in bench.adversarial_table(2)


def test_packing_counts_tokens_without_padding(times):
    times.update({"packed": [1.0, 2.0, 3.0], "padded": [2.0, 4.0, 6.0]})
    text = bench.packing_table(TOY, 3)
    packed, padded = cells(text)
    ratio = 2 * int(packed[2]) / int(padded[2])
    assert f"packed over padded: {ratio:.2f} ({ratio:.2f} to {ratio:.2f})" in text
    for (_, shape, tokens, speed), seconds in ((packed, 2), (padded, 4)):
        rows, width = map(int, shape.split(" x "))
        assert int(tokens) <= rows * width
        assert int(speed) == pytest.approx(int(tokens) / seconds, abs=1)
    assert int(packed[2]) / int(padded[2]) == pytest.approx(1, abs=0.05)


def test_peak_memory_is_the_largest_amount_held_at_once():
    kept = []

    def step():
        for _ in range(4):
            torch.empty(1 << 20)  # freed before the next one
        kept.extend(torch.empty(1 << 20) for _ in range(2))

    assert bench.peak_memory(step, "cpu") == 2 * 4 << 20


def test_a_mask_takes_memory_that_grows_with_the_square_of_the_length():
    most = {
        images: [float(row[3]) for row in bench.length_rows(way, TOY, [256, 1024], "cpu")]
        for way, (_, images, where) in bench.WAYS.items()
        if "cpu" in where
    }
    short, long = most[False]
    assert long == pytest.approx(short, rel=0.1)
    short, long = most[True]
    assert long > 1.5 * short


def test_the_tables_that_are_printed_are_also_in_the_file(monkeypatch, capsys, tmp_path):
    def half():
        assert "made up" in out.read_text()  # what was measured before is there already
        return "no more"

    out = tmp_path / "speed.md"
    monkeypatch.setattr(bench, "make_tables", lambda *_: {"First": lambda: "| made up |", "Last": half})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--output", str(out)])
    bench.main()
    assert out.read_text() == capsys.readouterr().out
    assert re.search(r"- torch: \S+\n", out.read_text())
    assert out.read_text().endswith("\n## First\n\n| made up |\n\n## Last\n\nno more\n")


def test_too_few_rounds_for_quartiles_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1"])
    with pytest.raises(SystemExit, match=r"^2$"):
        bench.main()
    assert "--rounds must be at least 2, which have quartiles, not 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_of_the_bench_works_without_a_path_to_the_kernel_benches():
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "train" / "bench.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "--output" in done.stdout, done.stderr
