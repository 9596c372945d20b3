"""Runs that start from others, and what a model keeps of the images it learned first."""

import json
import os
import shutil
import signal
from pathlib import Path

import lifelong
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rope_mm.data import FACTORS, load_splits, read_caption, render_sprites, select_rows
from rope_mm.training.checkpoint import TrainingState
from rope_mm.training.config import load
from rope_mm.training.health_checks import NaNGuard

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "lifelong" / "sprites.yaml"
OLD, NEW = "{shape: [ring, square]}", "{shape: [cross, moon]}"
SMALL = {
    "global_batch_size": 4, "max_length": 64, "log_every": 1, "sample_every": 100, "checkpoint_every": 1,
    "threads": 1,
    "model.hidden_size": 16, "model.intermediate_size": 16, "model.num_hidden_layers": 1, "steps": 2,
    "model.num_attention_heads": 2, "model.num_key_value_heads": 2,
}  # fmt: skip


def flags(out, **changes):
    settings = {"output_dir": out, **SMALL, **changes}
    return ["--config", str(CONFIG), *(word for k, v in settings.items() for word in (f"--{k}", str(v)))]


def read(out, **changes):
    own = {"seeds": 2, "data.filter": OLD, "new": NEW, "phase_two_steps": 1, "images_per_combination": 2}
    own |= {"eval_rows": 1024, "eval_captions": 4}
    return load(lifelong.Lifelong, flags(out, **own | changes))


def run_of(out, **changes):
    """A run of the pretraining script alone, with the same settings."""
    (one, *_) = lifelong.runs(read(out, **changes))["images"]
    return lifelong.replace(one, output_dir=str(out), init_from=str(changes.get("init_from", "")))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that is done."""
    out = tmp_path_factory.mktemp("runs") / "first"
    lifelong.pretrain.main(run_of(out))
    return out


def newest(out):
    return max((out / "checkpoints").iterdir())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)


def test_a_run_that_starts_from_another_has_exactly_its_weights_average_and_moments(first, tmp_path):
    changes = {"init_from": first, "seed": 7, "data.filter": NEW}
    training = lifelong.pretrain.Training(run_of(tmp_path / "next", **changes), Accelerator(cpu=True))
    guard = NaNGuard(training.accelerator, "stop")
    state = TrainingState({**training.states(), "nan_guard": guard})
    training.accelerator.register_for_checkpointing(state)  # as the loop does
    training.begin(0)
    trainer, kept = training.trainer, newest(first)
    untied = {k: v for k, v in trainer.model.state_dict().items() if k != "lm_head.weight"}
    assert same(untied, load_file(kept / "model.safetensors"))
    assert same(trainer.critic.critic.state_dict(), load_file(kept / "model_1.safetensors"))
    (stored,) = kept.glob("custom_checkpoint_*.pkl")
    assert same(training.average.model.state_dict(), torch.load(stored)["ema"]["model"])
    assert training.average.updates == 2
    for optimizer, name in (
        (trainer.optimizer, "optimizer.bin"),
        (trainer.critic.optimizer, "optimizer_1.bin"),
    ):
        ours, theirs = optimizer.state_dict()["state"], torch.load(kept / name)["state"]
        assert ours.keys() == theirs.keys()
        assert all(same(ours[key], theirs[key]) for key in ours)


def load_states(folder, key):
    states = [torch.load(path, weights_only=False) for path in folder.glob("custom_checkpoint_*.pkl")]
    return next(state for state in states if key in state)


def test_a_run_that_starts_from_another_reads_its_own_rows_from_the_first_step_and_resumes(
    first, tmp_path, monkeypatch
):
    changes = {"init_from": first, "steps": 2, "data.filter": NEW}
    lifelong.pretrain.main(run_of(tmp_path / "whole", **changes))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1
    step = lifelong.pretrain.Training.step

    def interrupted(self, number):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(lifelong.pretrain.Training, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"^{128 + signal.SIGINT}$"):
            lifelong.pretrain.main(run_of(tmp_path / "parts", **changes))
    lifelong.pretrain.main(run_of(tmp_path / "parts", **changes))
    whole, parts = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("whole", "parts"))
    assert same(parts, whole)
    assert not same(parts, load_file(newest(first) / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden_size": 32}, r"another model .*'hidden_size': 16.*'hidden_size': 32.*must be kept"),
        (
            {"image_head": "flow", "loss.penalties": "{r1: 1.0, r2: 1.0}"},
            "another image_head .adversarial there, flow here",
        ),
        ({"tokenizer": "bytes"}, "another tokenizer .words there, bytes here"),
        (
            {"data.templates": "['draw {caption}{image:generate}']"},
            "no token for 'draw' in 'draw '; use words",
        ),
        ({"data.filter": "{shape: [blob]}"}, "column 'shape' has no 'blob'; it has circle"),
        ({"data.filter": "{form: [ring]}"}, "no column 'form'; it has image, caption"),
        ({"data.filter": "{shape: []}"}, "no row of train holds one of .. in column 'shape'"),
    ],
)
def test_a_run_that_does_not_fit_its_init_from_is_refused_and_the_folder_unchanged(
    first, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        lifelong.pretrain.main(run_of(tmp_path / "next", init_from=first, **changes))
    assert not (tmp_path / "next").exists()


def test_init_from_refuses_a_folder_without_a_finished_run(first, tmp_path):
    cut = shutil.copytree(first, tmp_path / "cut")
    (cut / "result.json").unlink()
    for start in (cut, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no finished run; give the output_dir of one"):
            lifelong.pretrain.main(run_of(tmp_path / "next", init_from=start))


def test_rows_are_taken_by_the_names_or_the_numbers_of_their_labels():
    splits = load_splits("sprites")
    named = select_rows(splits, {"shape": ["ring", "moon"], "colour": ["red"]})
    numbered = select_rows(splits, {"shape": [5, 6], "colour": [0]})
    for split in ("train", "test"):
        rows = [
            shape in (5, 6) and colour == 0
            for shape, colour in zip(splits[split]["shape"], splits[split]["colour"], strict=True)
        ]
        assert len(named[split]) == sum(rows) > 0
        assert named[split]["caption"] == numbered[split]["caption"]
        assert all("red" in words for words in named[split]["caption"])
    assert len(select_rows(splits, {})["train"]) == len(splits["train"])


@pytest.mark.slow
def test_both_runs_of_a_seed_read_the_same_text_in_the_same_order(tmp_path):
    plan = lifelong.runs(read(tmp_path, steps=3))
    text, images = (
        lifelong.pretrain.Training(plan[name][1], Accelerator(cpu=True)) for name in ("text", "images")
    )
    assert [run.image_loss_weight for run in plan["text"]] == [0.0, 0.0]
    for number in range(3):
        ours, theirs = text.dataset[number], images.dataset[number]
        for name in ("input_ids", "labels", "position_ids", "document_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    begun = text.trainer.model.state_dict(), images.trainer.model.state_dict()
    assert same(*begun)


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_prints_the_same(tmp_path, capsys, monkeypatch):
    config = read(tmp_path / "all", seeds=1)
    lifelong.main(config)
    table = (tmp_path / "all" / "table.md").read_text()
    assert table in capsys.readouterr().out
    found = json.loads((tmp_path / "all" / "lifelong.json").read_text())
    assert {name: len(seeds) for name, seeds in found["metrics"].items()} == dict.fromkeys(
        ("text", "images", "new", "mixed"), 1
    )
    assert (tmp_path / "all" / "lifelong.png").stat().st_size > 2000
    mixed = (tmp_path / "all" / "mixed-0" / "run.yaml").read_text()
    assert all(f"- {shape}" in mixed for shape in ("ring", "square", "cross", "moon"))
    assert "images-0" in mixed
    monkeypatch.setattr(lifelong.pretrain, "main", None)
    lifelong.main(config)
    assert (tmp_path / "all" / "table.md").read_text() == table


class Fixed:
    """Generates the factors that `choose` makes of a caption's, and one caption for every image."""

    def __init__(self, choose, caption="", moved=False):
        self.choose, self.caption, self.moved = choose, caption, moved

    def prompt(self, name, text="", visual=None):
        return text

    def generate_image(self, prompts, generator):
        read = [read_caption(text) for text in prompts]
        factors = {name: torch.tensor([caption[name] for caption in read]) for name in FACTORS}
        steps = torch.randint(-self.moved, 1 + self.moved, (len(prompts), 2), generator=generator)
        return render_sprites(self.choose(factors), 16, steps).float() / 127.5 - 1

    def generate_text(self, prompts):
        return [self.caption] * len(prompts)


@pytest.mark.slow
def test_a_model_of_right_images_covers_all_and_one_of_one_sprite_covers_one(tmp_path):
    config = read(tmp_path, images_per_combination=8, eval_rows=4096, **{"data.size": 16})
    evaluator = lifelong.LifelongEvaluator(config)
    count = len({tuple(row) for row in zip(*(evaluator.rows["old"][name] for name in FACTORS), strict=True)})
    right = evaluator.image_metrics(Fixed(lambda factors: factors), "old")
    assert (right["old images right"], right["old covered"], right["old spread"]) == (1, 1, 0)
    various = evaluator.image_metrics(Fixed(lambda factors: factors, moved=True), "old")
    assert various["old covered"] == 1
    assert various["old spread"] == pytest.approx(1, abs=0.1)
    only = {name: evaluator.rows["old"][0][name] for name in FACTORS}
    alike = Fixed(lambda factors: {name: torch.full_like(factors[name], only[name]) for name in FACTORS})
    assert evaluator.image_metrics(alike, "old")["old covered"] == pytest.approx(1 / count)
    caption = evaluator.rows["old"][0]["caption"]
    factors = [tuple(row[name] for name in FACTORS) for row in evaluator.rows["old"].select(range(4))]
    share = evaluator.image_metrics(Fixed(lambda factors: factors, caption), "old")["old captions right"]
    assert share == factors.count(tuple(only.values())) / 4


def test_the_table_has_means_deviations_and_the_difference_of_the_text_losses():
    names = ("text", "images", "new", "mixed")
    metrics = {name: [{"text loss": 2.0}, {"text loss": 2.0}] for name in names}
    metrics["images"] = [{"text loss": 2.1, "old covered": 0.5}, {"text loss": 2.3, "old covered": 1.0}]
    for name in ("new", "mixed"):
        metrics[name] = [{"text loss": 3.0, "old covered": 0.25}] * 2
    text, difference = lifelong.report(metrics)
    assert difference == {"difference": pytest.approx(0.2), "error": pytest.approx(0.1)}
    assert "| difference ± standard error | +0.2000 ± 0.1000 |" in text
    assert "| old covered | 75.0 ± 35.4 | 25.0 ± 0.0 | 25.0 ± 0.0 |" in text


@pytest.mark.parametrize("changes", [{"data.paths": "[digits]"}, {}])
def test_a_configuration_without_anything_to_compare_is_refused(tmp_path, changes):
    config = read(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"give data\.paths \[sprites\], and in new"):
        lifelong.runs(config if changes else lifelong.replace(config, new={}))
