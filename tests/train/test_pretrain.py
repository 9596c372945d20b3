"""The pretraining script on a model of toy size, and what its model does when asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import pretrain
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file

from rope_mm.data import captioned_videos
from rope_mm.models import RopeMMForConditionalGeneration
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.config import load, run
from rope_mm.training.image_heads import IMAGE_HEADS
from rope_mm.training.rival import CriticTrainer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pretrain" / "tiny.yaml"


TEMPLATES = (
    "['{caption}{image:generate}', '{image}?{caption}', '{frames:generate}{caption}', "
    "'{image}{frames:generate}']"
)


def flags(data, out, **changes):
    settings = {
        "config": CONFIG, "out": out, "steps": 4, "batch": 8, "length": 64, "log_every": 1,
        "sample_every": 100, "checkpoint_every": 2, "threads": 1, "workers": 0, "tokenizer": "bytes",
        "head": "mse", "picture_weight": 1.0, "guidance": 1.0, "optim.lr": 2e-3, "optim.warm_up": 2,
        "model.patch_size": 2, "model.hidden_size": 16, "model.intermediate_size": 16,
        "model.num_hidden_layers": 1, "model.num_attention_heads": 2, "model.num_key_value_heads": 2,
        "data.paths": f"[{data}]", "data.templates": TEMPLATES, "data.size": 4, "data.channels": 1, **changes,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train(data, out, **changes):
    pretrain.main(load(pretrain.Pretrain, flags(data, out, **changes)))
    return json.loads((out / "result.json").read_text())


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one, two):
    ours, theirs = weights(one), weights(two)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def environment(**more):
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(data, out)
    return out


def test_a_profile_prints_rotary_s_share_and_changes_nothing(data, tmp_path, capsys):
    train(data, tmp_path / "plain")
    assert "rotary's share" not in capsys.readouterr().out
    train(data, tmp_path / "profiled", profile=1)
    assert "rotary's share of step time" in capsys.readouterr().out
    plain, profiled = weights(tmp_path / "plain"), weights(tmp_path / "profiled")
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)


def test_a_run_leaves_metrics_samples_and_a_model_that_loads(whole):
    result = json.loads((whole / "result.json").read_text())
    assert set(result) == {
        "held_out_words",
        "held_out_mse",
        "exact_match/image2text",
        "exact_match/video2text",
    }
    assert set(lines(whole)[0]) == {"step", "words", "mse"}
    names = {path.name for path in (whole / "samples").iterdir()}
    assert names == {
        f"step-000004{end}" for end in (".png", "-videos.png", "-image2text.txt", "-video2text.txt")
    }
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    RopeMMForConditionalGeneration.from_pretrained(whole / "model")


@pytest.mark.parametrize("head", IMAGE_HEADS)
def test_a_run_stopped_and_resumed_ends_as_one_that_was_not(head, data, tmp_path, monkeypatch):
    step, whole, parts = pretrain.Training.step, tmp_path / "whole", tmp_path / "parts"

    def interrupted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    train(data, whole, head=head)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Training, "step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(pretrain.main, pretrain.Pretrain, flags(data, parts, head=head))
    assert stopped.value.code == 130
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-000002"]
    assert train(data, parts, head=head) == json.loads((whole / "result.json").read_text())
    assert same(parts, whole)
    assert lines(parts) == lines(whole)


@pytest.mark.parametrize("changes", [{"temporal_patch_size": 2}, {"video_attention": "full"}], ids=str)
def test_clips_in_patches_of_two_frames_and_frames_that_see_each_other_are_trained(data, tmp_path, changes):
    settings = {f"model.{name}": value for name, value in changes.items()}
    train(data, tmp_path, steps=12, head="flow", **settings)
    pictures = [line["flow"] for line in lines(tmp_path) if "flow" in line]
    assert pictures[-1] < pictures[0]
    teller = RopeMMPipeline.from_pretrained(tmp_path / "model")
    (clip,) = teller.continue_video([["a"]], [torch.zeros(4, 1, 4, 4)], torch.Generator())
    assert clip.shape == (4, 1, 4, 4) and clip.isfinite().all()
    assert not clip[:2].any() if "temporal_patch_size" in changes else clip[:2].all()


def test_ctrl_c_with_workers_saves_and_workers_change_nothing(whole, data, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, str(ROOT / "train" / "pretrain.py"), *flags(data, out, workers=1)]
    process = subprocess.Popen(
        [*words, "--steps", "100000"], env=environment(), start_new_session=True, stderr=subprocess.PIPE
    )
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and len(lines(out)) > 4:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal and a cluster do: to the workers, too
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told.decode()[-2000:]
    assert len(list((out / "checkpoints").iterdir())) == 2
    train(data, tmp_path / "again", workers=1)
    assert same(tmp_path / "again", whole)


@pytest.mark.parametrize("head", ["mse", "flow"])
def test_pictures_are_learned_and_with_them_the_words(head, data, tmp_path):
    settings = {"optim.lr": 1e-2, "ema": 0.5, "model.hidden_size": 32, "model.num_hidden_layers": 2}
    templates = {"data.templates": "['{caption}{image:generate}', '{image}{caption}']"}
    train(data, tmp_path / "run", head=head, steps=100, batch=16, **settings, **templates)
    first, *_, last, _ = lines(tmp_path / "run")
    assert last["words"] < 0.1 * first["words"]
    assert last[head] < 0.3 * first[head]
    if head == "mse":  # a bar is drawn where its caption says; the mean of all is 0.75 from each
        teller = RopeMMPipeline.from_pretrained(tmp_path / "run" / "model")
        drawn = teller.generate_image(
            [teller.prompt("text2image", letter) for letter in "abcd"], torch.Generator()
        )
        bars = 2 * torch.eye(4)[:, None, None].expand(4, 1, 4, 4) - 1
        assert (drawn - bars).square().mean() < 0.3


@pytest.mark.parametrize("resting", ["critic", "model"])
def test_each_player_of_the_adversarial_head_learns_while_the_other_rests(
    resting, data, tmp_path, monkeypatch
):
    settings = {"optim.lr": 1e-2, "optim.critic_lr": 1e-2, "loss.penalties": "{r1: 0.0, r2: 0.1}"}
    if resting == "critic":
        monkeypatch.setattr(CriticTrainer, "update", lambda *args: {})
    else:
        settings["optim.lr"] = 0.0
    train(data, tmp_path / "run", head="adversarial", steps=80, **settings)
    *seen, _ = lines(tmp_path / "run")
    name = "adversarial" if resting == "critic" else "critic"
    assert sum(line[name] for line in seen[-10:]) / 10 < 0.8 * seen[0][name]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(data, tmp_path, capsys, monkeypatch):
    step = pretrain.Training.step

    def poisoned(self, number):
        if number == 2:
            next(self.learner.model.parameters()).data.fill_(float("nan"))
        return step(self, number)

    monkeypatch.setattr(pretrain.Training, "step", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run(pretrain.main, pretrain.Pretrain, flags(data, tmp_path / "run"))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: words, mse not finite at step 3: its batches are in ")
    kept = torch.load(tmp_path / "run" / "nan-step-3.pt")
    assert len(kept["batches"][0]["rows"]) == 8
    assert kept["batches"][0]["input_ids"].shape == kept["batches"][0]["labels"].shape
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()


def test_a_model_writes_draws_and_goes_on_when_asked(whole, tmp_path, capsys):
    def ask(*words):
        evaluate.main(load(evaluate.Evaluate, ["--model", str(whole / "model"), *map(str, words)]))
        return capsys.readouterr().out

    picture, clip, drawn = tmp_path / "a.png", tmp_path / "a.gif", tmp_path / "drawn.png"
    frames = [Picture.new("L", (4, 4), 80 * i) for i in range(3)]
    frames[0].save(picture)
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    assert ask("--caption", picture).count("\n") == 1
    assert ask("--caption", clip).count("\n") == 1
    assert ask("--draw", "a", "--to", drawn).strip() == str(drawn)
    assert evaluate.read_frames(str(drawn), 32, 1).shape == (1, 1, 32, 32)
    ask("--extend", clip, "--frames", 2, "--to", drawn)
    with Picture.open(drawn) as moving:
        assert moving.n_frames == 5
        first = evaluate.read_frames(str(drawn), 4, 1)
        assert torch.equal(first[:3], evaluate.read_frames(str(clip), 4, 1))
    ask("--extend", clip, "--frames", 9, "--cache", "rolling", "--to", drawn)
    with Picture.open(drawn) as moving:
        assert moving.n_frames == 12


def test_sprites_and_clips_are_examined_and_held_out_rows_are_asked_for_by_number(tmp_path, capsys):
    out, size = tmp_path / "run", {"data.size": 8, "data.channels": 3, "model.patch_size": 8}
    size["data.templates"] = "['{caption}{image:generate}', '{image}{caption}', '{frames:generate}{caption}']"
    train("sprites,videos", out, steps=1, tokenizer="words", **size)
    marks = {f"acc/{task}" for task in ("text2image", "image2text", "text2video", "video2text")}
    assert marks < set(json.loads((out / "result.json").read_text()))
    capsys.readouterr()

    def ask(*words):
        evaluate.main(load(evaluate.Evaluate, ["--model", str(out / "model"), *map(str, words)]))
        return capsys.readouterr().out

    rows, drawn = captioned_videos()["test"], tmp_path / "clip.png"
    assert ask("--caption", "videos:5").startswith(f"videos:5 {rows[5]['caption']}\n")
    ask("--extend", "videos:5", "--given", 2, "--frames", 1, "--to", drawn)
    with Picture.open(drawn) as moving:
        assert moving.n_frames == 3
    with pytest.raises(ValueError, match="'a rde circle' has words that the model was not taught"):
        ask("--draw", "a rde circle")
    with pytest.raises(ValueError, match="videos:-1000 cannot be read as a picture"):
        ask("--caption", "videos:-1000")


def test_what_a_model_was_not_taught_is_refused(data, tmp_path):
    train(data, tmp_path / "run", steps=1, **{"data.templates": "['{caption}']"})
    teller = RopeMMPipeline.from_pretrained(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="no template of this model trains text2image; they are"):
        teller.prompt("text2image", "a")
    with pytest.raises(ValueError, match=r"holds no generation_spec\.json; give the folder model"):
        RopeMMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "floww"}, "head 'floww' is unknown; did you mean 'flow'"),
        ({"length": 3}, "does not fit a row of 3; raise the length"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"data.templates": "['{title}']"}, "template '{title}' fits no source"),
        ({"head": "adversarial", "loss.name": "rasgan", "accumulate": 2}, "each of 2 turns of processes"),
        ({"data.join": 0}, "data.join must be at least 1"),
        ({"model.num_channels": 3}, "model.num_channels is data.channels"),
        (
            {"guidance": 2.0, "data.templates": "['{caption}{image:generate}']"},
            "guidance 2.0 needs a template",
        ),
        ({"attention": "spda"}, "attention 'spda' is unknown; did you mean 'sdpa'"),
        (
            {"attention": "flex_attention"},
            "attention flex_attention has no backward on cpu; take sdpa or eager",
        ),
        (
            {"attention": "flash_attention_2"},
            "attention flash_attention_2 has no backward on cpu; take sdpa or eager",
        ),
        ({"data.size": 5}, "5 x 5 pixels do not divide into patches of 2 x 2"),
    ],
)
def test_bad_input_ends_in_one_sentence(changes, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(pretrain.main, pretrain.Pretrain, flags(data, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_begins_with_its_command_and_is_understood(path):
    assert path.read_text().startswith(f"# python train/pretrain.py --config configs/pretrain/{path.name}\n")
    load(pretrain.Pretrain, ["--config", str(path)])
