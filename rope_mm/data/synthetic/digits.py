"""Handwritten digits with captions: 1,797 images of 8 x 8 pixels, carried by scikit-learn (UCI optdigits)."""

import numpy
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("a handwritten {}", "the digit {}", "a {} drawn by hand", "the number {}")
HELD_OUT = 360


def captioned_digits() -> DatasetDict:
    """Splits train and test with columns image, caption ("a handwritten seven") and label.

    The i-th image always has the same phrasing and split.
    """
    pixels, labels = (numpy.asarray(part) for part in load_digits(return_X_y=True))
    grey = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
    columns = {
        "image": [PILImage.fromarray(image) for image in grey],
        "caption": [PHRASES[i // 10 % 4].format(DIGIT_NAMES[label]) for i, label in enumerate(labels)],
        "label": labels.tolist(),
    }
    features = Features(image=Image(), caption=Value("string"), label=ClassLabel(names=list(DIGIT_NAMES)))
    digits = Dataset.from_dict(columns, features=features)
    return digits.train_test_split(HELD_OUT, seed=0, stratify_by_column="label")
