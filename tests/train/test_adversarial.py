"""The training script on a model of toy size: it learns nothing here, but everything else must work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import adversarial
import pytest
import torch
from safetensors.torch import load_file

from rope_mm.losses import GAN_LOSSES
from rope_mm.models import RopeMMForConditionalGeneration
from rope_mm.schemes.zoo import read_scheme
from rope_mm.training.config import load, run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "adversarial.py"
CONFIG = ROOT / "configs" / "adversarial" / "digits.yaml"


JUDGED = {"data.label": "label", "judged": 70}


def flags(out, **changes):
    """40 steps of two images on a model of toy size, judged only where data.label says so."""
    settings = {
        "config": CONFIG, "out": out, "steps": 40, "batch": 2, "judged": 20, "log_every": 1,
        "sample_every": 40, "checkpoint_every": 10, "threads": 1,
        "model.hidden_size": 16, "model.intermediate_size": 16, "model.patch_size": 2,
        "model.num_hidden_layers": 1, "data.label": "", **changes,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train(out, **changes):
    adversarial.main(load(adversarial.Adversarial, flags(out, **changes)))
    return json.loads((out / "result.json").read_text())


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out, **JUDGED)
    return out


def environment(**more):
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def test_a_run_leaves_its_configuration_metrics_pictures_and_a_model_that_loads(whole):
    result = json.loads((whole / "result.json").read_text())
    marks = {"accuracy", "frechet", "precision", "recall", "density", "coverage"}
    assert set(result) == {*marks, "samples", "worst_class_accuracy", *(f"real_{mark}" for mark in marks)}
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 41), 40]
    assert {"critic", "generator", "r1", "r2", "real", "fake"} < set(lines[0])
    assert (whole / "samples" / "step-000040.png").stat().st_size > 5000
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000030", "step-000040"]
    assert "scheme: rope-tv" in (whole / "run.yaml").read_text()
    assert set(json.loads((whole / "versions.json").read_text())) >= {"python", "torch", "transformers"}
    RopeMMForConditionalGeneration.from_pretrained(whole / "model")


def test_ctrl_c_saves_and_the_same_command_goes_on(whole, tmp_path, monkeypatch):
    step = adversarial.Training.step

    def interrupted(self, number):
        if number == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(adversarial.Training, "step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(adversarial.main, adversarial.Adversarial, flags(out, **JUDGED))
    assert stopped.value.code == 130
    assert (out / "checkpoints" / "step-000017").exists()
    assert train(out, **JUDGED) == json.loads((whole / "result.json").read_text())


def test_a_profile_prints_rotary_s_share_and_changes_nothing(tmp_path, capsys):
    train(tmp_path / "plain", steps=5)
    assert "rotary's share" not in capsys.readouterr().out
    train(tmp_path / "profiled", steps=5, profile=1)
    assert re.search(r"rotary's share of step time: \d+\.\d%", capsys.readouterr().out)
    plain, profiled = weights(tmp_path / "plain"), weights(tmp_path / "profiled")
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)


def test_a_run_that_is_whole_is_not_trained_again(whole, monkeypatch):
    monkeypatch.setattr(adversarial.Training, "step", None)
    before = json.loads((whole / "result.json").read_text())
    assert train(whole, **JUDGED) == before


def test_a_mistake_leaves_a_run_as_it_was(tmp_path):
    out = tmp_path / "run"
    train(out, steps=4)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for mistake in ({"loss.name": "rpgann"}, {"data.caption": "title"}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"unknown|no column|another configuration"):
            train(out, **{"steps": 4, "restart": "seed" not in mistake, **mistake})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_mistake_at_the_start_does_not_name_the_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="unknown"):
        train(out, steps=2, **{"loss.name": "rpgann"})
    train(out, steps=2)


def test_restart_begins_anew(tmp_path):
    out = tmp_path / "run"
    train(out, steps=4, sample_every=4)
    first = weights(out)
    with pytest.raises(
        ValueError, match=r"another configuration \('seed: 0' there, 'seed: 1' here\).*--restart"
    ):
        train(out, steps=4, sample_every=4, seed=1)
    train(out, steps=4, sample_every=4, seed=1, restart="true")
    assert any(not torch.equal(value, first[name]) for name, value in weights(out).items())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_every_loss_trains(loss, tmp_path):
    train(tmp_path / "run", steps=2, sample_every=2, **{"loss.name": loss, "critic_steps": 2})
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("scheme", ["flat", "grid", "m-rope", "rope-tie", "rope-tv-causal", "mixed"])
def test_every_kind_of_scheme_trains(scheme, tmp_path):
    train(tmp_path / "run", steps=2, sample_every=2, **{"rope.scheme": scheme})
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    saved = RopeMMForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.scheme == read_scheme(scheme, theta=100.0)


@pytest.mark.slow
def test_two_processes_train_together_and_resume_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def launch(out):
        words = [*torchrun, str(SCRIPT), *flags(out, steps=8, checkpoint_every=4, sample_every=8)]
        done = subprocess.run(
            words, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]

    launch(whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000008")
    shutil.rmtree(parts / "model")
    launch(parts)
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_penalty_of_weight_zero_is_left_out(tmp_path):
    train(tmp_path / "run", steps=2, **{"loss.penalties": "{r1: 0.0, r2: 0.5}"})
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "r2" in first
    assert "r1" not in first


def test_a_gradient_flows_into_the_generator_and_the_critic_stays_as_it_is(tmp_path):
    from accelerate import Accelerator

    config = load(adversarial.Adversarial, flags(tmp_path))
    training = adversarial.Training(config, Accelerator())
    duel, batch = training.duel, training.batch(0)
    critic = {name: p.clone() for name, p in duel.critic.named_parameters()}
    generator = {name: p.clone() for name, p in duel.generator.named_parameters()}
    duel.set_rates(0.0)
    duel.update_generator(batch, duel.draw(batch))
    assert all(torch.equal(p, critic[name]) for name, p in duel.critic.named_parameters())
    assert any(not torch.equal(p, generator[name]) for name, p in duel.generator.named_parameters())


def test_captioned_images_of_a_folder_are_drawn_without_labels(tmp_path):
    from PIL import Image as Picture

    folder = tmp_path / "squares"
    folder.mkdir()
    for i in range(10):
        Picture.new("RGB", (12, 12), (25 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "caption": f"square {i}"}) for i in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    data = {"data.path": folder, "data.size": 6, "data.channels": 3, "data.label": ""}
    out = tmp_path / "run"
    assert train(out, steps=2, sample_every=2, **data) == {}
    assert (out / "samples" / "step-000002.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scheme": "rope-vt"}, "scheme 'rope-vt' is unknown; did you mean 'rope-tv"),
        ({"loss.name": "rpgann"}, "GAN loss 'rpgann' is unknown; did you mean 'rpgan'"),
        ({"model.head_dim": 15}, "head_dim 15"),
        ({"data.size": 9}, "9 x 9 pixels do not divide into patches of 2 x 2"),
        ({"data.caption": "title"}, "no column 'title'; it has image, caption, label"),
        ({"optim.lrr": 1}, "--optim.lrr: optim.lrr is unknown; did you mean optim.lr"),
        ({"critic_steps": 0}, "critic_steps must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"threads": -1}, "threads must be at least 0, not -1"),
        ({"model.num_channels": 3}, "model.num_channels is data.channels"),
        ({"model.patch_size": 0}, "patch_size must be at least 1, not 0"),
        ({"data.image": "label"}, "column 'label' holds ClassLabel"),
        ({"data.label": "caption"}, "a label is a whole number from 0, not 'a handwritten"),
        (
            {"attention": "flex_attention"},
            "attention flex_attention has no backward on cpu; take sdpa or eager",
        ),
        ({"loss.penalties": "{r3: 1.0}"}, "penalty 'r3' is unknown"),
    ],
)
def test_bad_input_ends_in_one_sentence(changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(adversarial.main, adversarial.Adversarial, flags(tmp_path / "run", **changes))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def damaged_picture(out):
    folder = out / "pictures"
    folder.mkdir(parents=True)
    rows = [json.dumps({"file_name": f"{i}.png", "caption": "none"}) for i in range(10)]
    for i in range(10):
        (folder / f"{i}.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return {"data.path": folder}, "does not decode"


def another_run(out):
    train(out / "run", steps=2)
    return {"steps": 2, "seed": 1}, "another configuration"


def cut_checkpoint(out):
    train(out / "run", steps=2)
    file = out / "run" / "checkpoints" / "step-000002" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-10])
    return {"steps": 2}, "optimizer.bin has"


@pytest.mark.parametrize("prepare", [damaged_picture, another_run, cut_checkpoint])
def test_bad_files_end_in_one_sentence(prepare, tmp_path, capsys):
    changes, message = prepare(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(adversarial.main, adversarial.Adversarial, flags(tmp_path / "run", **changes))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_typo_in_a_file_is_found_before_anything_runs(tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text("optim:\n  lrr: 0.1\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(tmp_path / "typo.yaml")],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "typo.yaml: optim.lrr is unknown; did you mean optim.lr?" in done.stderr


def test_a_dry_run_prints_the_resolved_configuration_and_touches_nothing(tmp_path, capsys):
    adversarial.main(load(adversarial.Adversarial, [*flags(tmp_path / "run"), "--dry-run"]))
    printed = capsys.readouterr().out
    assert "scheme: rope-tv" in printed
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(printed)
    again = load(adversarial.Adversarial, ["--config", str(tmp_path / "again.yaml")])
    assert again == load(adversarial.Adversarial, flags(tmp_path / "run"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "adversarial").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_begins_with_its_command_and_is_understood(path):
    command, *_ = path.read_text().splitlines()
    assert re.match(rf"# .*train/\w+\.py --config configs/adversarial/{path.name}", command)
    if "train/adversarial.py" in command:
        load(adversarial.Adversarial, ["--config", str(path)])
