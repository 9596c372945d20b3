"""The side of a row follows from the row: whatever is added, removed or renamed, no row changes it."""

import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rope_mm.data.holdout import SHARE, row_numbers, split_rows


def sides(rows):
    """Texts of the rows to train on, and of those held out."""
    splits = split_rows(rows)
    return set(splits["train"]["text"]), set(splits["test"]["text"])


def texts(numbers):
    return Dataset.from_dict({"text": [f"row {number}" for number in sorted(numbers)]})


SETS = st.sets(st.integers(0, 10_000), min_size=2, max_size=60)


@settings(max_examples=60, deadline=None)
@given(SETS, SETS)
def test_a_row_that_was_trained_on_is_never_held_out_after_rows_are_added_or_removed(before, after):
    trained, held_out = sides(texts(before))
    numbers = row_numbers(texts(after))
    # else a few rows have none that is always on its side
    assume(min(numbers) < SHARE <= max(row_numbers(texts(before))))
    now_trained, now_held_out = sides(texts(after))
    assert trained and held_out and now_trained and now_held_out
    assert not trained & now_held_out


def test_about_a_fifth_of_many_rows_is_held_out():
    train, test = sides(texts(range(2_000)))
    assert len(train) + len(test) == 2_000 and 350 < len(test) < 450


def images(contents, captions):
    rows = [
        {"image": {"bytes": content, "path": None}, "text": text}
        for content, text in zip(contents, captions, strict=True)
    ]
    return Dataset.from_list(rows, features=Features(image=Image(), text=Value("string")))


def test_a_corrected_caption_leaves_an_image_on_its_side_and_equal_images_are_on_one():
    contents = [f"image {number // 2}".encode() for number in range(40)]
    numbers = row_numbers(images(contents, [str(i) for i in range(40)]))
    assert numbers == row_numbers(images(contents, ["another"] * 40))
    assert numbers[::2] == numbers[1::2] and len(set(numbers)) == 20


def test_an_image_elsewhere_is_known_by_the_name_of_its_file():
    paths = [{"image": {"bytes": None, "path": f"{folder}/7.png"}} for folder in ("here", "/there")]
    one, other = row_numbers(Dataset.from_list(paths, features=Features(image=Image())))
    assert one == other


def test_rows_that_are_all_equal_are_not_split():
    with pytest.raises(ValueError, match="no row can be held out of 3 equal ones; give a test split"):
        split_rows(Dataset.from_dict({"text": ["a"] * 3}))
