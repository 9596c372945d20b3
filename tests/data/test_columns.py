"""Images and captions in the columns that users' files have."""

import io
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from rope_mm.data import (
    CaptionedImages,
    MapDocuments,
    ShuffledOrder,
    batch_indices,
    load_documents,
    load_images,
    make_generator,
)
from rope_mm.data.columns import choose_rows
from rope_mm.data.images import load_splits
from rope_mm.data.templates import find_tasks

GREYS = [20 * i for i in range(10)]


def png(grey, size=4):
    content = io.BytesIO()
    PILImage.new("L", (size, size), grey).save(content, "png")
    return content.getvalue()


def in_bytes(folder):
    table = pyarrow.table({"picture": [png(g) for g in GREYS], "caption": [f"grey {g}" for g in GREYS]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def in_structs(folder):
    held = [{"bytes": png(g), "path": None} for g in GREYS]
    table = pyarrow.table({"picture": held, "caption": [f"grey {g}" for g in GREYS]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def in_paths(folder, kind="jsonl"):
    (folder / "images").mkdir()
    rows = [{"picture": f"images/{g}.png", "caption": f"grey {g}"} for g in GREYS]
    for row, grey in zip(rows, GREYS, strict=True):
        (folder / row["picture"]).write_bytes(png(grey))
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = ["picture,caption", *(",".join(row.values()) for row in rows)]
        (folder / "rows.csv").write_text("\n".join(lines))
    return folder / f"rows.{kind}"


def in_paths_of_csv(folder):
    return in_paths(folder, "csv")


@pytest.mark.parametrize("write", [in_bytes, in_structs, in_paths, in_paths_of_csv])
def test_images_without_metadata_of_datasets_are_read(write, tmp_path):
    path = str(write(tmp_path))
    train, test = load_images(path, size=4, image="picture")
    assert len(train) + len(test) == 10
    for images in (train, test):
        found = ((images.images()[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert [f"grey {grey}" for grey in found] == images.captions
    shape = {"templates": ["{caption}{picture:generate}"], "size": 4, "channels": 1}
    for streaming in (False, True):
        if streaming and write in (in_paths, in_paths_of_csv):
            continue
        documents, _ = load_documents([path], streaming=streaming, held_out=2, **shape)
        caption, image = documents.document(documents.batch(0, 0, 1)[0], make_generator(0))
        assert caption == f"grey {((image.pixels[0, 0, 0] + 1) * 127.5).round().int()}"


def test_text_that_only_looks_like_a_path_stays_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"caption": f"{i}.png"}) for i in range(5)))
    rows = load_splits(str(tmp_path / "rows.jsonl"))["train"]
    assert set(rows["caption"]) <= {f"{i}.png" for i in range(5)}


def class_folders(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            (folder / name / f"{i}.png").write_bytes(png(100 if name == "cat" else 200))
    return folder


def test_names_of_class_folders_serve_as_captions(tmp_path):
    train, _ = load_images(str(class_folders(tmp_path / "data")), size=4, caption="label", label="label")
    values = train.images()[:, 0, 0, 0]
    assert train.captions == ["cat" if value < 0 else "dog" for value in values]
    assert set(train.captions) == {"cat", "dog"}


# `datasets` leaves a metadata.csv to the garbage collector to close
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", ""])
def test_captions_that_a_table_reads_as_missing_are_text(word, tmp_path):
    rows = ["file_name,caption", *(f"{i}.png,{word if i % 2 else f'grey {i}'}" for i in range(10))]
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    train, test = load_images(str(tmp_path), size=4)
    assert Counter(train.captions + test.captions) == Counter(
        [word] * 5 + [f"grey {i}" for i in range(0, 10, 2)]
    )
    for images in (train, test):
        found = ((images.images()[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert images.captions == [word if grey % 2 else f"grey {grey}" for grey in found]
    documents, _ = load_documents([str(tmp_path)], templates=["{caption}"], size=4, channels=1)
    assert set(documents.texts()) >= set(train.captions)


def several():
    rows = {
        "image": [{"bytes": png(g), "path": None} for g in GREYS],
        "caption": [[f"grey {g}", f"{g} of 255", f"number {g}"] for g in GREYS],
    }
    return Dataset.from_dict(rows, features=Features(image=Image(), caption=List(Value("string"))))


def test_of_several_captions_one_is_chosen_at_random():
    images = CaptionedImages(several(), 4, 1)
    assert images.captions[3] == "grey 60"
    drawn = Counter(
        caption for step in range(300) for caption in images.draw_captions([3], make_generator("c", step))
    )
    assert set(drawn) == {"grey 60", "60 of 255", "number 60"}
    assert min(drawn.values()) > 60
    again = images.draw_captions(range(10), make_generator("c", 1))
    assert again == images.draw_captions(range(10), make_generator("c", 1))


def test_of_several_captions_a_document_has_one_at_random_and_a_prompt_the_first():
    documents = MapDocuments([several()], ["{caption}{image:generate}"], 4, 1)
    drawn = {documents.document([3], make_generator(i))[0] for i in range(60)}
    assert drawn == {"grey 60", "60 of 255", "number 60"}
    ((before, _), *_) = documents.eval_prompts(_task(documents), 10)
    assert before == ["grey 0"]
    assert len(list(documents.texts())) == 30


def _task(documents):
    return find_tasks(documents.templates, documents.kinds)["text2image"]


@pytest.mark.parametrize("lacking", [[], None, [None]])
def test_a_row_without_a_caption_is_skipped_and_named_by_its_row_in_the_source(lacking):
    rows = several().to_list()
    rows[2]["caption"] = lacking
    held = Dataset.from_list(rows, features=several().features).select([4, 2, 0])
    images = CaptionedImages(held, 4, 1)
    assert images.unreadable == {1: f"row 2, column 'caption': a caption is text, not {lacking!r}"}
    assert images.read([0, 1, 2])[1].tolist() == [0, 2, 2]
    assert images.examples(3) == ["grey 80", "grey 0"]
    with pytest.raises(ValueError, match="row 2, column 'caption'"):
        images.images([1])


def test_the_background_reaches_images_and_documents():
    clear = io.BytesIO()
    PILImage.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear, "png")
    held = {"image": [{"bytes": clear.getvalue(), "path": None}]}
    rows = Dataset.from_dict(held, features=Features(image=Image()))
    assert CaptionedImages(rows, 4, 3, caption="", background="black").images().unique().tolist() == [-1]
    assert CaptionedImages(rows, 4, 3, caption="").images().unique().tolist() == [1]
    documents = MapDocuments([rows], ["{image}"], 4, 3, background="black")
    assert documents.document([0], make_generator(0))[0].pixels.unique().tolist() == [-1]


def test_the_rows_of_an_epoch_are_shuffled_once(monkeypatch):
    made, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: made.append(args) or real(*args, **more))
    order = ShuffledOrder(10)
    batches = [order.batch(0, step, 3) for step in range(10)]
    assert len(made) == 3  # 30 indices are three epochs
    for step, batch in enumerate(batches):
        assert torch.equal(batch, batch_indices(10, 3, 0, step))
    assert torch.equal(order.batch(1, 0, 3), batch_indices(10, 3, 1, 0))
    with pytest.raises(ValueError, match="an order needs 1 row or more"):
        ShuffledOrder(0)


@given(st.integers(1, 200), st.integers(0, 400))
def test_chosen_rows_are_different_ones_in_order_and_all_where_there_are_no_more(rows, most):
    chosen = choose_rows(rows, most)
    assert chosen == choose_rows(rows, most) == sorted(set(chosen))
    assert len(chosen) == min(rows, most) and set(chosen) <= set(range(rows))


def test_half_of_rows_in_turns_are_of_all_classes_as_are_those_of_sorted_rows():
    for of_row in (lambda row: row % 10, lambda row: row // 36):
        counts = [sum(of_row(row) == label for row in choose_rows(360, 180)) for label in range(10)]
        assert min(counts) > 8 and max(counts) < 28
