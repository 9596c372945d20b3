"""What train/generate.py writes, and what it refuses."""

import json
import shutil
import sys

import generate
import pytest
from PIL import Image as PILImage

from rope_mm.training.config import run


@pytest.fixture(scope="module")
def model(pretrain, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    pretrain.train(output_dir, steps=1)
    return output_dir / "model"


@pytest.fixture
def video(tmp_path):
    frames = [PILImage.new("L", (4, 4), 80 * i) for i in range(3)]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    return str(tmp_path / "video.gif")


@pytest.fixture
def refuse(capsys):
    """A function: flags -> the one sentence that refuses them."""

    def call(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit, match=r"^2$"):
            run(generate.main, generate.Generate, [str(flag) for flag in flags])
        (said,) = capsys.readouterr().err.splitlines()
        return said

    return call


def test_a_video_file_is_continued_into_another_one(model, video, tmp_path):
    av = pytest.importorskip("av", reason="needs the extra video")

    def frames(path):
        with av.open(str(path)) as file:
            return [frame.to_image() for frame in file.decode(video=0)]

    for source, output, zoom in ((video, "one.mp4", 4), (tmp_path / "one.mp4", "two.mp4", 8)):
        flags = ["--model", model, "--continue_video", source, "--output", tmp_path / output, "--frames", 2]
        run(generate.main, generate.Generate, [str(flag) for flag in [*flags, "--zoom", zoom]])
    assert [frame.size for frame in frames(tmp_path / "one.mp4")] == [(16, 16)] * 5
    assert [frame.size for frame in frames(tmp_path / "two.mp4")] == [(32, 32)] * 7


def test_images_follow_the_seed_and_the_number_of_steps_and_videos_are_written_as_their_file_is_named(
    pretrain, video, tmp_path
):
    pretrain.train(tmp_path / "run", steps=1, image_head="flow")

    def made(name, *flags):
        flags = ["--model", tmp_path / "run" / "model", "--output", tmp_path / name, "--zoom", 1, *flags]
        run(generate.main, generate.Generate, [str(flag) for flag in flags])
        with PILImage.open(tmp_path / name) as image:
            return image.tobytes(), (image.format, getattr(image, "n_frames", 1), image.size)

    first = made("first.png", "--prompt", "a")
    assert first[1] == ("PNG", 1, (4, 4)) and made("again.png", "--prompt", "a") == first
    assert made("seed.png", "--prompt", "a", "--seed", 1)[0] != first[0]
    assert made("steps.png", "--prompt", "a", "--num_inference_steps", 2)[0] != first[0]
    for name, kind in {"a.webp": "WEBP", "a.gif": "GIF", "a.png": "PNG"}.items():
        assert made(name, "--continue_video", video, "--frames", 2)[1] == (kind, 5, (4, 4))


def test_guidance_is_refused_where_no_image_was_learned_without_text(model, refuse, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    spec = json.loads((folder / "generation_spec.json").read_text())
    (folder / "generation_spec.json").write_text(
        json.dumps(spec | {"templates": ["{caption}{image:generate}"]})
    )
    flags = ["--model", folder, "--prompt", "a", "--output", tmp_path / "a.png", "--guidance_scale"]
    assert "guidance_scale 2.0 needs a template that generates an image with no text" in refuse(*flags, 2)
    run(generate.main, generate.Generate, [str(flag) for flag in [*flags, 1]])


def test_an_mp4_file_without_its_extra_says_what_to_install(model, refuse, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    output = tmp_path / "a.mp4"
    assert "pip install 'rope-mm[video]'" in refuse("--model", model, "--prompt", "a", "--output", output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --prompt TEXT, --prompts FILE, --describe FILE and --continue_video FILE"),
        (["--describe", "VIDEO", "--prompt", "a"], "--describe generates a text"),
        (["--continue_video", "VIDEO", "--frames", 0], "frames must be at least 1, not 0"),
        (["--continue_video", "VIDEO", "--context_frames", -1], "context_frames must be at least 0, not -1"),
        (["--continue_video", "VIDEO", "--output", "o.jpg"], "--output o.jpg names no format of a video"),
        (["--prompt", "a", "--output", "o"], "--output o names no format of an image"),
        (["--prompt", "a", "--grid", "--output", "o.jpg"], "--grid writes images of texts to a PNG file"),
        (["--prompt", "a", "--guidance_scale", -1], "guidance_scale must be at least 0, not -1"),
        (
            ["--prompt", "a", "--output", "o.mp4"],
            "--output o.mp4 is a video, and the model generates an image",
        ),
        (["--prompt", "a", "--prompt", "b"], "--prompt is given twice"),
        (["--draw", "a"], "--draw: draw is now called prompt"),
        (["--continue_video", "VIDEO", "--context_frames", 9], "context_frames 9 is more than the 3 frames"),
        (["--describe", "videos:-1"], "videos:-1 cannot be read as an image: its rows are 0 to"),
        (["--describe", "videos:9999"], "videos:9999 cannot be read as an image: its rows are 0 to"),
    ],
)
def test_flags_without_a_task_are_refused_and_nothing_is_written(
    flags, message, model, video, refuse, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [video if flag == "VIDEO" else flag for flag in flags]
    assert message in refuse("--model", model, *given)
    assert [path.name for path in tmp_path.iterdir()] == ["video.gif"]


@pytest.mark.parametrize("name", ["model.safetensors", "generation_spec.json", "config.json"])
def test_a_truncated_model_file_is_reported(name, model, refuse, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[:-20])
    said = refuse("--model", tmp_path / "model", "--prompt", "a")
    assert f"{tmp_path / 'model'} holds no whole model (" in said
    assert said.endswith("; the command that trained it writes it again")
