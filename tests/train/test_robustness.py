"""What befalls a run: numbers that are none, signals, a full disk, an interruption with everything on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rope_mm.training import checkpoint
from rope_mm.training.config import load, run

sys.path.insert(0, str(Path(__file__).parent))
import test_pretrain
from test_adversarial import SCRIPT, adversarial, environment, flags, train
from test_pretrain import pretrain

EVERYTHING = {
    "loss.penalties": "{r1: 1.0, r2: 1.0, zero-centred: 0.1, consistency: 0.1, centring: 0.1, lecam: 0.1}",
    "augment": "{brightness: 0.5, translation: 0.25, cutout: 0.25}",
    "optim.schedule": "cosine", "optim.final_beta2": 0.999, "optim.final_gamma": 0.1,
    "accumulate": 2, "critic_steps": 2,
}  # fmt: skip
SHORT = {"steps": 4, "checkpoint_every": 2, "sample_every": 4}


@dataclass(frozen=True)
class Script:
    """A training script, and the flags of a run of toy size."""

    path: Path
    main: Callable
    schema: type
    flags: Callable

    def run(self, out, **changes):
        self.main(load(self.schema, self.flags(out, **changes)))

    def command(self, out, **changes):
        return [sys.executable, str(self.path), *self.flags(out, **changes)]


@pytest.fixture(params=["adversarial", "pretrain"])
def script(request, data):
    if request.param == "adversarial":
        return Script(SCRIPT, adversarial.main, adversarial.Adversarial, flags)
    told = partial(test_pretrain.flags, data, head="adversarial")
    return Script(SCRIPT.with_name("pretrain.py"), pretrain.main, pretrain.Pretrain, told)


def lines(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def start(script, out, until, **changes):
    """A process that has logged so many lines."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(script.command(out, **changes), env=environment(), **quiet)
    for _ in range(2400):
        if lines(out) > until:
            break
        assert process.poll() is None
        time.sleep(0.05)
    return process


def content(folder):
    """Every tensor and number of a checkpoint, by file."""
    return {
        path.name: load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
        for path in sorted(folder.iterdir())
        if path.suffix != ".json"
    }


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool((ours == theirs).all()) if hasattr(ours, "all") else ours == theirs


@pytest.mark.parametrize("method", ["autograd", "fd"])
def test_two_steps_and_two_more_are_four_with_penalties_and_everything_on(method, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {**SHORT, **EVERYTHING, "loss.method": method}
    train(whole, **settings)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    train(parts, **settings)
    ours, theirs = (content(out / "checkpoints" / "step-000004") for out in (parts, whole))
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin"} < ours.keys()
    assert {"custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"} < ours.keys()  # anchors and average
    assert ours["custom_checkpoint_0.pkl"]["batches"] == 16
    assert same(ours, theirs)
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def poisoned(step, real):
    """Batches as they are until this step, and then with a number that is none."""
    before = adversarial.Training.batch

    def batch(self, turn):
        drawn = before(self, turn)
        if turn == step:
            (drawn.real if real else drawn.noise)[0, 0, 0] = float("nan")
        return drawn

    return batch


@pytest.mark.parametrize("real", [True, False])
def test_a_number_that_is_none_stops_the_run_with_its_step_and_its_batch(real, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(adversarial.Training, "batch", poisoned(2, real))
    with pytest.raises(SystemExit) as stopped:
        run(adversarial.main, adversarial.Adversarial, flags(out, **{**SHORT, "log_every": 4}))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("error: critic, r")
        and f"not finite at step 3: its batches are in {out}/nan-step-3.pt" in said
    )
    kept = torch.load(out / "nan-step-3.pt")
    assert kept["step"] == 3 and kept["terms"]["critic"] != kept["terms"]["critic"]
    (batch,) = kept["batches"]
    assert batch["real" if real else "noise"].isnan().sum() == 1 and len(batch["input_ids"]) == 2
    newest = checkpoint.latest(out / "checkpoints")
    checkpoint.verify(newest)
    assert newest.name == "step-000002"
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())
    monkeypatch.undo()
    train(out, **{**SHORT, "log_every": 4})


def test_a_run_that_collapses_says_so_in_its_metrics_and_on_the_progress_line(tmp_path, monkeypatch, capsys):
    marks = iter([0.9, 0.6, 0.4])
    monkeypatch.setattr(adversarial.Training, "look", lambda self, path: {"coverage": next(marks)})
    train(tmp_path / "run", steps=3, sample_every=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (warned,) = [line for line in lines if "warning" in line]
    assert warned["step"] == 3 and warned["warning"].startswith("coverage fell to 0.4 from 0.9")
    assert warned["warning"] in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(script, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    settings = {"steps": 40, "checkpoint_every": 3, "sample_every": 40, "log_every": 1}
    script.run(whole, **settings)
    process = start(script, out, 14, **settings)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    checkpoint.verify(checkpoint.latest(out / "checkpoints"))
    script.run(out, **settings)
    for name in ("result.json", "metrics.jsonl", "run.yaml"):
        assert (out / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (out, whole))
    assert same(ours, theirs)


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(script, tmp_path):
    out = tmp_path / "run"
    process = start(script, out, 4, steps=4000, log_every=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    newest = checkpoint.latest(out / "checkpoints")
    checkpoint.verify(newest)
    assert checkpoint.step_of(newest) == lines(out)


def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(script, tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    out, saved = tmp_path / "run", Accelerator.save_state

    def full(self, path):
        if ".step-000004" not in path:
            return saved(self, path)
        Path(path, "optimizer.bin").symlink_to("/dev/full")
        return saved(self, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Accelerator, "save_state", full)
        run(script.main, script.schema, script.flags(out, **SHORT))
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: checkpoint {out}/checkpoints/step-000004 could not be written")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    script.run(out, **SHORT)
    assert checkpoint.latest(out / "checkpoints").name == "step-000004"


def test_a_full_disk_costs_no_earlier_model(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    script.run(out, **SHORT)
    before = {path: path.read_bytes() for path in (out / "model").iterdir()}

    def full(path, *_, **__):
        Path(path, "config.json").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, path: full(path))
    with pytest.raises(SystemExit) as stopped:
        run(script.main, script.schema, script.flags(out, **SHORT))
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {out}/model could not be written (Error while serializing")
    assert {path: path.read_bytes() for path in (out / "model").iterdir()} == before
    assert not [path for path in out.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "{cutuot: 0.5}"}, "augmentation 'cutuot' is unknown"),
        ({"augment": "{cutout: 2.0}"}, "augmentation cutout must have a strength in [0, 1], not 2.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"optim.until": 0.0}, "optim.until must be in (0, 1], not 0.0"),
        ({"loss.penalties": "{consistency: 1.0}"}, "consistency compares"),
        ({"compile": "inductr"}, "backend of torch.compile 'inductr' is unknown; did you mean 'inductor'?"),
    ],
)
def test_a_mistake_is_found_before_the_folder_is_touched(changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(adversarial.main, adversarial.Adversarial, flags(tmp_path / "run", **changes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
