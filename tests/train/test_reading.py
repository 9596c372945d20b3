"""What pretraining reads: rows that cannot be read, and the formats that `datasets` loads."""

import io
import json
import shutil
import tarfile

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from rope_mm.data import load_splits
from rope_mm.data.holdout import SHARE, row_numbers
from rope_mm.evaluation.contact_sheet import GAP, TILE

TEMPLATES = {
    "data.templates": "['{caption}{image:generate}', '{image}{caption}']",
    "global_batch_size": 6,
    "max_length": 48,
}


def png(shade, size=4):
    file = io.BytesIO()
    PILImage.new("L", (size, size), shade).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """Twenty captioned images, two of which are damaged; both are trained on."""
    rows = [{"image": {"bytes": png(9 * i), "path": None}, "caption": "abcd"[i % 4]} for i in range(20)]
    for row in (3, 7):
        rows[row]["image"] = {"bytes": b"not an image", "path": None}
    path = tmp_path_factory.mktemp("torn") / "torn.parquet"
    data = Dataset.from_list(rows, features=Features(image=Image(), caption=Value("string")))
    assert all(number >= SHARE for number in [row_numbers(data)[row] for row in (3, 7)])
    data.to_parquet(path)
    return {"data.paths": f"[{path}]"}


@pytest.mark.parametrize("head", ["flow", "adversarial"])
def test_a_row_that_cannot_be_read_is_named_skipped_and_counted(head, torn, pretrain, runs, tmp_path, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"image_head": head, "steps": 8, **TEMPLATES, **torn}  # 48 of 16 rows: three epochs
    result = pretrain.train(whole, **settings)
    named = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert result["skipped_documents"] == runs.lines(whole)[-2]["skipped_documents"] == 6
    (stored,) = pq.read_table(torn["data.paths"].strip("[]")).select(["image"]).columns
    bad = [row for row, image in enumerate(stored.to_pylist()) if image["bytes"] == b"not an image"]
    assert sorted(line.split(":")[1] for line in named) == sorted(
        f" row {row}, column 'image' cannot be read" for row in bad
    )
    pretrain.train(parts, **{**settings, "num_workers": 1})
    assert runs.same(parts, whole)  # nothing depends on who read it


def test_the_count_of_skipped_rows_continues_after_an_interruption(torn, pretrain, runs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.train(whole, **TEMPLATES, **torn, steps=6)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000006")
    pretrain.train(parts, **TEMPLATES, **torn, steps=6)
    assert runs.lines(parts) == runs.lines(whole)
    assert (parts / "result.json").read_text() == (whole / "result.json").read_text()


@pytest.mark.parametrize("head", ["flow", "adversarial"])
def test_a_micro_batch_without_readable_rows_changes_no_weight(head, torn, pretrain, tmp_path):
    settings = {"global_batch_size": 2, "gradient_accumulation_steps": 2, "steps": 8, "image_head": head}
    result = pretrain.train(tmp_path / "run", **{**TEMPLATES, **torn, **settings})
    assert result["skipped_documents"] == 2


def test_strict_data_stops_at_a_row_that_cannot_be_read(torn, pretrain, refusal, tmp_path):
    settings = {"data.strict": "true", "steps": 8, **TEMPLATES, **torn}
    last = refusal(pretrain, tmp_path / "run", **settings)
    assert last.startswith("error: row ") and "column 'image' cannot be read: cannot identify" in last


def folder(path):
    for i in range(10):
        (path / f"{i}.png").write_bytes(png(20 * i))
    rows = [json.dumps({"file_name": f"{i}.png", "text": "abcd"[i % 4]}) for i in range(10)]
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path, "['{text}{image:generate}', '{image}{text}']"


def parquet(path):
    rows = [{"photo": {"bytes": png(20 * i), "path": None}, "text": "abcd"[i % 4]} for i in range(10)]
    rows = Dataset.from_list(rows, features=Features(photo=Image(), text=Value("string")))
    rows.to_parquet(path / "rows.parquet")
    return path / "rows.parquet", "['{text}{photo:generate}']"


def webdataset(path):
    with tarfile.open(path / "shard-000.tar", "w") as tar:
        for i in range(10):
            for ending, content in (("png", png(20 * i)), ("txt", b"abcd"[i % 4 :][:1])):
                member = tarfile.TarInfo(f"{i:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path / "shard-000.tar", "['{txt}{png:generate}']"


def classes(path):
    for i in range(10):
        (path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (path / "train" / "ab"[i % 2] / f"{i}.png").write_bytes(png(20 * i))
    return path, "['{label}{image:generate}', '{image}{label}']"


def jsonl(path):
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": "abcd"[i % 4]}) + "\n" for i in range(10)))
    return path / "rows.jsonl", "['so {text}']"


@pytest.mark.parametrize("source", [folder, parquet, webdataset, classes, jsonl])
def test_templates_name_the_columns_of_any_source_that_datasets_loads(source, pretrain, runs, tmp_path):
    (tmp_path / "source").mkdir()
    path, templates = source(tmp_path / "source")
    data = {"data.paths": f"[{path}]", "data.templates": templates}
    pretrain.train(tmp_path / "run", **data, steps=1, global_batch_size=4, max_length=48)
    assert ("loss/image" in runs.lines(tmp_path / "run")[0]) == ("generate" in templates)


def test_several_tar_files_are_read_as_one_source(tmp_path):
    shard, _ = webdataset(tmp_path)
    shard.with_name("shard-001.tar").write_bytes(shard.read_bytes())
    splits = load_splits(str(tmp_path / "shard-*.tar"))
    assert len(splits["train"]) + len(splits["test"]) == 20


@pytest.mark.parametrize("lengths", [(1, 2, 3), (1,)])
def test_videos_of_different_lengths_are_trained_on_and_sampled(lengths, pretrain, tmp_path):
    rows = [
        {"frames": [PILImage.new("L", (4, 4), 9 * i)] * lengths[i % len(lengths)], "caption": "abcd"[i % 4]}
        for i in range(40)
    ]
    features = Features(frames=List(Image()), caption=Value("string"))
    Dataset.from_list(rows, features=features).to_parquet(path := tmp_path / "videos.parquet")
    templates = "['{frames}{caption}{frames:generate}', '{frames:generate}{caption}']"
    data = {"data.paths": f"[{path}]", "data.templates": templates}
    pretrain.train(out := tmp_path / "run", steps=1, **data)
    shown = out / "samples" / "step-000001-videos.png"
    assert shown.exists() == (max(lengths) > 1)
    if shown.exists():
        with PILImage.open(shown) as sheet:
            wide, high = sheet.size
        assert wide > 2 * max(lengths) * TILE and high < 8 * (TILE + GAP)  # those of one frame are skipped


STREAM = {"data.streaming": "true", "eval_samples": 4, "data.shuffle": 5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three files of captioned images, one of which is damaged."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        rows = [{"image": {"bytes": png(10 * i), "path": None}, "caption": "abcd"[i % 4]} for i in range(8)]
        rows[5]["image"]["bytes"] = b"not an image" if shard == 1 else png(0)
        rows = Dataset.from_list(rows, features=Features(image=Image(), caption=Value("string")))
        rows.to_parquet(folder / f"{shard}.parquet")
    return {"data.paths": f"[{folder}/*.parquet]"}


@pytest.fixture(scope="module")
def streamed(shards, pretrain, tmp_path_factory):
    """An uninterrupted run on a stream: 48 of 20 rows, three epochs."""
    out = tmp_path_factory.mktemp("streamed") / "whole"
    pretrain.train(out, **TEMPLATES, **STREAM, **shards, steps=8)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_bit_exactly_and_reports_skipped_rows(
    workers, shards, streamed, pretrain, runs, tmp_path, capfd
):
    parts = tmp_path / "parts"
    shutil.copytree(streamed, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000008")
    shutil.rmtree(parts / "model")
    result = pretrain.train(parts, **TEMPLATES, **STREAM, **shards, steps=8, num_workers=workers)
    assert runs.same(parts, streamed)
    assert runs.lines(parts) == runs.lines(streamed)
    assert result["skipped_documents"] == 2
    for line in capfd.readouterr().err.splitlines():
        if line.startswith("skipped"):
            assert line.startswith("skipped: row 5 of shard 1, column 'image' cannot be read: ")


def test_a_stream_that_fails_ends_the_run_with_one_sentence(pretrain, refusal, tmp_path):
    shard, templates = webdataset(tmp_path)
    shard.with_name("shard-001.tar").write_bytes(shard.read_bytes()[:3000])
    data = {"data.paths": f"[{tmp_path}/shard-*.tar]", "data.templates": templates}
    for workers in (0, 1):
        settings = {**TEMPLATES, **STREAM, **data, "steps": 8, "num_workers": workers}
        last = refusal(pretrain, tmp_path / f"run-{workers}", **settings)
        assert last.startswith("error: row 1 of shard 1 cannot be read, nor what follows: ")


def test_the_rows_of_a_step_that_is_not_finite_are_named(shards, pretrain, tmp_path, monkeypatch):
    training = pretrain.module.Training
    step = training.step

    def poisoned(self, number):
        if number == 4:
            next(self.trainer.model.parameters()).data.fill_(float("nan"))
        return step(self, number)

    monkeypatch.setattr(training, "step", poisoned)
    for workers in (0, 1):
        settings = {**TEMPLATES, **STREAM, **shards, "steps": 8, "num_workers": workers}
        assert pretrain.run(tmp_path / str(workers), **settings) == 2
    kept = [torch.load(tmp_path / str(workers) / "nan-step-5.pt")["batches"][0] for workers in (0, 1)]
    assert kept[0]["rows"] == kept[1]["rows"]
    assert len({row for document in kept[0]["rows"] for row in document}) == 6  # all of one epoch
    assert torch.equal(kept[0]["input_ids"], kept[1]["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_samples": 0}, "eval_samples must be at least 1, not 0"),
        ({"data.shuffle": -1}, "data.shuffle must be at least 0, not -1"),
        ({"tokenizer": "words"}, "the words of a stream are not known before it is read"),
    ],
)
def test_invalid_settings_of_a_stream_are_refused_in_one_sentence(
    changes, message, shards, pretrain, refusal, tmp_path
):
    settings = {**TEMPLATES, **STREAM, **shards, **changes}
    assert message in refusal(pretrain, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "run.yaml").exists()
