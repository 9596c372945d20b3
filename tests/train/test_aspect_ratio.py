"""Both scripts on photos of several shapes: trained, stopped, resumed, extended, and generated from."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image as PILImage
from PIL import ImageDraw

from rope_mm.models.pipeline import RopeMMPipeline

KEEP = {"data.size": 8, "data.channels": 3, "data.aspect_ratio": "keep"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of captioned images: wide, tall and square ones, CMYK, 16-bit grey, and one turned by EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for number in range(15):
        size = [(64, 32), (32, 64), (48, 48)][number % 3]
        image = PILImage.new("RGB", size, "navy")
        ImageDraw.Draw(image).ellipse((8, 8, 24, 24), fill="gold")
        name, options = f"{number:02}.png", {}
        if number == 3:
            name, image = "03.jpg", image.convert("CMYK")
        if number == 4:
            image = PILImage.new("I;16", size, 40_000)
        if number == 5:
            name, exif = "05.jpg", PILImage.Exif()
            exif[0x0112] = 6
            options = {"exif": exif}
        image.save(folder / name, **options)
        rows.append({"file_name": name, "text": f"photo {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def generate():
    """The script that generates, as a command line runs it; the files that it names."""
    import generate

    from rope_mm.training.config import load

    def run(capsys, **flags):
        capsys.readouterr()
        generate.main(load(generate.Generate, [t for k, v in flags.items() for t in (f"--{k}", str(v))]))
        return capsys.readouterr().out.split()

    return SimpleNamespace(run=run)


def test_the_critic_sees_images_of_one_shape_a_step_and_all_shapes_in_a_run(
    adversarial, photos, runs, tmp_path, capsys, generate
):
    data = KEEP | {"data.path": photos, "data.caption": "text", "checkpoint_every": 3, "sample_every": 3}
    adversarial.train(tmp_path / "run", **data, steps=3)
    adversarial.train(tmp_path / "run", **data, extend="true")
    assert [line["step"] for line in runs.lines(tmp_path / "run") if "loss/critic" in line] == [*range(1, 7)]
    with PILImage.open(tmp_path / "run" / "samples" / "step-000006.png") as sheet:
        assert sheet.height == 3 * (10 * 5 + 4)  # of three held-out rows; the longest side has 10 pixels
    model = tmp_path / "run" / "model"
    pipeline = RopeMMPipeline.from_pretrained(model)
    shapes = [(8, 8), (4, 10), (24, 6)]
    assert [pipeline("photo 1", height=y, width=x).images[0].size for y, x in shapes] == [
        (x, y) for y, x in shapes
    ]
    (tmp_path / "captions.txt").write_text("photo 1\n\nphoto 2\n")
    files = generate.run(
        capsys, model=model, prompts=tmp_path / "captions.txt", size="4x10", zoom=1, output=tmp_path / "g.png"
    )
    for file in files:
        with PILImage.open(file) as image:
            assert image.size == (10, 4)
    assert len(files) == 2


def test_documents_of_images_of_several_shapes_are_packed_and_trained(pretrain, photos, runs, tmp_path):
    data = KEEP | {
        "data.paths": f"[{photos}]",
        "data.templates": "['{text}{image:generate}', '{image}{text}']",
    }
    data |= {"max_length": 96, "data.strict": "true", "sample_every": 4}
    pretrain.train(tmp_path / "run", **data)
    assert all(line["loss/image"] > 0 for line in runs.lines(tmp_path / "run") if "loss/image" in line)
    assert (tmp_path / "run" / "samples" / "step-000004.png").stat().st_size > 1000
    assert (tmp_path / "run" / "samples" / "step-000004-image2text.txt").read_text().count("photo") >= 3


def test_flipped_images_reach_the_critic_mirrored(adversarial, tmp_path):
    config = adversarial.config(tmp_path / "run", **{"data.flip": "true", "global_batch_size": 64})
    plain = adversarial.config(tmp_path / "run", **{"global_batch_size": 64})
    accelerator = Accelerator()
    flipped, straight = (adversarial.module.Training(c, accelerator) for c in (config, plain))
    ours, theirs = (t.batcher.to_images(t.micro_batch(0).real) for t in (flipped, straight))
    mirrored = (ours == theirs.flip(-1)).flatten(1).all(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(ours[~mirrored], theirs[~mirrored])


def test_metrics_by_labels_need_images_of_one_size(adversarial, refusal, photos, tmp_path):
    found = refusal(adversarial, tmp_path / "run", **KEEP | {"data.path": photos, "data.label": "label"})
    assert "data.label compare images of one size" in found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompt": "a", "size": "24"}, "--size is height x width in pixels, such as 24x40, not '24'"),
        ({"prompt": "a", "prompts": "b.txt"}, "--prompts generates images of the texts in a file"),
        ({"prompts": "missing.txt", "model": "."}, "holds no generation_spec.json"),
    ],
)
def test_what_makes_no_task_of_generation_is_refused(generate, capsys, flags, message):
    with pytest.raises(ValueError, match=message):
        generate.run(capsys, **flags)
