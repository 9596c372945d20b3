"""train/evaluate.py: metrics of generated images against real ones, in the features of a network."""

import json

import evaluate
import numpy
import pytest
import torch
from PIL import Image as PILImage
from torch import nn

from rope_mm.data import load_splits
from rope_mm.evaluation.features import INPUTS, extract_features, load_network
from rope_mm.evaluation.metrics import frechet, kid, prdc
from rope_mm.training.config import load, run


class Quarters(nn.Module):
    """The mean of each quarter of an image, channel by channel: 12 features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images.float(), 4).flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path, batch = tmp_path_factory.mktemp("network") / "quarters.pt2", torch.export.Dim("batch", min=1)
    images = torch.zeros(2, 3, 8, 8)
    torch.export.save(torch.export.export(Quarters(), (images,), dynamic_shapes=({0: batch},)), path)
    return path


def write_images(folder, count, seed):
    folder.mkdir()
    pixels = numpy.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=numpy.uint8)
    for number, image in enumerate(pixels):
        PILImage.fromarray(image).save(folder / f"{number:03}.png")
    return torch.from_numpy(pixels).double().permute(0, 3, 1, 2)


def flags(**given):
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def printed(capsys):
    """The metrics that were printed, after whatever else was."""
    return json.loads("{" + capsys.readouterr().out.rpartition("{")[2])


def test_two_folders_are_compared_by_the_features_of_the_network(network, tmp_path, capsys):
    real, fake = write_images(tmp_path / "real", 40, 0), write_images(tmp_path / "fake", 30, 1)
    settings = {"features": network, "size": 8, "output": tmp_path / "metrics.json"}
    given = flags(real=tmp_path / "real", generated=tmp_path / "fake", **settings)
    evaluate.main(load(evaluate.Evaluate, given))
    ours = json.loads((tmp_path / "metrics.json").read_text())
    a, b = (
        images.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)).flatten(1) for images in (real, fake)
    )
    assert ours["real"] == 40 and ours["generated"] == 30 and ours["features"] == 12
    a, b = a / 255, b / 255
    assert ours["frechet"] == pytest.approx(frechet(b, a), rel=1e-5)
    assert ours["kid"] == pytest.approx(kid(b, a), rel=1e-4)
    assert {name: ours[name] for name in prdc(a, b)} == pytest.approx(prdc(a, b))
    assert "Fréchet distance is too large" not in capsys.readouterr().err
    evaluate.main(load(evaluate.Evaluate, [*given, "--num_images", "12"]))
    assert "12 images for 12 features: the Fréchet distance is too large" in capsys.readouterr().err


def test_the_images_of_a_model_are_compared_with_the_real_ones_of_their_captions(
    network, adversarial, tmp_path, capsys
):
    adversarial.train(tmp_path / "run", steps=1)
    given = flags(
        real="digits", split="test", model=tmp_path / "run" / "model", caption="caption", num_images=20
    )
    evaluate.main(load(evaluate.Evaluate, [*given, *flags(features=network, size=8)]))
    found = printed(capsys)
    assert found["real"] == found["generated"] == 20 and found["frechet"] > 0


def test_pixels_say_how_many_images_copy_known_ones_and_need_no_network(tmp_path, capsys):
    known = load_splits("digits")["train"].select(range(60))["image"]
    pixels = numpy.stack([numpy.asarray(image) for image in known])
    numpy.savez(tmp_path / "known.npz", image=pixels, caption=["a digit"] * 60)
    files = {"generated": tmp_path / "known.npz", "known": "train"}
    evaluate.main(load(evaluate.Evaluate, flags(real="digits", split="test", num_images=50, **files)))
    found = printed(capsys)
    assert found["copied_share"] == 1
    assert 0.3 < found["copied_share_of_real"] < 0.9 and "frechet" not in found
    assert found["features"] == 3 * 8 * 8


def test_a_model_s_images_are_looked_for_among_the_real_ones_of_fifty_captions(
    adversarial, tmp_path, monkeypatch, capsys
):
    texts = [f"number {row}" for row in range(60)]
    pixels = numpy.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=numpy.uint8)
    numpy.savez(tmp_path / "data.npz", image=pixels, caption=texts)
    adversarial.train(tmp_path / "run", steps=1)
    right = {
        text: torch.from_numpy(image)[None] / 127.5 - 1 for text, image in zip(texts, pixels, strict=True)
    }
    given = flags(real=tmp_path / "data.npz", model=tmp_path / "run" / "model", caption="caption")
    evaluate.main(load(evaluate.Evaluate, given))
    assert printed(capsys)["caption_retrieval"] < 0.2
    monkeypatch.setattr(
        evaluate, "generate", lambda config, pipeline, captions: (right[text] for text in captions)
    )
    evaluate.main(load(evaluate.Evaluate, given))
    assert printed(capsys)["caption_retrieval"] == 1


def test_no_retrieval_is_given_where_captions_repeat(adversarial, tmp_path, capsys):
    adversarial.train(tmp_path / "run", steps=1)
    model = tmp_path / "run" / "model"
    given = flags(real="digits", split="test", model=model, caption="caption", num_images=40)
    evaluate.main(load(evaluate.Evaluate, given))
    said = capsys.readouterr()
    assert '"features"' in said.out and "caption_retrieval" not in said.out
    assert "40 captions, 29 different: no caption_retrieval" in said.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --real SOURCE, and one of --generated SOURCE and --model FOLDER"),
        ({"real": "digits", "model": "m", "generated": "g"}, "give --real SOURCE, and one of"),
        ({"real": "digits", "generated": "digits"}, "give --features FILE"),
        ({"real": "digits", "generated": "digits", "features": "none.pt"}, "none.pt holds no network"),
        (
            {"real": "digits", "generated": "digits", "split": "dev"},
            "digits has no split 'dev'; it has train, test",
        ),
        ({"real": "digits", "generated": "digits", "image": "photo"}, "the data has no column 'photo'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(given, message, network, capsys):
    settings = (
        given
        if not given.get("generated") or "none" in message or "FILE" in message
        else (given | {"features": network})
    )
    with pytest.raises(SystemExit, match=r"^2$"):
        run(evaluate.main, evaluate.Evaluate, flags(**settings))
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_each_input_range_is_that_of_its_name():
    images = [torch.full((1, 4, 4), value) for value in (-1.0, 1.0)]
    ends = {
        name: extract_features(lambda batch: batch.flatten(1), images, 4, name)[:, 0].tolist()
        for name in INPUTS
    }
    assert ends["0..1"] == [0, 1] and ends["-1..1"] == [-1, 1] and ends["uint8"] == [0, 255]
    assert ends["imagenet"] == pytest.approx([-0.485 / 0.229, 0.515 / 0.229])


def test_a_network_that_gives_no_rows_of_features_is_refused():
    images = [torch.zeros(3, 4, 4)] * 2
    with pytest.raises(ValueError, match=r"the network must give features \(2, f\), not \(2, 3, 4, 4\)"):
        extract_features(lambda batch: batch, images, 4)
    with pytest.raises(ValueError, match="there are no images to take features of"):
        extract_features(lambda batch: batch, [], 4)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_file_gives_the_features_of_its_network(tmp_path):
    torch.jit.save(torch.jit.script(Quarters()), str(tmp_path / "quarters.pt"))
    images = list(torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    found = extract_features(load_network(tmp_path / "quarters.pt"), images, 8)
    torch.testing.assert_close(found, Quarters()((torch.stack(images) + 1) / 2).double())


def test_images_that_do_not_decode_are_skipped_and_named(network, tmp_path, capsys):
    for name in ("real", "fake"):
        write_images(tmp_path / name, 20, 0)
    (tmp_path / "real" / "003.png").write_bytes(b"no image")
    settings = {"features": network, "size": 8, "output": tmp_path / "metrics.json"}
    given = flags(real=tmp_path / "real", generated=tmp_path / "fake", **settings)
    evaluate.main(load(evaluate.Evaluate, given))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["real"], found["generated"]) == (19, 20)
    assert "skipped: row 3, column 'image': the image does not decode (" in capsys.readouterr().err
    for path in (tmp_path / "real").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image of 20 rows decodes; row 19, column 'image'"):
        evaluate.main(load(evaluate.Evaluate, given))


def test_no_generated_images_are_refused():
    config = evaluate.Evaluate(real="digits", generated="none", known="train")
    with pytest.raises(ValueError, match="there are no generated images to compare"):
        evaluate.choose_features(config, iter(()))


def test_where_all_real_images_are_compared_the_known_ones_among_them_are_no_copies(capsys):
    given = flags(real="digits", generated="digits", known="train", num_images=20)
    evaluate.main(load(evaluate.Evaluate, given))
    assert set(printed(capsys)) == {"real", "generated", "features", "copied_share"}


def test_with_labels_a_model_has_the_metrics_that_its_training_gives(adversarial, tmp_path, capsys):
    trained = adversarial.train(
        tmp_path / "run", steps=1, eval_samples=120, **{"data.label": "label", "data.size": 8}
    )
    given = {"real": "digits", "model": tmp_path / "run" / "model", "caption": "caption", "label": "label"}
    evaluate.main(load(evaluate.Evaluate, flags(**given, num_images=120)))
    found = printed(capsys)
    real = {name: value for name, value in trained.items() if name.startswith("real_")}
    assert real and {name: found[name] for name in real} == real  # of the same classifier
    of_generated = {name.removeprefix("real_") for name in real}
    assert {"accuracy", "frechet", "recall"} <= of_generated <= found.keys()
    assert found["samples"] == 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "label", "split": "test"}, "remove --split"),
        ({"label": "label", "evaluator": "letters", "caption": ""}, "give --caption"),
        ({"evaluator": "modes"}, "--evaluator modes needs --label"),
        (
            {"label": "label", "num_inference_steps": "2", "generated": "digits", "model": ""},
            "remove --generated",
        ),
        ({"num_inference_steps": "2", "generated": "digits", "model": "", "known": "train"}, "give --model"),
    ],
)
def test_what_cannot_be_evaluated_by_a_classifier_is_refused(given, message, capsys):
    settings = {"real": "digits", "model": "none", "caption": "caption"} | given
    with pytest.raises(SystemExit, match=r"^2$"):
        run(evaluate.main, evaluate.Evaluate, flags(**{key: text for key, text in settings.items() if text}))
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_a_model_that_cannot_generate_as_asked_is_refused(adversarial, pretrain, tmp_path, capsys):
    adversarial.train(tmp_path / "captioned", steps=1)
    pretrain.train(tmp_path / "videos", steps=1, **{"data.templates": '["{frames:generate}{caption}"]'})
    for model, given, message in [
        ("captioned", {"label": "label"}, "generates images from captions; give --caption COLUMN"),
        (
            "captioned",
            {"label": "label", "caption": "caption", "num_inference_steps": 2},
            "to generate in 1 step",
        ),
        ("captioned", {"known": "train"}, "generates images from captions; give --caption COLUMN"),
        ("videos", {"caption": "caption", "label": "label"}, "generates no images; its templates are"),
        ("videos", {"caption": "caption"}, "generates no images; its templates are"),
    ]:
        flags_of = flags(real="digits", model=tmp_path / model / "model", **given)
        capsys.readouterr()
        with pytest.raises(SystemExit, match=r"^2$"):
            run(evaluate.main, evaluate.Evaluate, flags_of)
        assert message in capsys.readouterr().err.splitlines()[-1]


# `datasets` leaves a metadata.csv to the garbage collector to close
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_image_that_the_classifier_cannot_read_is_named(adversarial, tmp_path, capsys):
    adversarial.train(tmp_path / "run", steps=1)
    write_images(tmp_path / "real", 80, 0)
    (tmp_path / "real" / "003.png").write_bytes(b"no image")
    rows = [f"{number:03}.png,{number % 4},zero" for number in range(80)]
    (tmp_path / "real" / "metadata.csv").write_text("\n".join(["file_name,label,caption", *rows]))
    given = {"real": tmp_path / "real", "model": tmp_path / "run" / "model", "num_images": 20}
    evaluate.main(load(evaluate.Evaluate, flags(**given, label="label", caption="caption")))
    assert "the image does not decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "label", "input": "imagenet"}, "remove --input"),
        ({"background": "black", "known": "train"}, "--background black needs --label"),
    ],
)
def test_settings_that_an_evaluation_does_not_read_are_refused(given, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(evaluate.main, evaluate.Evaluate, flags(real="digits", model="none", caption="caption", **given))
    assert message in capsys.readouterr().err.splitlines()[-1]
