"""What may happen to a run: numbers that are not finite, signals, full disks, second commands."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import filelock
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rope_mm.training import checkpoint

EVERYTHING = {
    "loss.penalties": "{r1: 1.0, r2: 1.0, zero-centred: 0.1, consistency: 0.1, centring: 0.1, lecam: 0.1}",
    "augment": "{brightness: 0.5, translation: 0.25, cutout: 0.25}",
    "optim.schedule": "cosine", "optim.final_beta2": 0.999, "optim.final_gamma": 0.1,
    "gradient_accumulation_steps": 2, "global_batch_size": 4, "critic_steps": 2,
}  # fmt: skip
SHORT = {"steps": 4, "checkpoint_every": 2, "sample_every": 4}


def content(folder):
    """Every tensor and number of a checkpoint, by file."""
    return {
        path.name: load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
        for path in sorted(folder.iterdir())
        if path.suffix != ".json"
    }


@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_two_steps_and_two_resumed_ones_equal_four_with_every_penalty_on(method, adversarial, runs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {**SHORT, **EVERYTHING, "loss.method": method}
    adversarial.train(whole, **settings)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    adversarial.train(parts, **settings)
    ours, theirs = (content(path / "checkpoints" / "step-000004") for path in (parts, whole))
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin"} < ours.keys()
    assert [name for name in ours if "custom" in name] == ["custom_checkpoint_0.pkl"]
    state = ours["custom_checkpoint_0.pkl"]
    assert state.keys() == {"ema", "lecam", "nan_guard", "skipped_images"}
    assert state["lecam"]["batches"] == 16
    assert runs.equal(ours, theirs)
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def poisoned(training, step, real):
    """micro_batch, which in one step has a number that is not finite."""
    before = training.micro_batch

    def micro_batch(self, update, part=0):
        batch = before(self, update, part)
        if update == step:
            (batch.real if real else batch.noise)[0, 0, 0] = float("nan")
        return batch

    return micro_batch


@pytest.mark.parametrize("real", [True, False])
def test_a_non_finite_loss_stops_the_run_and_its_batch_is_saved(
    real, adversarial, refusal, tmp_path, monkeypatch
):
    output_dir, settings = tmp_path / "run", {**SHORT, "log_every": 4}
    training = adversarial.module.Training
    monkeypatch.setattr(training, "micro_batch", poisoned(training, 2, real))
    said = refusal(adversarial, output_dir, **settings)
    assert said.startswith("error: loss/critic, penalty/r")
    assert f"not finite at step 3: its batches are in {output_dir}/nan-step-3.pt" in said
    kept = torch.load(output_dir / "nan-step-3.pt")
    assert kept["step"] == 3 and kept["terms"]["loss/critic"] != kept["terms"]["loss/critic"]
    (batch,) = kept["batches"]
    assert batch["real" if real else "noise"].isnan().sum() == 1 and len(batch["input_ids"]) == 2
    newest = checkpoint.latest(output_dir / "checkpoints")
    checkpoint.verify(newest)
    assert newest.name == "step-000002"
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())
    monkeypatch.undo()
    adversarial.train(output_dir, **settings)


def test_a_collapsing_run_is_reported_in_its_metrics_and_on_the_progress_line(
    adversarial, runs, tmp_path, monkeypatch, capsys
):
    coverage = iter([0.9, 0.6, 0.4])
    evaluate = lambda self, path: {"coverage": next(coverage)}  # noqa: E731
    monkeypatch.setattr(adversarial.module.Training, "evaluate", evaluate)
    adversarial.train(tmp_path / "run", steps=3, sample_every=1)
    (warned,) = [line for line in runs.lines(tmp_path / "run") if "warning" in line]
    assert warned["step"] == 3 and warned["warning"].startswith("coverage fell to 0.4 from 0.9")
    assert warned["warning"] in capsys.readouterr().err


def test_the_progress_line_shows_speed_and_remaining_time(script, tmp_path, capsys):
    script.train(tmp_path / "run", steps=2)
    first = next(line for line in capsys.readouterr().err.splitlines() if " 1/2 " in line)
    for name in ("lr ", "grad_norm", "images/s ", "tokens/s ", "ETA 0:00:"):
        assert name in first


def start(script, runs, output_dir, until, **changes):
    """A process that has logged so many lines."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(script.command(output_dir, **changes), env=runs.environment(), **quiet)
    for _ in range(2400):
        if len(runs.lines(output_dir)) > until:
            break
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(script, runs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"steps": 40, "checkpoint_every": 3, "sample_every": 40}
    script.train(whole, **settings)
    process = start(script, runs, killed, 14, **settings)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()
    checkpoint.verify(checkpoint.latest(killed / "checkpoints"))
    script.train(killed, **settings)
    for name in ("result.json", "metrics.jsonl", "run.yaml"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert runs.same(killed, whole)


@pytest.mark.slow
def test_sigterm_saves_and_a_second_command_is_refused_while_the_first_one_runs(
    script, runs, refusal, tmp_path
):
    output_dir = tmp_path / "run"
    process = start(script, runs, output_dir, 4, steps=4000)
    for restart in ("false", "true"):
        said = refusal(script, output_dir, steps=4000, restart=restart)
        assert f"{output_dir} is in use by process {process.pid} on " in said
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    newest = checkpoint.latest(output_dir / "checkpoints")
    checkpoint.verify(newest)
    assert checkpoint.step_of(newest) == len(runs.lines(output_dir))
    assert f"stopped by SIGTERM at step {checkpoint.step_of(newest)}, saved" in said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("during", ["step", "evaluate"])
def test_a_signal_at_the_end_does_not_wait_for_the_last_evaluation(
    during, script, runs, tmp_path, monkeypatch, capsys
):
    output_dir, whole = tmp_path / "run", tmp_path / "whole"
    asked, evaluated, before = [], [], getattr(script.module.Training, during)

    def signalled(self, given):
        if during == "evaluate" or given == 3:
            asked.append(given)
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(script.module.Training, "evaluate", lambda self, path: evaluated.append(path) or {})
        before = before if during == "step" else script.module.Training.evaluate
        patch.setattr(script.module.Training, during, signalled)
        assert script.run(output_dir, **SHORT) == 0
    said = capsys.readouterr()
    assert len(asked) == 1 and not evaluated
    assert "stopped by SIGTERM at step 4, saved; the same command resumes" in said.err
    assert not (output_dir / "result.json").exists() and "samples:" not in said.out
    assert script.train(output_dir, **SHORT) == script.train(whole, **SHORT)
    assert runs.same(output_dir, whole)


def test_a_run_without_labels_says_that_nothing_was_evaluated(adversarial, tmp_path, capsys):
    assert adversarial.train(tmp_path / "run", steps=1) == {}
    said = capsys.readouterr().out
    assert "nothing was evaluated: images need data.label" in said and "{}" not in said


def test_a_folder_in_use_is_refused_with_its_process_id_and_free_afterwards(adversarial, refusal, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / ".lock-holder").write_text("process 7 on somewhere")
    with filelock.FileLock(output_dir / ".lock"):
        for restart in ("false", "true"):
            said = refusal(adversarial, output_dir, steps=1, restart=restart)
            assert f"{output_dir} is in use by process 7 on somewhere; wait for it" in said
    adversarial.train(output_dir, steps=1)
    assert not (output_dir / ".lock-holder").exists()
    adversarial.train(output_dir, steps=1)


def test_a_full_disk_is_reported_and_earlier_checkpoints_are_kept(script, tmp_path, monkeypatch, capsys):
    output_dir, saved = tmp_path / "run", Accelerator.save_state

    def full(self, path):
        if ".step-000004" not in path:
            return saved(self, path)
        Path(path, "optimizer.bin").symlink_to("/dev/full")
        return saved(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        assert script.run(output_dir, **SHORT) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: checkpoint {output_dir}/checkpoints/step-000004 could not be written")
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-000002"]
    script.train(output_dir, **SHORT)
    assert checkpoint.latest(output_dir / "checkpoints").name == "step-000004"


def test_a_full_disk_keeps_the_earlier_model(adversarial, tmp_path, monkeypatch, capsys):
    output_dir = tmp_path / "run"
    adversarial.train(output_dir, steps=1)
    before = {path: path.read_bytes() for path in (output_dir / "model").iterdir()}

    def full(self, path, *_, **__):
        Path(path, "config.json").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert adversarial.run(output_dir, steps=1) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {output_dir}/model could not be written (Error while serializing")
    assert {path: path.read_bytes() for path in (output_dir / "model").iterdir()} == before
    assert not [path for path in output_dir.iterdir() if "partial" in path.name]


def test_a_finished_run_is_extended_as_if_it_had_never_ended(adversarial, runs, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = {"optim.final_lr_ratio": 1.0, "sample_every": 2}
    adversarial.train(whole, steps=4, **constant)
    adversarial.train(longer, steps=2, **constant)
    adversarial.train(longer, steps=4, **constant)
    assert runs.same(longer, whole)
    assert runs.lines(longer) == runs.lines(whole)


def test_extending_a_run_whose_rate_decays_explains_the_rates_and_needs_extend(
    adversarial, refusal, runs, tmp_path
):
    output_dir = tmp_path / "run"
    adversarial.train(output_dir, steps=2)  # of digits.yaml, whose rate falls to 0.02 of itself
    said = refusal(adversarial, output_dir, steps=4)
    assert "holds a run of 2 steps, and its learning rate follows a schedule that ends there" in said
    assert "add --extend to train to step 4 at the rates of a run of that length" in said
    adversarial.train(output_dir, steps=4, extend="true")
    assert runs.lines(output_dir)[2]["lr"] == pytest.approx(2e-3 * (1 - 0.98 * 2 / 4))
    assert "steps already, more than steps 3" in refusal(adversarial, output_dir, steps=3, extend="true")


def test_changed_data_is_refused_with_its_row_counts_unless_allowed(pretrain, refusal, bars, tmp_path):
    from datasets import Dataset

    data, output_dir = tmp_path / "bars.parquet", tmp_path / "run"
    shutil.copy(bars, data)
    settings = {"steps": 2, "checkpoint_every": 1, "data.paths": f"[{data}]"}
    pretrain.train(output_dir, **settings)
    rows = Dataset.from_parquet(str(bars), cache_dir=tmp_path / "cache")
    rows.select(range(15)).to_parquet(data)
    shutil.rmtree(output_dir / "checkpoints" / "step-000002")
    said = refusal(pretrain, output_dir, **settings)
    assert "other data (train: 13 rows, " in said and "train: 12 rows, " in said.partition(" there, ")[2]
    assert "--data.changed true goes on with the new data" in said
    before = json.loads((output_dir / "data.json").read_text())
    pretrain.train(output_dir, **settings, **{"data.changed": "true"})
    after = json.loads((output_dir / "data.json").read_text())
    assert after["held_out"] == before["held_out"] and after["train"]["rows"] == 12


@pytest.mark.parametrize("apart", [True, False], ids=["first rows", "a split"])
def test_a_stream_of_other_files_is_refused_and_goes_on_where_its_held_out_rows_are_a_split(
    apart, pretrain, refusal, bars, tmp_path
):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("train-0", "train-1") if apart else ("train-0", "train-1", "test-0"):
        shutil.copy(bars, folder / f"{name}.parquet")
    settings = {"steps": 2, "checkpoint_every": 1, "data.paths": f"[{folder}]", "data.streaming": "true"}
    settings |= {"eval_samples": 3, "data.shuffle": 4}
    pretrain.train(tmp_path / "run", **settings)
    shutil.copy(bars, folder / "train-2.parquet")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    said = refusal(pretrain, tmp_path / "run", **settings)
    files = 2 if apart else 3
    assert f"train: streamed rows from {files} files" in said and f"from {files + 1} files" in said
    changed = settings | {"data.changed": "true"}
    if apart:
        assert "its held-out rows could be those trained on" in refusal(pretrain, tmp_path / "run", **changed)
    else:
        pretrain.train(tmp_path / "run", **changed)
