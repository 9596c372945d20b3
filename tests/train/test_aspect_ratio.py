"""Both scripts on photos of several shapes: trained, stopped, resumed, extended, and generated from."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image as PILImage
from PIL import ImageDraw

from rope_mm.evaluation.contact_sheet import GAP, HEAD
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
        rows = json.loads((tmp_path / "run" / "data.json").read_text())["held_out"]["rows"]
        assert rows > 1 and sheet.height == HEAD + rows * (10 * 5 + GAP)  # the longest side has 10 pixels
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
    settings = {"prompts": tmp_path / "captions.txt", "num_images": 3, "output": tmp_path / "grid.png"}
    assert generate.run(capsys, model=model, grid="true", **settings) == [str(tmp_path / "grid.png")]
    with PILImage.open(tmp_path / "grid.png") as grid:
        assert grid.height == HEAD + 2 * (8 * 6 + GAP) and grid.width > 3 * 8 * 6


class Sheet:
    """The sheet of data of a run: the colour of a photo at a place in it."""

    def __init__(self, run, splits):
        self.image = PILImage.open(run / "data.png").convert("RGB")
        self.rows = [
            (caption, size)
            for split in splits
            for caption, size in zip(split.captions, split.sizes, strict=True)
            if caption != "photo 7"  # is broken
        ]

    def colour(self, photo, y, x):
        """Red, green and blue at (y, x), shares of the photo's height and width."""
        (row,) = [row for row, (caption, _) in enumerate(self.rows) if caption == f"photo {photo}"]
        height, width = self.rows[row][1]
        left, top = self.image.width - 10 * 5 - GAP, HEAD + row * (10 * 5 + GAP)
        return self.image.getpixel((left + int(x * width) * 5 + 2, top + int(y * height) * 5 + 2))


def test_photos_of_all_kinds_are_shown_trained_stopped_resumed_extended_and_generated_by_commands(
    adversarial, photos, generate, runs, capsys, tmp_path, monkeypatch
):
    folder, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    command = KEEP | {"data.path": folder, "data.caption": "text", "sample_every": 3}
    step = adversarial.module.Training.step

    def press_ctrl_c(training, number):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return step(training, number)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial.module.Training, "step", press_ctrl_c)
        assert adversarial.run(run, **command) == 130
    said = capsys.readouterr()
    assert f"training: 6 steps in {run}" in said.out and f"rows as they are read: {run}/data.png" in said.out
    assert (
        said.err.count("skipped: ") == said.err.count("skipped: row 7, column 'image': the image does") == 1
    )
    assert "stopped by SIGINT at step 2, saved; the same command resumes" in said.err
    sheet = Sheet(run, adversarial.module.load_data(adversarial.config(run, **command).data, 2))
    assert len(sheet.rows) == 14 and sheet.image.height == HEAD + 14 * (10 * 5 + GAP)
    navy, gold = (0, 0, 128), (255, 215, 0)
    for photo, places in {
        0: [(0.5, 0.25, gold), (0.5, 0.9, navy)],  # wide
        1: [(0.25, 0.5, gold), (0.9, 0.5, navy)],  # tall
        3: [(0.5, 0.25, gold), (0.5, 0.9, navy)],  # CMYK
        4: [(0.5, 0.5, (156,) * 3), (0.1, 0.1, (156,) * 3)],  # 16 bits of grey
        5: [(0.34, 0.67, gold), (0.34, 0.2, navy)],  # turned by EXIF: the disc comes to the right
    }.items():
        for y, x, colour in places:
            assert sheet.colour(photo, y, x) == pytest.approx(colour, abs=40), (photo, y, x)
    capsys.readouterr()
    assert adversarial.run(run, **command) == 0
    said = capsys.readouterr()
    assert f"resuming: step 2 of 6 in {run}" in said.out and "skipped: " not in said.err
    assert adversarial.run(run, **command, steps=8) == 2
    assert "add --extend to train to step 8" in capsys.readouterr().err
    assert adversarial.run(run, **command, steps=8, extend="true") == 0
    assert [line["step"] for line in runs.lines(run) if "loss/critic" in line] == [*range(1, 9)]
    for size in ("8x8", "4x10", "20x6"):
        settings = {"prompt": "photo 1", "size": size, "zoom": 1, "output": tmp_path / f"{size}.png"}
        (file,) = generate.run(capsys, model=run / "model", **settings)
        with PILImage.open(file) as image:
            assert f"{image.height}x{image.width}" == size


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
