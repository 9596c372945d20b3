import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image as Picture

from rope_mm.training.config import run

sys.path.insert(0, str(Path(__file__).parent))
import evaluate
from test_pretrain import train


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(data, out, steps=1)
    return out / "model"


@pytest.fixture
def clip(tmp_path):
    frames = [Picture.new("L", (4, 4), 80 * i) for i in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    return str(tmp_path / "clip.gif")


@pytest.fixture
def refusal(capsys):
    """What is said in one line to a question that is refused."""

    def ask(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(evaluate.main, evaluate.Evaluate, [str(word) for word in words])
        assert stopped.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        return said

    return ask


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "ask something"),
        (["--draw", "a", "--extend", "CLIP"], "--draw and --extend would both write --to"),
        (["--extend", "CLIP", "--frames", 0], "frames must be at least 1, not 0"),
        (["--extend", "CLIP", "--frames", -2], "frames must be at least 1, not -2"),
        (["--extend", "CLIP", "--given", -1], "given must be at least 0, not -1"),
        (["--extend", "CLIP", "--to", "o.jpg"], "--to o.jpg names no format of a clip"),
        (["--draw", "a", "--to", "o"], "--to o names no format of a picture"),
        (["--extend", "CLIP", "--given", 9], "given 9 is more than the 3 frames of"),
        (["--caption", "videos:-1"], "videos:-1 cannot be read as a picture: its rows are 0 to"),
        (["--caption", "videos:9999"], "videos:9999 cannot be read as a picture: its rows are 0 to"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_and_writes_nothing(
    words, message, model, clip, refusal, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    asked = [clip if word == "CLIP" else word for word in words]
    assert message in refusal("--model", model, *asked)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


@pytest.mark.parametrize("name", ["model.safetensors", "generation_spec.json", "config.json"])
def test_a_model_cut_short_is_said_to_be(name, model, refusal, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[:-20])
    said = refusal("--model", tmp_path / "model", "--draw", "a")
    assert f"{tmp_path / 'model'} holds no whole model (" in said
    assert said.endswith("; the command that trained it writes it again")
