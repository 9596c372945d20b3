"""Steps and documents that a run skips by choice: named, counted, and without a trace in the weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from skipping import idle, poisoned

from rope_mm.data.holdout import SHARE, row_numbers

SCRIPT = Path(__file__).with_name("skipping.py")
SHORT = {"steps": 4, "checkpoint_every": 1, "sample_every": 4}


def test_a_non_finite_step_is_skipped_and_leaves_no_update(adversarial, runs, tmp_path, monkeypatch, capsys):
    training, run, without = adversarial.module.Training, tmp_path / "run", tmp_path / "without"
    with monkeypatch.context() as patch:
        patch.setattr(training, "micro_batch", poisoned(training.micro_batch, 1))
        result = adversarial.train(run, **SHORT, on_nan="skip")
    said = capsys.readouterr()
    assert "skipped: step 2, loss/critic" in said.err
    assert result == {"skipped_steps": 1} and "nothing was evaluated" in said.out
    assert ["skipped_steps" in line for line in runs.lines(run)] == [False, True, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(training, "step", idle(training.step, 1))
        adversarial.train(without, **SHORT)
    assert runs.same(run, without)
    critics = [
        load_file(path / "checkpoints" / "step-000004" / "model_1.safetensors") for path in (run, without)
    ]
    assert runs.equal(*critics)
    # it resumes with the count, whatever the next run does with such steps
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert adversarial.train(run, **SHORT)["skipped_steps"] == 1
    assert (run / "metrics.jsonl").read_text() == before
    assert runs.same(run, without)


def test_pretraining_skips_a_non_finite_step_too(pretrain, runs, tmp_path, monkeypatch):
    module, settings = pretrain.module, {"image_head": "adversarial", "steps": 3}
    read = module.PackedDocumentDataset.__getitem__

    def torn(self, number):
        batch = read(self, number)
        if number == 1 and self.packer.for_critic:
            return replace(batch, patches=torch.full_like(batch.patches, float("nan")))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(module.PackedDocumentDataset, "__getitem__", torn)
        result = pretrain.train(tmp_path / "run", on_nan="skip", **settings)
    assert result["skipped_steps"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(module.Training, "step", idle(module.Training.step, 1))
        pretrain.train(tmp_path / "without", **settings)
    assert runs.same(tmp_path / "run", tmp_path / "without")


def test_too_many_non_finite_steps_in_a_row_stop_the_run(adversarial, refusal, tmp_path, monkeypatch):
    training = adversarial.module.Training
    micro_batch = training.micro_batch
    for step in range(2, 14):
        micro_batch = poisoned(micro_batch, step)
    monkeypatch.setattr(training, "micro_batch", micro_batch)
    last = refusal(adversarial, tmp_path / "run", steps=20, on_nan="skip")
    assert "not finite at step 13, after 10 skipped steps: its batches are in " in last


@pytest.mark.slow
def test_two_processes_skip_the_same_step(adversarial, runs, tmp_path, monkeypatch):
    training = adversarial.module.Training
    adversarial.torchrun(tmp_path / "poisoned", script=[str(SCRIPT), "2"], **SHORT, on_nan="skip")
    assert runs.lines(tmp_path / "poisoned")[-1]["skipped_steps"] == 1
    monkeypatch.setattr(training, "step", idle(training.step, 2))
    adversarial.train(tmp_path / "idle", **SHORT)  # one process, of the same images and noise
    ours, theirs = (runs.weights(tmp_path / name) for name in ("poisoned", "idle"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.fixture
def texts(tmp_path):
    """Twenty captions, of which some are too long for a row of 16 tokens; which of those trained on."""
    rows = ["a" * 40 if i % 6 == 3 else "abcd"[i % 4] * (i % 7 + 1) for i in range(20)]
    path, data = tmp_path / "texts.parquet", Dataset.from_dict({"caption": rows})
    data.to_parquet(path)
    train = [row for row, number in enumerate(row_numbers(data)) if number >= SHARE]
    long = [row for row in train if len(rows[row]) == 40]
    settings = {"data.paths": f"[{path}]", "data.templates": "['{caption}']", "max_length": 16}
    return settings | {"global_batch_size": len(train), "steps": 2}, long  # two epochs


def test_a_document_longer_than_a_row_is_named_skipped_and_counted(texts, pretrain, tmp_path, capsys):
    settings, long = texts
    result = pretrain.train(tmp_path / "run", **settings)
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert long and len(named) == len(long)
    assert result["skipped_documents"] == 2 * len(long)
    why = "a document of 41 tokens does not fit a row of 16"
    assert {line.split(";")[0] for line in named} == {f"skipped: row {row}: {why}" for row in long}


def test_strict_data_stops_at_a_long_document_and_the_advised_command_resumes_without_it(
    texts, pretrain, runs, tmp_path
):
    epoch = texts[0]["global_batch_size"]
    settings = {**texts[0], "global_batch_size": 1, "steps": epoch, "checkpoint_every": 1}
    with pytest.raises(ValueError, match=r"row \d+: a document of 41 tokens .* --data.strict false"):
        pretrain.train(tmp_path / "run", **settings, **{"data.strict": "true"})
    begun = runs.lines(tmp_path / "run")
    result = pretrain.train(tmp_path / "run", **settings, **{"data.strict": "false"})
    assert runs.lines(tmp_path / "run")[: len(begun)] == begun != []
    assert result["skipped_documents"] == len(texts[1])


def test_a_length_that_no_document_fits_is_refused_at_once(texts, pretrain, tmp_path):
    with pytest.raises(ValueError, match=r"none of the first 17 documents .* does not fit a row of 1"):
        pretrain.train(tmp_path / "run", **{**texts[0], "max_length": 1})


def test_on_nan_takes_one_of_two_values(adversarial, tmp_path):
    with pytest.raises(ValueError, match="on_nan must be one of stop, skip, not 'ignore'"):
        adversarial.config(tmp_path, on_nan="ignore")


def test_a_step_without_an_image_logs_no_image_loss(pretrain, runs, tmp_path):
    pretrain.train(tmp_path / "run", steps=1, **{"data.templates": "['{caption}']"})
    assert set(runs.lines(tmp_path / "run")[0]) == {"step", "loss/text", "grad_norm", "lr"}
