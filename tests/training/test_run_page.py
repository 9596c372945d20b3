"""The page of a run: what it shows, in one file that loads nothing."""

import base64
import io
import json
import re
import sys

import pytest
from PIL import Image as PILImage

from rope_mm.training import run_page
from rope_mm.training.run_page import write_comparison_page, write_run_page

WEBP = re.compile(r"data:image/webp;base64,([^\"]+)")


def log(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sample(folder, name, colour, size=(60, 40)):
    (folder / "samples").mkdir(exist_ok=True)
    PILImage.new("RGB", size, colour).save(folder / "samples" / name)


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it: two evaluations, two series of images, texts, a result."""
    folder = tmp_path / "digits"
    folder.mkdir()
    losses = [{"step": step, "loss/critic": 1 / step, "loss/generator": 0.5} for step in (10, 20, 30)]
    log(folder, *losses, {"step": 30, "frechet": 4.0}, {"step": 30, "warning": "3 of 10 modes are lost"})
    for step, colour in ((10, "red"), (20, "lime"), (30, "blue")):
        sample(folder, f"step-{step:06d}.png", colour)
        sample(folder, f"step-{step:06d}-videos.png", "white")
    (folder / "samples" / "step-000020-image2text.txt").write_text("a | <b>\n")
    (folder / "run.yaml").write_text("rope:\n  scheme: <rope-tv>\n")
    (folder / "result.json").write_text('{"frechet": 4.0, "skipped_steps": 0}')
    return folder


def read(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def animations(folder):
    """Of every animation its frames, and how long each stays in milliseconds."""
    found = []
    for data in WEBP.findall(read(folder)):
        with PILImage.open(io.BytesIO(base64.b64decode(data))) as film:
            frames = []
            for number in range(film.n_frames):
                film.seek(number)
                frames.append(film.convert("RGB").copy())
            found.append(frames)
    return found


def test_the_samples_of_all_steps_are_the_frames_of_an_animation_in_their_order(run):
    write_run_page(run)
    images, videos = animations(run)
    assert [frame.getpixel((30, 40)) for frame in images] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert len(videos) == 3
    labels = [frame.crop((0, 0, 60, 18)).convert("L") for frame in images]
    assert all(label.getextrema()[0] < 100 for label in labels)  # "step 10" in black
    assert labels[0].tobytes() != labels[1].tobytes()
    assert "images, steps 10 to 30" in read(run) and "videos, steps 10 to 30" in read(run)


def test_the_page_has_result_warnings_curves_texts_configuration_and_command(run, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train/adversarial.py", "--data.label", ""])
    assert write_run_page(run) == ""
    page = read(run)
    assert "<td>frechet</td><td>4</td>" in page
    assert "step 30: 3 of 10 modes are lost" in page
    assert page.count("<svg") == 1
    assert "<td>a</td><td>&lt;b&gt;</td>" in page
    assert "scheme: &lt;rope-tv&gt;" in page
    assert "python3 train/adversarial.py --data.label &#x27;&#x27;" in page


def test_the_page_loads_nothing(run):
    write_run_page(run)
    page = read(run)
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert len(addresses) > 2
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "default-src 'none'" in page and "<script" not in page and "@import" not in page


def test_the_same_run_gives_the_same_page(run):
    write_run_page(run)
    before = read(run)
    write_run_page(run)
    assert read(run) == before


def test_samples_of_a_step_that_was_undone_by_a_kill_are_not_shown(run):
    log(run, {"step": 10, "loss/critic": 1.0}, {"step": 20, "loss/critic": 0.5})
    write_run_page(run)
    assert [len(frames) for frames in animations(run)] == [2, 2]


def test_a_run_without_samples_or_metrics_has_a_page_without_them(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    assert write_run_page(tmp_path) == ""
    headings = re.findall("<h2>(.*)</h2>", read(tmp_path))
    assert headings == ["Command", "Configuration"]


def test_without_matplotlib_the_page_has_all_but_curves_and_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = write_run_page(run)
    assert said == "no curves: matplotlib is not installed; run: pip install 'rope-mm[plots]'"
    assert "<svg" not in read(run) and "no curves: matplotlib is not installed" in read(run)
    assert len(animations(run)) == 2


def test_many_steps_become_few_frames_with_the_first_and_the_last(tmp_path):
    log(tmp_path, {"step": 300, "loss": 1.0})
    for step in range(1, 101):
        sample(tmp_path, f"step-{3 * step:06d}.png", (2 * step, 0, 0), size=(20, 20))
    write_run_page(tmp_path)
    (frames,) = animations(tmp_path)
    assert len(frames) == run_page.FRAMES
    reds = [frame.getpixel((10, 25))[0] for frame in frames]
    assert (reds[0], reds[-1]) == (2, 200) and reds == sorted(reds)


def test_sheets_of_several_sizes_share_one_frame(tmp_path):
    log(tmp_path, {"step": 2, "loss": 1.0})
    sample(tmp_path, "step-000001.png", "red", size=(30, 20))
    sample(tmp_path, "step-000002.png", "red", size=(50, 10))
    write_run_page(tmp_path)
    (frames,) = animations(tmp_path)
    assert {frame.size for frame in frames} == {(50, 20 + 18)}


def test_a_comparison_has_a_curve_for_each_run_and_links_to_their_pages(run, tmp_path):
    write_run_page(run)
    PILImage.new("RGB", (4, 4)).save(tmp_path / "losses.png")
    table = "| loss | frechet |\n| --- | --- |\n| `ns` | **4** |\n\nLower is better."
    write_comparison_page(tmp_path, table, ["losses.png"], {"seeds": 1}, {"ns, seed 0": run})
    page = read(tmp_path)
    assert "<td>ns</td><td>4</td>" in page and "<p>Lower is better.</p>" in page
    assert '<a href="digits/index.html">ns, seed 0</a>' in page
    assert page.count("data:image/png") == 1 and len(animations(tmp_path)) == 2
    assert "&quot;seeds&quot;: 1" in page


def test_a_panel_of_a_run_holds_one_group_and_one_of_a_comparison_one_metric():
    lines = [{"step": 1, "loss/a": 1.0, "loss/b": 2.0, "lr": 0.1, "warning": "no"}]
    curves = run_page.read_curves(lines)
    assert run_page.group_curves(curves) == {
        "loss": {"a": [(1, 1.0)], "b": [(1, 2.0)]},
        "lr": {"lr": [(1, 0.1)]},
    }
    assert run_page.compare_curves({"one": curves, "two": {"lr": [(1, 0.2)]}}) == {
        "loss/a": {"one": [(1, 1.0)]},
        "loss/b": {"one": [(1, 2.0)]},
        "lr": {"one": [(1, 0.1)], "two": [(1, 0.2)]},
    }
