import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from rope_mm.data import (
    DIGIT_NAMES,
    PHRASES,
    CaptionedImages,
    batch_indices,
    captioned_digits,
    load_images,
    make_generator,
)
from rope_mm.data.columns import stored_row
from rope_mm.data.holdout import split_rows
from rope_mm.data.images import select_rows


def squares(folder: Path, count: int = 10, side: int = 12) -> Path:
    """An imagefolder of grey squares with captions."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        PILImage.new("RGB", (side, side + 4), (25 * i,) * 3).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "caption": f"grey {i}", "grey": i}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_captions_of_the_embedded_digits_name_what_they_show():
    digits = captioned_digits()
    assert (len(digits["train"]), len(digits["test"])) == (1437, 360)
    for part in digits.values():
        assert all(
            DIGIT_NAMES[label] in caption
            for label, caption in zip(part["label"], part["caption"], strict=True)
        )
    assert digits["train"][0]["image"].size == (8, 8)
    captions = {phrase.format(name) for phrase in PHRASES for name in DIGIT_NAMES}
    assert set(digits["train"]["caption"]) == captions


def test_held_out_digits_are_none_of_the_training_ones():
    train, test = load_images("digits", label="label")
    shares = (part.labels.bincount() / len(part) for part in (train, test))
    torch.testing.assert_close(*shares, atol=0.01, rtol=0)
    rows = {tuple(image.flatten().tolist()) for image in train.images()}
    assert sum(tuple(image.flatten().tolist()) in rows for image in test.images()) < 3


def test_images_are_scaled_to_minus_one_and_one():
    train, _ = load_images("digits")
    images = train.images([0, 5, 7])
    assert images.shape == (3, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)


def test_an_imagefolder_with_captions_is_cropped_resized_and_split(tmp_path):
    train, test = load_images(str(squares(tmp_path / "squares")), size=8, channels=3, label="grey")
    assert (len(train), len(test)) == (7, 3)
    assert train.images([0]).shape == (1, 3, 8, 8)
    for row, caption in enumerate(train.captions):
        grey = int(caption.removeprefix("grey "))
        assert train.labels[row] == grey
        torch.testing.assert_close(train.images([row]), torch.full((1, 3, 8, 8), 25 * grey / 127.5 - 1))


def test_a_parquet_file_is_read_as_captioned_images(tmp_path):
    column = [PILImage.new("L", (8, 8), 10 * i) for i in range(10)]
    features = Features(picture=ImageColumn(), words=Value("string"))
    rows = Dataset.from_dict(
        {"picture": column, "words": [f"grey {i}" for i in range(10)]}, features=features
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    train, test = load_images(str(tmp_path / "rows.parquet"), image="picture", caption="words")
    assert len(train) + len(test) == 10
    assert train.images().shape == (8, 1, 8, 8)


def test_a_missing_column_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'title'; it has image, caption, label$"):
        load_images("digits", caption="title")


def test_a_folder_of_images_without_captions_is_refused_with_where_they_stand(tmp_path):
    for number in range(5):
        PILImage.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"no column 'text'; it has image; captions are in its metadata.csv"):
        load_images(str(tmp_path), caption="text")


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:50], lambda whole: b"no picture"], ids=["cut", "text"]
)
def test_an_image_that_does_not_decode_is_named_by_its_file_and_its_row_in_the_source(damage, tmp_path):
    folder = squares(tmp_path / "squares", count=5)
    for path in folder.glob("*.png"):
        path.write_bytes(damage(path.read_bytes()))
    train, _ = load_images(str(folder))
    with pytest.raises(
        ValueError, match=r"row (\d), column 'image': the image does not decode \(.*/\1\.png\)"
    ) as error:
        train.images([2])
    assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_that_cannot_be_read_gives_way_to_the_next_one(cached, tmp_path):
    folder = squares(tmp_path / "squares", count=10)
    broken = sorted(folder.glob("*.png"))[:3]
    for path in broken:
        path.write_bytes(b"no picture")
    train, test = load_images(str(folder), cache_in_memory=cached)
    read = [images.read(range(len(images))) for images in (train, test)]
    assert len(train.unreadable) + len(test.unreadable) == 3
    for images, (pixels, rows) in zip((train, test), read, strict=True):
        assert not set(rows.tolist()) & set(images.unreadable)
        assert torch.equal(pixels, images.images(rows))
        kept = [row for row in range(len(images)) if row not in images.unreadable]
        assert rows[kept].tolist() == kept
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    train, _ = load_images(str(folder))
    with pytest.raises(ValueError, match=r"no image of \(8, 8\) pixels can be read: row "):
        train.read([0])


def test_rows_that_are_not_captioned_images_are_refused():
    rows = Dataset.from_dict({"image": [1, 2], "caption": ["one", None], "label": [0, -1]})
    with pytest.raises(ValueError, match="row 0, column 'label': a caption is text, not 0"):
        CaptionedImages(rows, 8, 1, caption="label")
    with pytest.raises(ValueError, match="row 1, column 'label': a label is a whole number from 0, not -1"):
        CaptionedImages(rows, 8, 1, caption="", label="label")
    with pytest.raises(ValueError, match="column 'image' holds"):
        CaptionedImages(rows.select([0]), 8, 1)
    with pytest.raises(ValueError, match="the data has no rows"):
        CaptionedImages(rows.select([]), 8, 1)


def test_rows_that_were_chosen_keep_their_numbers_in_the_source_wherever_they_stand():
    rows = Dataset.from_dict({"text": ["a", "a", "b", "b", "b"], "label": [0, 1, -1, 3, 4]})
    chosen = select_rows(DatasetDict({"train": rows}), {"text": ["b"]})["train"]
    assert [stored_row(chosen, row) for row in range(len(chosen))] == [2, 3, 4]
    again = select_rows(DatasetDict({"train": chosen}), {"label": [3, 4]})["train"]
    assert [stored_row(again, row) for row in range(2)] == [3, 4]
    for found in split_rows(rows.select_columns("label")).values():
        assert [stored_row(found, row) for row in range(len(found))] == [
            rows["label"].index(label) for label in found["label"]
        ]


def test_data_that_cannot_be_loaded_or_shown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="parquet' is no file or folder here, and `datasets` cannot load it"):
        load_images(str(tmp_path / "nothing.parquet"))
    with pytest.raises(ValueError, match="1, 3, 4 channels, not 2"):
        load_images("digits", channels=2)


@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3), steps=st.integers(1, 12))
def test_batches_go_through_all_rows_before_any_row_comes_again(size, batch, seed, steps):
    drawn = torch.cat([batch_indices(size, batch, seed, step) for step in range(steps)])
    assert len(drawn) == batch * steps
    for epoch in drawn.split(size):
        assert len(epoch.unique()) == len(epoch)
        assert epoch.max() < size


def test_random_numbers_depend_on_the_whole_key_and_on_nothing_else():
    draw = lambda *key: torch.randn(4, generator=make_generator(*key)).tolist()  # noqa: E731
    keys = [(0, "noise", 1), (1, "noise", 1), (0, "order", 1), (0, "noise", 11), (0, "noise", 1, 0)]
    first = [draw(*key) for key in keys]
    torch.manual_seed(5)
    assert [draw(*key) for key in keys] == first
    assert len({tuple(numbers) for numbers in first}) == len(keys)
