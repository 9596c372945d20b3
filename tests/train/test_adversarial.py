"""train/adversarial.py on a model of toy size: it learns nothing here, but everything else must work."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image as PILImage

from rope_mm.models.pipeline import RopeMMPipeline
from rope_mm.schemes.zoo import read_scheme
from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
LABELS = {"data.label": "label", "eval_samples": 70}


@pytest.fixture(scope="module")
def whole(adversarial, tmp_path_factory):
    """An uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    adversarial.train(output_dir, **LABELS)
    return output_dir


def test_a_run_leaves_its_configuration_metrics_images_and_a_model_that_loads(whole, runs):
    result = json.loads((whole / "result.json").read_text())
    assert {"samples", "accuracy", "frechet", "coverage", "real_frechet"} < set(result)
    lines = runs.lines(whole)
    assert [line["step"] for line in lines] == [*range(1, 7), 6]
    terms = {"loss/critic", "loss/generator", "penalty/r1", "penalty/r2", "score/real", "score/fake"}
    assert set(lines[0]) == {"step", *terms, "grad_norm/critic", "grad_norm/generator", "lr"}
    assert lines[0]["lr"] == 2e-3
    assert (whole / "samples" / "step-000006.png").stat().st_size > 5000
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert "scheme: rope-tv" in (whole / "run.yaml").read_text()
    assert set(json.loads((whole / "versions.json").read_text())) >= {"python", "torch", "transformers"}
    images = RopeMMPipeline.from_pretrained(whole / "model")(["a handwritten seven"] * 2).images
    assert [image.size for image in images] == [(8, 8)] * 2


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_the_same_command_resumes(
    whole, adversarial, runs, tmp_path, monkeypatch, capsys
):
    step = adversarial.module.Training.step

    def interrupted(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial.module.Training, "step", interrupted)
        assert adversarial.run(tmp_path / "run", **LABELS) == 130
    assert "stopped by SIGINT at step 3, saved; the same command resumes" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-000003").exists()
    assert adversarial.train(tmp_path / "run", **LABELS) == json.loads((whole / "result.json").read_text())
    assert runs.lines(tmp_path / "run") == runs.lines(whole)
    assert runs.same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_profile_prints_rotary_s_share_and_changes_nothing(script, runs, tmp_path, capsys):
    script.train(tmp_path / "plain", steps=4)
    assert "rotary's share" not in capsys.readouterr().out
    script.train(tmp_path / "profiled", steps=4, profile=1)
    assert re.search(r"rotary's share of step time: \d+\.\d%", capsys.readouterr().out)
    assert runs.same(tmp_path / "plain", tmp_path / "profiled")


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(whole, adversarial, monkeypatch):
    monkeypatch.setattr(adversarial.module.Training, "step", None)
    before = json.loads((whole / "result.json").read_text())
    assert adversarial.train(whole, **LABELS) == before


def test_invalid_flags_leave_an_existing_run_unchanged(adversarial, tmp_path):
    output_dir = tmp_path / "run"
    adversarial.train(output_dir, steps=1)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    for mistake in ({"loss.name": "rpgann"}, {"data.caption": "title"}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"unknown|no column|another configuration"):
            adversarial.train(output_dir, **{"steps": 1, "restart": "seed" not in mistake, **mistake})
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_a_mistake_at_the_start_does_not_name_the_run(adversarial, tmp_path):
    with pytest.raises(ValueError, match="9 x 9 pixels do not divide"):
        adversarial.train(tmp_path / "run", steps=1, **{"data.size": 9})
    adversarial.train(tmp_path / "run", steps=1)


def test_restart_starts_anew(adversarial, runs, tmp_path):
    output_dir = tmp_path / "run"
    adversarial.train(output_dir, steps=1)
    first = runs.weights(output_dir)
    with pytest.raises(
        ValueError, match=r"another configuration \('seed: 0' there, 'seed: 1' here\).*--restart"
    ):
        adversarial.train(output_dir, steps=1, seed=1)
    adversarial.train(output_dir, steps=1, seed=1, restart="true")
    assert not runs.equal(runs.weights(output_dir), first)
    assert len(runs.lines(output_dir)) == 1


@pytest.mark.parametrize("scheme", ["m-rope", "mixed"])
def test_a_scheme_is_trained_and_saved(scheme, adversarial, runs, tmp_path):
    adversarial.train(tmp_path / "run", steps=1, **{"rope.scheme": scheme})
    assert all(value.isfinite().all() for value in runs.weights(tmp_path / "run").values())
    saved = RopeMMPipeline.from_pretrained(tmp_path / "run" / "model").model
    assert saved.config.scheme == read_scheme(scheme, theta=100.0)


@pytest.mark.slow
def test_two_processes_train_together_resume_bit_exactly_and_one_process_continues_the_run(
    adversarial, runs, tmp_path
):
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    settings = {"checkpoint_every": 3, "loss.name": "rasgan"}
    adversarial.torchrun(whole, **settings)
    shutil.copytree(whole, parts)
    for folder in (parts / "checkpoints" / "step-000006", parts / "model"):
        shutil.rmtree(folder)
    shutil.copytree(parts, alone)
    adversarial.torchrun(parts, **settings)
    assert runs.same(parts, whole)
    adversarial.train(alone, **settings)  # one process reads the same images and noise
    for ours, theirs in zip(runs.lines(alone), runs.lines(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def test_two_micro_batches_give_the_same_step_as_the_whole_batch(adversarial, runs, tmp_path):
    for parts in (1, 2):
        adversarial.train(tmp_path / str(parts), steps=2, gradient_accumulation_steps=parts)
    parts, whole = runs.lines(tmp_path / "2"), runs.lines(tmp_path / "1")
    assert len(whole) == 2
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def test_a_penalty_of_weight_zero_is_not_computed(adversarial, runs, tmp_path):
    adversarial.train(tmp_path / "run", steps=1, **{"loss.penalties": "{r1: 0.0, r2: 0.5}"})
    (first,) = runs.lines(tmp_path / "run")
    assert "penalty/r2" in first and "penalty/r1" not in first


def test_penalties_that_are_given_replace_the_default_ones(adversarial, runs, tmp_path):
    adversarial.train(tmp_path / "run", steps=1, **{"loss.penalties": "{one-centred: 2.0}"})
    (first,) = runs.lines(tmp_path / "run")
    assert [name for name in first if name.startswith("penalty/")] == ["penalty/one-centred"]


def test_a_run_says_at_once_what_it_trains_and_where(script, tmp_path, capsys):
    script.train(tmp_path / "run", steps=1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"training: 1 steps in {tmp_path}/run; scheme: ")
    assert re.search(r"weights; data: \d+ rows, \d+ held out(; metrics: none of images.*)?$", first)
    script.train(tmp_path / "run", steps=2, extend="true")
    assert capsys.readouterr().out.startswith(f"resuming: step 1 of 2 in {tmp_path}/run; ")
    script.train(tmp_path / "run", steps=2)
    assert capsys.readouterr().out.startswith(f"done before: all 2 steps in {tmp_path}/run; ")


def folder_of_squares(folder, caption="square"):
    folder.mkdir()
    for i in range(10):
        PILImage.new("RGB", (12, 12), (25 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "caption": f"{caption} {i}"}) for i in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return {"data.path": folder, "data.size": 6, "data.channels": 3}


def test_captioned_images_of_a_folder_are_generated_without_labels(adversarial, tmp_path):
    data = folder_of_squares(tmp_path / "squares")
    assert adversarial.train(tmp_path / "run", steps=2, sample_every=2, **data) == {}
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()


def test_a_long_caption_is_cut_and_counted_or_refused_by_choice(adversarial, refusal, tmp_path, capsys):
    data = folder_of_squares(tmp_path / "squares", "é" * 2000)
    adversarial.train(tmp_path / "run", steps=1, **data, **{"data.max_caption_length": 21})
    assert "cut: 10 captions of more than 21 tokens" in capsys.readouterr().out
    training = adversarial.module.Training(
        adversarial.config(tmp_path / "run", **data, **{"data.max_caption_length": 21}), accelerator()
    )
    assert training.micro_batch(0).sequences.input_ids.shape[1] <= 21 + training.patches
    assert training.images.captions[0] == "é" * 10  # no half of a character
    changes = {"data.max_caption_length": 21, "data.long_captions": "refuse"}
    assert "row 0: a caption has more than 21 tokens" in refusal(
        adversarial, tmp_path / "b", **data, **changes
    )


def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scheme": "rope-vt"}, "scheme 'rope-vt' is unknown; did you mean 'rope-tv"),
        ({"loss.name": "rpgann"}, "loss.name: GAN loss 'rpgann' is unknown; did you mean 'rpgan'"),
        ({"model.head_dim": 15}, "head_dim 15"),
        ({"data.channels": 2}, "data.channels must be one of 1, 3, 4, not 2"),
        ({"data.size": 9}, "9 x 9 pixels do not divide into patches of 2 x 2"),
        ({"data.caption": "title"}, "no column 'title'; it has image, caption, label"),
        ({"optim.lrr": 1}, "--optim.lrr: optim.lrr is unknown; did you mean optim.lr"),
        ({"batch": 4}, "--batch: batch is now called global_batch_size"),
        ({"optim.final": 0.5}, "--optim.final: optim.final is now called optim.final_lr_ratio"),
        ({"critic_steps": 0}, "critic_steps must be at least 1, not 0"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, not 0"),
        (
            {"global_batch_size": 3, "gradient_accumulation_steps": 2},
            "global_batch_size 3 does not divide into 2 equal parts",
        ),
        ({"threads": -1}, "threads must be at least 0, not -1"),
        ({"optim.lr": -0.1}, "optim.lr must be at least 0, not -0.1"),
        ({"optim.lr": ".nan"}, "optim.lr must be at least 0, not nan"),
        ({"loss.penalties": "{r1: -1.0}"}, "loss.penalties.r1 must be at least 0, not -1.0"),
        ({"loss.qp_lambda": 0.0}, "loss.qp_lambda must be above 0, not 0.0"),
        ({"optim.betas": "[0.0, 1.0]"}, "optim.betas must be at least 0 and below 1, not 1.0"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, not 1.0"),
        ({"model.num_channels": 3}, "model.num_channels is data.channels"),
        ({"model.patch_size": 0}, "patch_size must be at least 1, not 0"),
        ({"data.image": "label"}, "column 'label' holds ClassLabel"),
        ({"data.label": "caption"}, "a label is a whole number from 0, not 'a handwritten"),
        (
            {"attn_implementation": "flex_attention"},
            "attention flex_attention has no backward on cpu; take sdpa or eager",
        ),
        ({"loss.penalties": "{r3: 1.0}"}, "penalty 'r3' is unknown"),
        ({"augment": "{cutuot: 0.5}"}, "augment: augmentation 'cutuot' is unknown"),
        ({"augment": "{cutout: 2.0}"}, "augment.cutout must be at least 0 and at most 1, not 2.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"optim.decay_until": 0.0}, "optim.decay_until must be above 0 and at most 1, not 0.0"),
        ({"loss.penalties": "{consistency: 1.0}"}, "consistency compares"),
        ({"loss.qp_lambda": 5.0}, "loss.qp_lambda 5.0 would change nothing: loss.name rpgan reads none"),
        (
            {"loss": "{method: fd, penalties: {}}"},
            "loss.method fd would change nothing: loss.penal",
        ),
        (
            {"optim.final_transport": 0.5},
            "optim.final_transport 0.5 would change nothing: loss",
        ),
        ({"data.channels": 4, "data.background": "red"}, "data.background red would change nothing"),
        ({"data.background": "reddd"}, "data.background: background must be a colour such as white"),
        ({"trackers": "wandbb"}, "trackers: tracker 'wandbb' is unknown; did you mean 'wandb'"),
        ({"evaluator": "modes"}, "evaluator modes would change nothing: data.label is empty"),
        ({"eval_samples": 5}, "eval_samples 5 would change nothing: data.label is empty"),
        ({"compile": "inductr"}, "backend of torch.compile 'inductr' is unknown; did you mean 'inductor'?"),
    ],
)
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_bad_input_ends_in_one_sentence_before_the_folder_is_touched(
    changes, message, dry_run, adversarial, refusal, tmp_path
):
    assert message in refusal(adversarial, tmp_path / "run", **changes, dry_run=dry_run)
    assert not (tmp_path / "run" / "run.yaml").exists()


def damaged_image(adversarial, output_dir):
    data = folder_of_squares(output_dir.parent / "images")
    for i in range(10):
        (output_dir.parent / "images" / f"{i}.png").write_bytes(b"not an image")
    return {**data, "data.strict": True}, "does not decode"


@pytest.mark.parametrize("cached", [False, True])
def test_images_that_cannot_be_read_are_skipped_named_and_counted_once(
    cached, adversarial, runs, tmp_path, capsys
):
    data = folder_of_squares(tmp_path / "images") | {"data.cache_in_memory": cached}
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"not an image")
    more = {"steps": 8, "checkpoint_every": 4, "sample_every": 8, "global_batch_size": 4}
    adversarial.train(tmp_path / "whole", **data, **more)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: row ")]
    counts = [line.get("skipped_images", 0) for line in runs.lines(tmp_path / "whole")]
    assert counts == sorted(counts)
    assert 1 <= counts[-1] == len(said) == len(set(said))
    assert all(re.search(r"row (\d), column 'image': .*/\1\.png", line) for line in said)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for path in ("checkpoints/step-000008", "model"):
        shutil.rmtree(tmp_path / "parts" / path)
    adversarial.train(tmp_path / "parts", **data, **more)
    assert runs.same(tmp_path / "parts", tmp_path / "whole")
    assert runs.lines(tmp_path / "parts") == runs.lines(tmp_path / "whole")


def cut_checkpoint(adversarial, output_dir):
    adversarial.train(output_dir, steps=2)
    file = output_dir / "checkpoints" / "step-000002" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-10])
    return {"steps": 2}, "optimizer.bin has"


def a_file_in_place_of_the_folder(adversarial, output_dir):
    output_dir.write_text("notes")
    return {}, f"{output_dir} is a file; give --output_dir a folder, which may be new"


@pytest.mark.parametrize("prepare", [damaged_image, cut_checkpoint, a_file_in_place_of_the_folder])
def test_bad_files_end_in_one_sentence(prepare, adversarial, refusal, tmp_path):
    changes, message = prepare(adversarial, tmp_path / "run")
    assert message in refusal(adversarial, tmp_path / "run", **changes)


def test_a_file_above_the_folder_of_a_run_is_named(adversarial, refusal, tmp_path):
    (file := tmp_path / "file").write_text("notes")
    assert f"{file} is a file; give --output_dir a folder" in refusal(adversarial, file / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo.yaml", "typo.yaml: optim.lrr is unknown; did you mean optim.lr?"),
        ("old.yaml", "old.yaml: data.keep is now called data.cache_in_memory"),
        ("missing.yaml", "missing.yaml: not found; give --config the path of a YAML file"),
    ],
)
def test_a_mistake_in_a_file_is_found_before_anything_runs(name, message, adversarial, refusal, tmp_path):
    (tmp_path / "typo.yaml").write_text("optim:\n  lrr: 0.1\n")
    (tmp_path / "old.yaml").write_text("data: {keep: true}\n")
    assert message in refusal(adversarial, tmp_path / "run", config=tmp_path / name)


def test_a_dry_run_checks_the_data_prints_what_is_resolved_and_touches_nothing(
    adversarial, refusal, tmp_path, capsys
):
    output_dir = tmp_path / "run"
    assert adversarial.run(output_dir, dry_run="true", **{"rope": "{theta: 5}"}) == 0
    printed = capsys.readouterr().out
    assert "scheme: rope-tv" in printed  # which is the default where only theta is given
    assert "# scheme: Scheme(" in printed and "# data: 1437 rows, 360 held out" in printed
    assert "# metrics: none of images, as data.label is empty" in printed
    assert not output_dir.exists()
    (tmp_path / "again.yaml").write_text(printed)
    again = load(adversarial.schema, ["--config", str(tmp_path / "again.yaml")])
    assert again == adversarial.config(output_dir, **{"rope": "{theta: 5}"})
    missing = refusal(adversarial, output_dir, dry_run="true", **{"data.path": tmp_path / "nowhere"})
    assert "cannot load" in missing


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "adversarial").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_begins_with_its_command_and_is_understood(path, adversarial):
    command, *_ = path.read_text().splitlines()
    assert re.match(rf"# .*train/\w+\.py --config configs/adversarial/{path.name}", command)
    if "train/adversarial.py" in command:
        adversarial.module.check(load(adversarial.schema, ["--config", str(path)]))
