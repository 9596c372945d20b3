import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from rope_mm.data import (
    DIGIT_NAMES,
    CaptionedImages,
    captioned_digits,
    load_images,
    stack_digits,
    stacked_digits,
)
from rope_mm.data.images import load_splits


@pytest.fixture(scope="module")
def splits():
    return stacked_digits()


def grey_digits(side=8, count=20, brightest=255):
    """Splits of even grey images whose brightness tells the label: label * 25."""
    labels = [i % 10 for i in range(count)]
    columns = {"image": [PILImage.new("L", (side, side), 25 * label) for label in labels], "label": labels}
    rows = Dataset.from_dict(columns, features=Features(image=Image(), label=Value("int64")))
    return DatasetDict(train=rows, test=rows)


def stacks(digits=None, count=200):
    return stack_digits(captioned_digits() if digits is None else digits, count, count)


def test_stacks_are_the_same_at_every_call():
    one, two = stacks(), stacks()
    for name in ("train", "test"):
        assert one[name].data.table.equals(two[name].data.table)


def test_every_caption_of_a_stack_names_its_three_digits(splits):
    assert len(splits["test"]) > 0
    for row in splits["test"].remove_columns("image"):
        digits = [DIGIT_NAMES.index(name) for name in row["caption"].split()]
        assert row["number"] == "".join(map(str, digits))
        assert row["label"] == int(row["number"])


def test_each_colour_is_the_digit_that_the_number_says():
    grey = CaptionedImages(stacks(grey_digits())["test"], 8, 3, label="label")
    pixels = ((grey.images() + 1) * 127.5).round()
    read = pixels[:, :, 0, 0] / 25
    assert torch.equal(pixels, pixels[:, :, :1, :1].expand_as(pixels))
    assert torch.equal((read @ torch.tensor([100.0, 10.0, 1.0])).long(), grey.labels)


def test_the_digits_of_a_stack_are_independent(splits):
    labels = torch.tensor(list(splits["train"]["label"]))
    digits = labels[:, None] // torch.tensor([100, 10, 1]) % 10
    share = torch.stack([column.bincount(minlength=10) for column in digits.T]) / len(labels)
    torch.testing.assert_close(share, torch.full((3, 10), 0.1), atol=0.01, rtol=0)
    assert labels.bincount(minlength=1000).min() > 5
    torch.testing.assert_close(torch.corrcoef(digits.T.float()), torch.eye(3), atol=0.02, rtol=0)


def test_held_out_stacks_are_made_of_held_out_digits(splits):
    parts = [CaptionedImages(splits[name], 8, 3).images(range(500)) for name in ("train", "test")]
    train, test = ({tuple(image.flatten().tolist()) for image in part.flatten(0, 1)} for part in parts)
    assert len(train & test) < 3


def test_digits_of_28_pixels_get_a_black_border_to_32():
    image = stacks(grey_digits(side=28))["train"][0]
    pixels = numpy.asarray(image["image"])
    inside = [25 * int(digit) for digit in image["number"]]
    assert pixels.shape == (32, 32, 3)
    assert (pixels[2:-2, 2:-2] == inside).all()
    assert pixels.sum() == sum(inside) * 28**2


def test_an_npz_of_digits_is_stacked_by_its_path(tmp_path, monkeypatch):
    labels = numpy.arange(40) % 10
    image = numpy.full((40, 28, 28), 25, "uint8") * labels[:, None, None].astype("uint8")
    numpy.savez(tmp_path / "digits.npz", image=image, label=labels)
    digits = load_splits(f"{tmp_path}/digits.npz")
    assert [len(digits[name]) for name in ("train", "test")] == [36, 4]
    assert set(digits["test"]["label"]) == {9}  # of every ten rows the last is held out
    assert numpy.asarray(digits["train"][3]["image"]).tolist() == image[3].tolist()
    monkeypatch.setattr(stack_digits, "__defaults__", (20, 10))
    assert load_splits(f"stacked:{tmp_path}/digits.npz")["test"][:]["number"] == ["999"] * 10


def test_cached_images_are_those_that_are_read_one_by_one(splits):
    kept, read = (
        CaptionedImages(splits["test"].select(range(50)), 8, 3, cache_in_memory=cache)
        for cache in (True, False)
    )
    assert torch.equal(kept.images(), read.images())
    assert torch.equal(kept.images(torch.tensor([7, 3])), read.images([7, 3]))


def test_without_a_caption_column_all_captions_are_empty(splits):
    assert set(CaptionedImages(splits["test"], 8, 3, caption="").captions) == {""}


def test_examples_are_spread_over_the_labels(splits):
    shown = CaptionedImages(splits["test"], 8, 3, caption="number", label="label").examples(10)
    assert [int(number) // 100 for number in shown] == list(range(10))


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        (lambda: grey_digits().rename_column("label", "kind"), "the data has no 'label'"),
        (lambda: grey_digits().map(lambda row: {"label": row["label"] + 1}), "labels 0 to 9, not 1 to 10"),
    ],
)
def test_what_are_no_digits_is_not_stacked(digits, message):
    with pytest.raises(ValueError, match=message):
        stacks(digits())


def test_an_npz_without_images_is_refused(tmp_path):
    numpy.savez(tmp_path / "words.npz", caption=numpy.array(["one"]))
    with pytest.raises(ValueError, match=r"words\.npz: no arrays image and label"):
        load_images(str(tmp_path / "words.npz"))
