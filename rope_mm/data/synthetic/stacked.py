"""A thousand modes that can be counted: three random digits in the colours of one image."""

from io import BytesIO
from typing import Any

import numpy
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from rope_mm.data.seeding import make_generator
from rope_mm.data.synthetic.digits import DIGIT_NAMES, captioned_digits

TRAIN, TEST = 30_000, 8_000  # stacks
BLOCK = 8  # digits are padded with black to whole blocks of as many pixels: 28 x 28 to 32 x 32


def stacked_digits() -> DatasetDict:
    """The embedded digits in stacks of 8 x 8 pixels; see `stack_digits`."""
    return stack_digits(captioned_digits())


def stack_digits(splits: DatasetDict, train: int = TRAIN, test: int = TEST) -> DatasetDict:
    """Stacks of three digits, the same at every call: red, green and blue are random digits of one split.

    Columns: image (RGB), caption ("seven zero three"), number ("703") and label (703).

    Args:
        splits: train and test with columns image and label.
        train: how many stacks to train on.
        test: how many to test on.

    Raises:
        ValueError: data without columns image and label, or with a label that is no digit.
    """
    counts = {"train": train, "test": test}
    return DatasetDict({name: stack(splits[name], name, count) for name, count in counts.items()})


def stack(digits: Dataset, split: str, count: int) -> Dataset:
    """Stacks of the rows of a split.

    Args:
        digits: rows with columns image and label.
        split: its name, which is part of the seed.
        count: how many stacks.
    """
    if missing := {"image", "label"} - set(digits.column_names):
        raise ValueError(f"stacks are made of columns image and label; the data has no {min(missing)!r}")
    labels = numpy.asarray(list(digits["label"]))
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"stacks are made of digits, labels 0 to 9, not {labels.min()} to {labels.max()}")
    grey = numpy.stack([numpy.asarray(image.convert("L")) for image in digits["image"]])
    grey = numpy.pad(grey, [(0, 0), *((-side % BLOCK // 2,) * 2 for side in grey.shape[1:])])
    rows = torch.randint(len(digits), (count, 3), generator=make_generator("stacked", split)).numpy()
    named = labels[rows]
    columns = {
        "image": [{"bytes": png(grey[row].transpose(1, 2, 0)), "path": None} for row in rows],
        "caption": [" ".join(DIGIT_NAMES[digit] for digit in row) for row in named],
        "number": ["".join(map(str, row)) for row in named.tolist()],
        "label": (named @ [100, 10, 1]).tolist(),
    }
    return Dataset.from_dict(
        columns,
        features=Features(
            image=Image(), caption=Value("string"), number=Value("string"), label=Value("int64")
        ),
    )


def png(pixels: Any) -> bytes:
    """An image file of uint8 pixels (y, x, 3)."""
    file = BytesIO()
    PILImage.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def read_npz(path: str) -> DatasetDict:
    """Arrays of a file as splits, of which every tenth row is the held-out one.

    `image` (n, y, x) or (n, y, x, ch) is uint8; with it come `caption` (n,), or `label` (n,) from 0 to 9, or
    both. Without captions a label's is the name of its digit.

    Raises:
        ValueError: a file that cannot be read, or without these arrays.
    """
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in ("image", "caption", "label") if name in arrays}
        columns.setdefault("caption", numpy.asarray(DIGIT_NAMES)[columns.get("label", ())])
        image, caption = columns.pop("image"), columns.pop("caption")
        if len(image) != len(caption):
            raise ValueError(f"{len(image)} images with {len(caption)} captions")
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: no arrays image and label, or caption, can be read ({error})") from error
    features = Features(image=Image(), caption=Value("string"))
    if "label" in columns:
        features["label"] = ClassLabel(names=list(DIGIT_NAMES))
    named = {name: column.tolist() for name, column in columns.items()}
    named |= {"image": [PILImage.fromarray(pixels) for pixels in image], "caption": caption.tolist()}
    rows = Dataset.from_dict(named, features=features)
    held = numpy.arange(len(rows)) % 10 == 9
    splits = {"train": ~held, "test": held}
    return DatasetDict({name: rows.select(numpy.flatnonzero(part)) for name, part in splits.items()})
