"""train/pretrain.py on a model of toy size, and what its model generates."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image as PILImage

from rope_mm.data import captioned_videos
from rope_mm.models import RopeMMForConditionalGeneration
from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.training.adversarial_trainer import CriticTrainer
from rope_mm.training.config import load
from rope_mm.training.image_heads import IMAGE_HEADS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(pretrain, tmp_path_factory):
    """An uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.train(output_dir)
    return output_dir


@pytest.fixture
def generate(whole, capsys):
    """A function: flags -> what train/generate.py prints."""
    import generate as script

    def call(*flags, model=whole):
        script.main(load(script.Generate, ["--model", str(model / "model"), *map(str, flags)]))
        return capsys.readouterr().out

    call.read_frames = script.read_frames
    return call


def test_a_run_leaves_metrics_samples_and_a_model_that_loads(whole, runs):
    result = json.loads((whole / "result.json").read_text())
    texts = {"exact_match/image2text", "exact_match/video2text"}
    assert set(result) == {"eval_loss/text", "eval_loss/image", *texts}
    assert set(runs.lines(whole)[0]) == {"step", "loss/text", "loss/image", "grad_norm", "lr"}
    names = {path.name for path in (whole / "samples").iterdir()}
    assert names == {
        f"step-000004{end}" for end in (".png", "-videos.png", "-image2text.txt", "-video2text.txt")
    }
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    RopeMMForConditionalGeneration.from_pretrained(whole / "model")


@pytest.mark.parametrize("head", IMAGE_HEADS)
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(head, pretrain, head_flags, runs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = pretrain.train(whole, **head_flags(head))
    shutil.copytree(whole, parts)
    for path in (parts / "checkpoints" / "step-000004", parts / "model"):
        shutil.rmtree(path)
    assert pretrain.train(parts, **head_flags(head)) == result
    assert runs.same(parts, whole)
    assert runs.lines(parts) == runs.lines(whole)


def test_transport_is_part_of_the_image_loss_of_the_adversarial_head(pretrain, runs, tmp_path):
    first = {}
    for weight in (0.0, 1.0, 2.0):
        out = tmp_path / str(weight)
        pretrain.train(out, image_head="adversarial", steps=1, **{"loss.transport": weight})
        first[weight] = runs.lines(out)[0]["loss/image"]
    assert first[1.0] - first[0.0] > 0.5  # the mean square of noise, and of images, is about one
    assert first[2.0] - first[0.0] == pytest.approx(2 * (first[1.0] - first[0.0]), rel=1e-3)


def test_images_have_the_number_of_noisy_copies_asked_for_and_else_that_of_the_head(pretrain, tmp_path):
    def copies(**changes):
        config = pretrain.config(tmp_path, max_length=300, **changes)
        batch = pretrain.module.Training(config, Accelerator(cpu=True)).dataset[0]
        assert not batch.skipped
        return int(batch.sample.max()) + 1, len(batch.noise)

    (one, patches), (two, doubled) = copies(image_head="flow"), copies(image_head="energy")
    assert (one, two, doubled) == (1, 2, 2 * patches)
    assert copies(image_head="flow", noisy_copies=3) == (3, 3 * patches)
    assert copies(image_head="energy", noisy_copies=3) == (3, 3 * patches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.group_size": 5},
            r"global_batch_size 12 must be a whole number of groups of .* 5 for each of 1",
        ),
        (
            {"gradient_accumulation_steps": 2},
            r"must be a whole number of groups .* 4 for each of 2 micro-batches",
        ),
        ({"data.streaming": "true"}, "data.group_by needs all rows at hand"),
        ({"data.group_by": ""}, "data.group_size 4 would change nothing: data.group_by is empty"),
        ({"field.iterations": 5}, "field.iterations 5 would change nothing: image_head is drift, not wflow"),
        ({"image_head": "flow", "field.widths": "[1.0]"}, "image_head is flow, not drift or wflow"),
    ],
    ids=str,
)
def test_groups_and_fields_that_do_not_fit_are_refused(
    pretrain, head_flags, refusal, tmp_path, changes, message
):
    assert re.search(message, refusal(pretrain, tmp_path / "run", **head_flags("drift") | changes))
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_a_field_head_without_groups_stops_at_the_first_step_and_says_how_to_group(
    pretrain, refusal, tmp_path
):
    message = refusal(pretrain, tmp_path, image_head="wflow")
    assert re.search("of the first step are the only ones of their text .* group rows by", message)


def test_images_that_are_alone_with_their_text_later_are_counted_and_the_run_goes_on(
    pretrain, head_flags, runs, tmp_path
):
    flags = head_flags("drift") | {"data.templates": '["{caption}{image:generate}", "{image}{caption}"]'}
    pretrain.train(tmp_path, steps=12, **flags)
    lines = runs.lines(tmp_path)
    alone = [line["images_alone"] for line in lines if "images_alone" in line]
    assert 0 < len(alone) < 12 and all(0 < share <= 1 for share in alone)


@pytest.mark.parametrize("changes", [{"temporal_patch_size": 2}, {"video_attention": "full"}], ids=str)
def test_patches_of_two_frames_and_frames_that_see_each_other_are_trained(pretrain, runs, tmp_path, changes):
    settings = {f"model.{name}": value for name, value in changes.items()}
    pretrain.train(tmp_path, steps=12, image_head="flow", **settings)
    losses = [line["loss/image"] for line in runs.lines(tmp_path) if "loss/image" in line]
    assert losses[-1] < losses[0]
    pipeline = RopeMMPipeline.from_pretrained(tmp_path / "model")
    (video,) = pipeline.continue_video([["a"]], [torch.zeros(4, 1, 4, 4)], torch.Generator())
    assert video.shape == (4, 1, 4, 4) and video.isfinite().all()
    assert not video[:2].any() if "temporal_patch_size" in changes else video[:2].all()


def test_the_number_of_workers_does_not_change_the_result(whole, pretrain, runs, tmp_path):
    pretrain.train(tmp_path / "run", num_workers=1)
    assert runs.same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_with_workers_saves_a_checkpoint(pretrain, runs, tmp_path):
    output_dir = tmp_path / "run"
    command = pretrain.command(output_dir, num_workers=1, steps=100_000)
    options = {"env": runs.environment(), "start_new_session": True, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    for _ in range(1200):
        if len(runs.lines(output_dir)) > 4:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal and a cluster do: to the workers, too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()[-2000:]
    assert len(list((output_dir / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("head", ["mse", pytest.param("flow", marks=pytest.mark.slow)])
def test_images_and_text_are_learned_together(head, pretrain, runs, tmp_path):
    settings = {"optim.lr": 1e-2, "ema_decay": 0.5, "model.hidden_size": 32, "model.num_hidden_layers": 2}
    templates = {"data.templates": "['{caption}{image:generate}', '{image}{caption}']"}
    more = {"image_head": head, "steps": 100, "global_batch_size": 16, "checkpoint_every": 100}
    pretrain.train(tmp_path / "run", **more, **settings, **templates)
    first, *_, last, _ = runs.lines(tmp_path / "run")
    assert last["loss/text"] < 0.1 * first["loss/text"]
    assert last["loss/image"] < 0.3 * first["loss/image"]
    if head == "mse":  # a bar is where its caption says; the mean of all is 0.75 from each
        pipeline = RopeMMPipeline.from_pretrained(tmp_path / "run" / "model")
        images = pipeline(list("abcd"), output_type="pt").images
        bars = 2 * torch.eye(4)[:, None, None].expand(4, 1, 4, 4) - 1
        assert (images - bars).square().mean() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("resting", ["critic", "model"])
def test_generator_and_critic_learn_while_the_other_is_frozen(resting, pretrain, runs, tmp_path, monkeypatch):
    settings = {"optim.lr": 1e-2, "optim.critic_lr": 1e-2, "loss.penalties": "{r2: 0.1}"}
    if resting == "critic":
        monkeypatch.setattr(CriticTrainer, "step", lambda *args, **kwargs: {})
    else:
        settings["optim.lr"] = 0.0
    more = {"image_head": "adversarial", "steps": 50, "checkpoint_every": 50}
    pretrain.train(tmp_path / "run", **more, **settings)
    *lines, _ = runs.lines(tmp_path / "run")
    name = "loss/image" if resting == "critic" else "loss/critic"
    assert sum(line[name] for line in lines[-10:]) / 10 < 0.8 * lines[0][name]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(pretrain, refusal, tmp_path, monkeypatch):
    training = pretrain.module.Training
    step = training.step

    def poisoned(self, number):
        if number == 2:
            next(self.trainer.model.parameters()).data.fill_(float("nan"))
        return step(self, number)

    monkeypatch.setattr(training, "step", poisoned)
    last = refusal(pretrain, tmp_path / "run")
    assert re.match(r"error: loss/text, loss/image.* not finite at step 3: its batches are in ", last)
    kept = torch.load(tmp_path / "run" / "nan-step-3.pt")
    assert len(kept["batches"][0]["rows"]) == 8
    assert kept["batches"][0]["input_ids"].shape == kept["batches"][0]["labels"].shape
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()


def test_a_model_generates_texts_images_and_more_frames(generate, tmp_path):
    image, video, output = tmp_path / "a.png", tmp_path / "a.gif", tmp_path / "made.png"
    frames = [PILImage.new("L", (4, 4), 80 * i) for i in range(3)]
    frames[0].save(image)
    frames[0].save(video, save_all=True, append_images=frames[1:])
    assert generate("--describe", image).count("\n") == 1
    assert generate("--describe", video).count("\n") == 1
    assert generate("--prompt", "a", "--output", output).strip() == str(output)
    with PILImage.open(output) as made:
        assert made.size == (32, 32)
    several = generate("--prompt", "a", "--num_images", 2, "--zoom", 1, "--output", output).split()
    assert several == [str(tmp_path / f"made-{i}.png") for i in range(2)]
    one, two = (generate.read_frames(path, 4, 1) for path in several)
    assert one.shape == (1, 1, 4, 4) and not torch.equal(one, two)
    generate("--continue_video", video, "--frames", 2, "--output", output)
    with PILImage.open(output) as made:
        assert made.n_frames == 5
    first = generate.read_frames(str(output), 4, 1)
    assert torch.equal(first[:3], generate.read_frames(str(video), 4, 1))
    generate("--continue_video", video, "--frames", 9, "--cache", "rolling", "--output", output)
    with PILImage.open(output) as made:
        assert made.n_frames == 12


@pytest.mark.slow
def test_sprites_and_videos_are_evaluated_and_held_out_rows_are_named_by_number(pretrain, generate, tmp_path):
    run, size = tmp_path / "run", {"data.size": 8, "data.channels": 3, "model.patch_size": 8}
    size["data.templates"] = "['{caption}{image:generate}', '{image}{caption}', '{frames:generate}{caption}']"
    result = pretrain.train(run, steps=1, tokenizer="words", **size, **{"data.paths": "[sprites,videos]"})
    tasks = ("text2image", "image2text", "text2video", "video2text")
    assert {f"acc/{task}" for task in tasks} < set(result)
    rows, output = captioned_videos()["test"], tmp_path / "video.png"
    said = generate("--describe", "videos:5", model=run)
    assert f"videos:5 {rows[5]['caption']}\n" in said
    flags = ["--continue_video", "videos:5", "--context_frames", 2, "--frames", 1, "--output", output]
    generate(*flags, model=run)
    with PILImage.open(output) as made:
        assert made.n_frames == 3
    with pytest.raises(ValueError, match="'a rde circle'"):
        generate("--prompt", "a rde circle", model=run)
    with pytest.raises(ValueError, match="videos:-1000 cannot be read as an image"):
        generate("--describe", "videos:-1000", model=run)


def test_a_task_that_no_template_trains_is_refused(pretrain, tmp_path):
    pretrain.train(tmp_path / "run", steps=1, **{"data.templates": "['{caption}']"})
    pipeline = RopeMMPipeline.from_pretrained(tmp_path / "run" / "model")
    with pytest.raises(
        ValueError, match="no template of this model trains text2image; it was trained for text alone"
    ):
        pipeline.prompt("text2image", "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_head": "floww"}, "image_head: image head 'floww' is unknown; did you mean 'flow'"),
        ({"head": "flow"}, "--head: head is now called image_head"),
        ({"max_length": 3}, "does not fit a row of 3"),
        ({"max_length": 3, "dry_run": "true"}, "none of the first 8 documents can be learned from: row"),
        ({"data.size": 5, "dry_run": "true"}, "5 x 5 pixels do not divide into patches of 2 x 2"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
        ({"data.templates": "['{title}']"}, "template '{title}' fits no source"),
        ({"data.templates": "[]"}, "data.templates must name at least one"),
        ({"image_head": "energy", "noisy_copies": 1}, "noisy_copies is 1; the energy head needs 2 or more"),
        ({"image_head": "adversarial", "noisy_copies": 2}, "the adversarial head takes noisy_copies 0"),
        ({"flow.times": "logit-normal"}, "flow.times logit-normal would change nothing: image_head is mse"),
        ({"image_head": "flow", "flow.deviation": 0.0}, "flow.deviation must be above 0"),
        ({"energy.repulsion": 0.5}, "energy.repulsion 0.5 would change nothing: image_head is mse"),
        ({"loss": "{penalties: {r1: 2.0}}"}, "loss.penalties '{r1: 2.0}' would change nothing: ima"),
        ({"optim.critic_lr": 1.0}, "optim.critic_lr 1.0 would change nothing: image_head mse has no critic"),
        ({"data.background": "reddd"}, "data.background: background must be a colour such as white"),
        ({"data.shuffle": 5}, "data.shuffle 5 would change nothing: data.streaming is false"),
        (
            {"image_head": "adversarial", "loss.name": "rasgan", "gradient_accumulation_steps": 2},
            "each of 2 micro-batches",
        ),
        ({"data.rows_per_document": 0}, "data.rows_per_document must be at least 1, not 0"),
        ({"model.num_channels": 3}, "model.num_channels is data.channels"),
        (
            {"guidance_scale": 2.0, "data.templates": "['{caption}{image:generate}']"},
            "guidance_scale 2.0 needs a template",
        ),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, not -1.0"),
        ({"image_loss_weight": -1.0}, "image_loss_weight must be at least 0, not -1.0"),
        ({"optim.max_grad_norm": -1.0}, "optim.max_grad_norm must be at least 0, not -1.0"),
        (
            {"attn_implementation": "spda"},
            "attn_implementation: attention 'spda' is unknown; did you mean 'sdpa'",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            "attention flash_attention_2 has no backward on cpu; take sdpa or eager",
        ),
        ({"data.size": 5}, "5 x 5 pixels do not divide into patches of 2 x 2"),
    ],
)
def test_bad_input_ends_in_one_sentence(changes, message, pretrain, refusal, tmp_path):
    assert message in refusal(pretrain, tmp_path / "run", **changes)


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize(
    ("template", "silent"),
    [("{caption}{image:generate}", True), ("{image}{frames:generate}", True), ("{image}{caption}", False)],
)
def test_a_run_begins_with_a_line_on_keys_of_images_where_no_template_generates_one(
    template, silent, dry_run, pretrain, tmp_path, capsys
):
    assert (
        pretrain.run(tmp_path / "run", steps=1, dry_run=dry_run, **{"data.templates": f"['{template}']"}) == 0
    )
    said = capsys.readouterr().out
    line = "images: no template generates one, as {image:generate} does, so image_head, image_loss_weight and"
    assert (line not in said) == silent


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_begins_with_its_command_and_is_understood(path, pretrain):
    text, command = path.read_text(), f"# python train/pretrain.py --config configs/pretrain/{path.name}"
    given = ["--data.paths", "[sprites]"] if '"???"' in text else []
    assert text.splitlines()[0].startswith(f"{command} --data.paths" if given else command)
    pretrain.module.check(load(pretrain.schema, ["--config", str(path), *given]))
