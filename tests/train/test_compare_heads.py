"""Image heads compared for equal training, on models of toy size."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import compare_heads
import numpy
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from rope_mm.data import load_images, load_splits
from rope_mm.evaluation.head_comparison import NOTE, REAL, write_table
from rope_mm.evaluation.head_curves import best_points, log_point, read_curve
from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "heads"
HEADS = "mse", "flow", "energy", "drift", "wflow", "rpgan+r1+r2", "gan-qp"
TOY = {
    "global_batch_size": 4, "eval_samples": 70, "classifier_epochs": 1, "classifier_samples": 60,
    "passes": "[1, 2]", "checkpoint_every": 1, "page": "false",
    "model.hidden_size": 8, "model.intermediate_size": 8,
    "model.num_hidden_layers": 1, "model.num_attention_heads": 1, "model.num_key_value_heads": 1,
}  # fmt: skip
CURVE = {"heads.flow.sample_every": 1}


def read(folder, name="digits", **changes):
    """The configuration of that name with few steps of a small model."""
    config = CONFIGS / f"{name}.yaml"
    heads = yaml.safe_load(config.read_text())["heads"]
    few = {f"heads.{head}.steps": 2 for head in heads}
    few |= {f"heads.{head}.data.group_size": 2 for head, keys in heads.items() if "data" in keys}
    settings = {"config": config, **TOY, **few, "output_dir": folder / "out", **changes}
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return load(compare_heads.CompareHeads, flags)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison on the embedded digits; its configuration."""
    config = read(tmp_path_factory.mktemp("heads"), noise_scales="[1, 0.5]", **CURVE)
    compare_heads.main(config)
    return config


def report(config):
    return json.loads((Path(config.output_dir) / "heads.json").read_text())


def test_every_head_has_metrics_beside_real_images_by_its_passes_and_noise(done):
    out, found = Path(done.output_dir), report(done)
    assert tuple(found["heads"]) == HEADS
    passes = {head: list(run["metrics"]) for head, (run,) in found["heads"].items()}
    once, twice = ["1", "1, noise * 0.5"], ["2", "2, noise * 0.5"]
    assert passes == {head: once + twice if head == "flow" else once for head in HEADS}
    for (run,) in found["heads"].values():
        assert all(set(metrics) == set(found["real"]) for metrics in run["metrics"].values())
        assert run["metrics"]["1"] != run["metrics"]["1, noise * 0.5"]
        assert run["steps"] == 2 and run["CPU minutes"] > 0
    lines = [line.split(" | ")[:2] for line in (out / "table.md").read_text().splitlines()]
    begun = [[f"| {REAL}", ""], *([f"| {head}", count] for head in HEADS for count in passes[head])]
    assert lines[2:19] == begun
    with PILImage.open(out / "heads.png") as figure, PILImage.open(out / "samples.png") as sheet:
        assert (
            figure.width > 900 and sheet.height == 18 + 17 * 52
        )  # sizes, a row for reals, and each line of the table


def test_a_critic_counts_among_the_weights_and_costs_operations(done):
    took = {head: run for head, (run,) in report(done)["heads"].items()}
    assert took["mse"]["TFLOP"] == took["flow"]["TFLOP"]
    assert took["mse"]["weights"] == took["flow"]["weights"] < took["gan-qp"]["weights"]
    assert 2 * took["flow"]["TFLOP"] < took["gan-qp"]["TFLOP"] < took["rpgan+r1+r2"]["TFLOP"]


def test_a_flow_generates_other_images_in_one_pass_than_in_several(done):
    (flow,) = report(done)["heads"]["flow"]
    assert flow["metrics"]["1"]["frechet"] != flow["metrics"]["2"]["frechet"]


def test_images_are_evaluated_during_training_where_sample_every_asks_for_it(done):
    found, out = report(done)["heads"], Path(done.output_dir)
    (flow,), (mse,) = found["flow"], found["mse"]
    assert list(flow["curve"]) == ["1", "2"] and list(mse["curve"]) == ["2"]
    assert flow["curve"]["2"] == {passes: flow["metrics"][passes] for passes in ("1", "2")}
    assert flow["curve"]["1"].keys() == flow["curve"]["2"].keys()
    assert flow["curve"]["1"]["1"] != flow["curve"]["2"]["1"]
    lines = [line.split(" | ")[:3] for line in (out / "curves.md").read_text().splitlines()]
    best = min("12", key=lambda passes: flow["curve"]["1"][passes]["frechet"])
    assert ["| flow", f"{flow['TFLOP'] / 2:.3g}", best] in lines
    with PILImage.open(out / "curves.png") as figure:
        assert figure.width > 900


def test_a_curve_is_read_from_a_log_with_the_later_of_two_lines_of_a_step():
    real = {"frechet": 0.5}
    first, again = (log_point({"1": {"frechet": distance}}, real) for distance in (5.0, 4.0))
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, **first}, {"step": 2, **again}]
    assert read_curve(lines, ["1"], real) == ({2: {"1": {"frechet": 4.0}}}, 0)
    assert read_curve(lines, ["1", "4"], real) == ({}, 1), "no evaluation in four passes"
    assert read_curve(lines, ["1"], {"frechet": 0.6}) == ({}, 1), "another classifier"
    assert read_curve(lines[:1], ["1"], real) == ({}, 0)


@pytest.mark.slow
def test_a_curve_has_no_points_of_another_classifier_or_of_a_command_before(done, tmp_path, capfd):
    shutil.copytree(done.output_dir, tmp_path / "out")
    config = read(tmp_path, noise_scales="[1, 0.5]", **CURVE, classifier_epochs=2)
    compare_heads.main(config)
    assert list(report(config)["heads"]["flow"][0]["curve"]) == ["2"]
    assert not list((tmp_path / "out").glob("curves.*"))
    printed = capfd.readouterr()
    assert "curves.png" not in printed.out
    assert "the curves skip 1 evaluations during training, which are by another classifier" in printed.err


def test_a_point_of_a_curve_is_the_number_of_passes_with_the_smallest_mean_distance():
    curves = [
        {8: {"1": {"frechet": 1.0}, "4": {"frechet": 2.0}}},
        {8: {"1": {"frechet": 9.0}, "4": {"frechet": 4.0}}},
    ]
    runs = [{"steps": 16, "TFLOP": 3.0, "curve": curve} for curve in curves]
    assert best_points(runs) == [(1.5, "4", [{"frechet": 2.0}, {"frechet": 4.0}])]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_an_interrupted_one_resumes(done, tmp_path, monkeypatch):
    out, before, trained, real = tmp_path / "out", report(done), [], compare_heads.train
    shutil.copytree(done.output_dir, out)
    monkeypatch.setattr(
        compare_heads, "train", lambda config, how: (trained.append(config.output_dir), real(config, how))
    )
    config = read(tmp_path, page="true", noise_scales="[1, 0.5]", **CURVE)
    compare_heads.main(config)
    assert not trained and report(config)["heads"] == before["heads"]
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") == 3  # heads.png, curves.png and samples.png
    assert page.count("data:image/webp") == len(HEADS) == page.count("<h2>Samples of ")
    config = read(tmp_path, noise_scales="[1, 0.5]", **CURVE)
    run = out / "rpgan+r1+r2-0"
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "result.json").unlink()
    compare_heads.main(config)
    assert trained == [str(run)]
    (was,), (now,) = before["heads"]["rpgan+r1+r2"], report(config)["heads"]["rpgan+r1+r2"]
    assert now["metrics"] == was["metrics"]
    assert now["TFLOP"] == was["TFLOP"]  # of steps 0 and 1; the checkpoint remembers the first


def test_a_folder_of_other_runs_is_refused(done, tmp_path):
    shutil.copytree(done.output_dir, tmp_path / "out")
    with pytest.raises(ValueError, match="another configuration"):
        compare_heads.main(read(tmp_path, global_batch_size=8))


def test_half_of_the_held_out_images_are_the_reference_and_the_captions_of_the_others_are_generated(tmp_path):
    config = read(tmp_path, eval_samples=1000)
    eval_set, test = compare_heads.make_eval_set(config), load_splits("digits")["test"]
    assert len(eval_set.evaluator.rows) == len(eval_set.evaluator.real) == 180 == len(test) / 2
    assert len(set(eval_set.evaluator.rows)) == 180
    others = [row for row in range(360) if row not in eval_set.evaluator.rows]
    _, held_out = load_images("digits", 8, 1)
    features = eval_set.evaluator.classifier.features(held_out.images(others))
    assert torch.equal(eval_set.evaluator.real, features)
    assert eval_set.captions == [test[row]["caption"] for row in eval_set.evaluator.rows]
    assert eval_set.evaluator.labels.tolist() == [test[row]["label"] for row in eval_set.evaluator.rows]
    assert eval_set.evaluator.labels[eval_set.shown].tolist() == [i // 2 for i in range(20)]


def test_the_class_of_an_image_is_the_first_class_named_in_its_caption():
    captions = ["a Cat face", "catfish", "family: man, man", "the man", "face with hat"]
    images: Any = cast(Any, SimpleNamespace(captions=captions))
    rows, labels = compare_heads.find_classes(images, ["man", "face", "cat", "family"], 4)
    assert rows == [0, 2, 3, 4]
    assert labels.tolist() == [2, 3, 0, 1]
    assert compare_heads.find_classes(images, ["man"], 1)[0] == [2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": "[]"}, "heads and classes"),
        ({"classes": "[eleven]"}, "0 images would be generated"),
        ({"eval_samples": 5}, "5 images would be generated"),
        ({"data.paths": "[digits, sprites]"}, "one source"),
        ({"passes": "[0]"}, "passes must be at least 1, not 0"),
        ({"passes": "[]"}, "passes must name at least one"),
        ({"noise_scales": "[]"}, "noise_scales must hold 1"),
        ({"noise_scales": "[1, 0.5, 0.5]"}, "each scale once"),
        ({"noise_scale": 0.5}, "give noise_scales, not noise_scale"),
        ({"heads.mse.noise_scale": 0.5}, "give noise_scales, not noise_scale"),
        ({"noise_scales": "[-1]"}, "noise_scales must be at least 0, not -1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"heads.mse.step": 3}, r"heads\.mse: step is unknown; did you mean steps"),
        ({"heads.mse.steps": 0}, "steps must be at least 1"),
        ({"heads.mse.image_head": "msr"}, "did you mean 'mse'"),
    ],
)
def test_a_configuration_without_anything_to_compare_is_refused_in_a_sentence(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        compare_heads.main(read(tmp_path, **changes))
    assert not (tmp_path / "out" / "heads.json").exists()


def test_a_dry_run_prints_a_configuration_that_is_read_back(tmp_path, capsys):
    compare_heads.main(read(tmp_path, dry_run="true"))
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load(compare_heads.CompareHeads, ["--config", str(tmp_path / "printed.yaml")]) == read(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["digits", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mnist", "mnist-49-patches"))],
)
def test_published_heads_train_with_equally_many_operations(tmp_path, name):
    blank = {"image": numpy.full((40, 28, 28), 99, "uint8"), "label": numpy.arange(40) % 10}
    numpy.savez(tmp_path / "mnist.npz", **blank)  # numbers of operations are those of any images
    path = "digits" if name == "digits" else tmp_path / "mnist.npz"
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.paths", f"[{path}]"]
    config, counted, estimated = load(compare_heads.CompareHeads, flags), {}, {}
    for head in config.heads:
        training = compare_heads.MeteredTraining(compare_heads.configure(config, head, 0), Accelerator())
        training.begin(0)
        grouped = name == "digits" and training.head.conditions  # captions of one or two lengths in a step
        for step in range(compare_heads.COUNTED if grouped else 1):
            training.step(step)
        counted[head] = training.extra_results()["TFLOP"]
        estimated[head] = training.flops / training.cost.counted * training.config.steps / 1e12
    assert max(counted.values()) < 1.02 * min(counted.values())
    # 6 for each weight and token, without padding; with a critic only its model's share is estimated
    assert counted["flow"] == pytest.approx(estimated["flow"], rel=0.12)


@pytest.mark.slow
def test_a_configuration_of_real_images_runs_on_a_file_with_their_columns(tmp_path):
    """A file of 900 rows with the columns of the images that the configuration is of."""
    columns = Features(image=Image(), label=ClassLabel(names=list("0123456789")))
    random, labels = numpy.random.default_rng(0), numpy.arange(900) // 2 % 10
    images = [PILImage.fromarray(random.integers(0, 255, (28, 28), "uint8")) for _ in labels]
    rows = Dataset.from_dict({"image": images, "label": labels}, features=columns)
    rows.to_parquet(tmp_path / "mnist.parquet")
    config = read(tmp_path, "mnist", **{"data.paths": f"[{tmp_path / 'mnist.parquet'}]"})
    compare_heads.main(config)
    assert set(report(config)["heads"]) == set(config.heads)


@pytest.mark.parametrize("name", ["digits", "mnist", "mnist-49-patches"])
def test_every_row_of_a_configuration_makes_a_run(name, tmp_path):
    config = read(tmp_path, name, **{"data.paths": "[digits]"})
    assert config.heads
    for head in config.heads:
        assert compare_heads.configure(config, head, 0).image_head == config.heads[head]["image_head"]


def test_a_configuration_without_data_says_which_key_must_be_given(tmp_path):
    (tmp_path / "open.yaml").write_text('data: {paths: "???"}')
    with pytest.raises(
        ValueError, match=r"open\.yaml leaves data\.paths open; give --data\.paths VALUE: emb"
    ):
        load(compare_heads.CompareHeads, ["--config", str(tmp_path / "open.yaml")])


def test_columns_are_those_of_the_first_template_that_generates_an_image_from_a_caption():
    find = compare_heads.find_columns
    assert find(["{image}{caption}", "a {label} {photo:generate}"]) == ("photo", "label")
    for templates in (["{image:generate}{caption}"], ["{caption}{image}"]):
        with pytest.raises(ValueError, match="must generate images from captions"):
            find(templates)


def test_a_table_holds_means_and_spreads_over_seeds():
    took = {"steps": 5, "TFLOP": 1.0, "CPU minutes": 2.0, "weights": 7}
    runs = [took | {"metrics": {"4": {"accuracy": share, "frechet": 1.5}}} for share in (0.5, 0.7)]
    assert write_table({"accuracy": 1.0, "frechet": 0.25}, {"flow": runs}).splitlines() == [
        "| head | passes | accuracy, % | frechet |",
        "| --- | ---: | ---: | ---: |",
        f"| {REAL} |  | 100.0 | 0.25 |",
        "| flow | 4 | 60.0 ± 14.1 | 1.50 ± 0.00 |",
        "",
        NOTE,
        "",
        "| training | steps | TFLOP | CPU minutes | weights |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| flow | 5 ± 0 | 1.00 ± 0.00 | 2.0 ± 0.0 | 7 ± 0 |",
    ]


def test_images_in_colours_come_with_the_captions_of_their_file(tmp_path):
    image = torch.randint(256, (20, 4, 4, 3)).byte().numpy()
    numpy.savez(tmp_path / "a.npz", image=image, caption=numpy.array([f"picture {i}" for i in range(20)]))
    test = load_splits(str(tmp_path / "a.npz"))["test"]
    assert test["caption"][:] == ["picture 9", "picture 19"]
    assert numpy.asarray(test[1]["image"]).tolist() == image[19].tolist()
    numpy.savez(tmp_path / "a.npz", image=image[:10], label=numpy.arange(10))
    assert load_splits(str(tmp_path / "a.npz"))["test"][0]["caption"] == "nine"
    numpy.savez(tmp_path / "a.npz", image=image, label=numpy.arange(10))
    with pytest.raises(ValueError, match="20 images with 10 captions"):
        load_splits(str(tmp_path / "a.npz"))
