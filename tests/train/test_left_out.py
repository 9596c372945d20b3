"""Steps and documents that a run leaves out by choice: named, counted, and without a trace in the weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rope_mm.data import load_splits
from rope_mm.training.config import load, run

sys.path.insert(0, str(Path(__file__).parent))
import test_pretrain
from leaving_out import idle, poisoned
from test_adversarial import adversarial, environment, flags, train, weights
from test_pretrain import pretrain

SHORT = {"steps": 5, "checkpoint_every": 1, "sample_every": 5}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def equal(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_step_that_is_not_finite_is_left_out_as_if_its_updates_had_not_been(tmp_path, monkeypatch, capsys):
    out, without = tmp_path / "run", tmp_path / "without"
    with monkeypatch.context() as patch:
        patch.setattr(adversarial.Training, "batch", poisoned(adversarial.Training.batch, 2))
        result = train(out, **SHORT, on_nan="skip")
    assert "left out: step 3, critic" in capsys.readouterr().err
    assert result["steps_left_out"] == 1
    assert ["steps_left_out" in line for line in lines(out)] == [False, False, True, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(adversarial.Training, "step", idle(adversarial.Training.step, 2))
        train(without, **SHORT)
    assert equal(weights(out), weights(without))
    critics = [
        load_file(path / "checkpoints" / "step-000005" / "model_1.safetensors") for path in (out, without)
    ]
    assert equal(*critics)
    # it goes on from a checkpoint with the count, whatever the next one does with such steps
    before = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "checkpoints" / "step-000005")
    assert train(out, **SHORT)["steps_left_out"] == 1
    assert (out / "metrics.jsonl").read_text() == before
    assert equal(weights(out), weights(without))


def test_pretraining_leaves_such_a_step_out_too(data, tmp_path, monkeypatch):
    out, without = tmp_path / "run", tmp_path / "without"
    read, settings = pretrain.PackedDocumentDataset.__getitem__, {"head": "adversarial", "steps": 4}

    def torn(self, turn):
        reading = read(self, turn)
        if turn == 2 and self.batch == 8 and self.packer.whole:
            reading.pack.patches[:] = float("nan")
        return reading

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.PackedDocumentDataset, "__getitem__", torn)
        result = test_pretrain.train(data, out, on_nan="skip", **settings)
    assert result["steps_left_out"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Training, "step", idle(pretrain.Training.step, 2))
        test_pretrain.train(data, without, **settings)
    assert equal(weights(out), weights(without))


def test_too_many_such_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    batch = adversarial.Training.batch
    for step in range(2, 14):
        batch = poisoned(batch, step)
    monkeypatch.setattr(adversarial.Training, "batch", batch)
    with pytest.raises(SystemExit) as stopped:
        run(adversarial.main, adversarial.Adversarial, flags(tmp_path / "run", steps=20, on_nan="skip"))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 13, after 10 steps that were left out: its batches are in " in last


@pytest.mark.slow
def test_two_processes_leave_out_the_same_step(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("leaving_out.py"))
    for name in ("poisoned", "idle"):
        words = [*torchrun, script, name, "2", *flags(tmp_path / name, **SHORT, on_nan="skip")]
        env = environment(ACCELERATE_USE_CPU="true")
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert lines(tmp_path / "poisoned")[-1]["steps_left_out"] == 1
    assert equal(weights(tmp_path / "poisoned"), weights(tmp_path / "idle"))


@pytest.fixture
def texts(tmp_path):
    """Twenty captions, of which some are too long for a row of 16 tokens; which of those trained on."""
    rows = ["a" * 40 if i % 6 == 3 else "abcd"[i % 4] * (i % 7 + 1) for i in range(20)]
    path = tmp_path / "texts.parquet"
    Dataset.from_dict({"caption": rows}).to_parquet(path)
    return path, [i for i, row in enumerate(load_splits(str(path))["train"]["caption"]) if len(row) == 40]


TEXTS = {"data.templates": "['{caption}']", "length": 16, "batch": 8, "steps": 4}  # two epochs


def test_a_document_longer_than_a_row_is_named_left_out_and_counted(texts, tmp_path, capsys):
    path, long = texts
    result = test_pretrain.train(path, tmp_path / "run", **TEXTS)
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert long and result["left_out"] == len(named) == 2 * len(long)
    why = "a document of 41 tokens does not fit a row of 16; raise the length and begin anew"
    assert set(named) == {f"left out: row {row}: {why}" for row in long}


def test_strict_stops_at_such_a_document_and_the_run_goes_on_without_it_as_advised(texts, tmp_path):
    changes = {**TEXTS, "batch": 1, "steps": 16, "checkpoint_every": 1}  # an epoch
    with pytest.raises(ValueError, match=r"row \d+: a document of 41 tokens .* --data.strict false"):
        test_pretrain.train(texts[0], tmp_path / "run", **changes, **{"data.strict": "true"})
    begun = lines(tmp_path / "run")
    result = test_pretrain.train(texts[0], tmp_path / "run", **changes, **{"data.strict": "false"})
    assert lines(tmp_path / "run")[: len(begun)] == begun != []
    assert result["left_out"] == len(texts[1])


def test_a_length_that_no_document_fits_is_said_at_once(texts, tmp_path):
    with pytest.raises(ValueError, match=r"none of the first 8 documents .* does not fit a row of 1; raise"):
        test_pretrain.train(texts[0], tmp_path / "run", **{**TEXTS, "length": 1})


def test_what_to_do_with_such_a_step_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match="on_nan must be one of stop, skip, not 'ignore'"):
        load(adversarial.Adversarial, flags(tmp_path, on_nan="ignore"))
