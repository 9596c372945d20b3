"""Compare generated images with real ones: Fréchet distance, KID, precision, recall, density and coverage.

    python train/evaluate.py --real my/images --generated my/samples --features inception.pt --size 299
    python train/evaluate.py --real my/images --model runs/mine/model --caption text --features dinov2.pt2

The features are those of a network in a file of yours, which torch.export or TorchScript wrote: with layer
pool3 of Inception the Fréchet distance is the FID. A model generates an image of each real one's caption.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from datasets import Dataset, Image, concatenate_datasets
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data.columns import check_rows, read_captions
from rope_mm.data.images import EMBEDDED, find_images, load, load_splits
from rope_mm.data.pixels import UNREADABLE, open_image, to_channels
from rope_mm.evaluation.features import INPUTS, extract_features, load_network
from rope_mm.evaluation.metrics import NEIGHBOURS, frechet, kid, prdc
from rope_mm.files import write_text
from rope_mm.models.pipeline import MAX_BATCH, RopeMMPipeline
from rope_mm.training.config import check_options, option, run


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare the images of --generated or of --model with those of --real, by the features of a network."""

    real: str = option("", "an embedded source, a folder, files, or a hub name")
    generated: str = option("", "the same, of generated images")
    model: str = option("", "folder of a model, which generates an image of each real one's caption")
    features: str = option(
        "", "file of a network, .pt2 or TorchScript: images (b, 3, size, size) -> features"
    )
    size: int = option(224, "pixels of the side of what the network takes", minimum=1)
    input: str = option(
        "0..1", "range of its pixels; imagenet: normalised by its mean and deviation", choices=INPUTS
    )
    split: str = option("", "of the real images; empty: all")
    image: str = option("image", "column of images")
    caption: str = option("", "column of captions, for a model that reads them")
    num_images: int = option(0, "at most, of each side; 0: all", minimum=0)
    seed: int = option(0, "of the model's noise")
    output: str = option("", "JSON file of the metrics, which are printed anyway")


def load_rows(path: str, split: str, most: int) -> Dataset:
    """The rows of a source, of one split or of all.

    Args:
        path: see `load_splits`.
        split: its name; empty: all splits.
        most: how many rows at most; 0: all.

    Raises:
        ValueError: a split that it has not.
    """
    embedded = path in EMBEDDED or path.startswith("stacked:") or path.endswith(".npz")
    splits = load_splits(path) if embedded else load(path)
    if split and split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
    chosen = concatenate_datasets([rows for name, rows in splits.items() if split in ("", name)])
    rows = chosen if embedded else find_images(chosen, Path(path).parent)
    return rows.select(range(min(most, len(rows)))) if most else rows


def read_images(rows: Dataset, column: str) -> Iterator[Tensor]:
    """The images (3, y, x) of rows in [-1, 1], each in its own size; those that do not decode are named.

    Args:
        rows: of `datasets`.
        column: of images.

    Raises:
        ValueError: a column that is missing, rows of which no image decodes.
    """
    check_rows(rows, 3, column)
    skipped = 0
    for number, row in enumerate(rows.cast_column(column, Image(decode=False))):
        try:
            image = to_channels(open_image(cast(Any, row)[column]), 3)
        except UNREADABLE as error:
            reason = f"row {number}, column {column!r}: the image does not decode ({error})"
            if (skipped := skipped + 1) == len(rows):
                raise ValueError(f"no image of {len(rows)} rows decodes; {reason}") from error
            print(f"skipped: {reason}", file=sys.stderr)
            continue
        yield torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1


def generate(config: Evaluate, rows: Dataset) -> Iterator[Tensor]:
    """An image (ch, y, x) of the model for each row, from its caption where a column is named.

    Args:
        config: the model, the column of captions and the seed.
        rows: the real ones.
    """
    pipeline = RopeMMPipeline.from_pretrained(config.model)
    captions = [""] * len(rows)
    if config.caption:
        check_rows(rows, 3, config.caption)
        captions = [texts[0] for texts in read_captions(rows, config.caption)]
    generator = torch.Generator().manual_seed(config.seed)
    for first in range(0, len(captions), MAX_BATCH):
        batch = captions[first : first + MAX_BATCH]
        yield from pipeline(batch, generator=generator, output_type="pt").images


def check(config: Evaluate) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: with what is missing.
    """
    check_options(config)
    if not config.real or bool(config.generated) == bool(config.model):
        raise ValueError("give --real SOURCE, and one of --generated SOURCE and --model FOLDER")
    if not config.features:
        raise ValueError("give --features FILE, a network whose features are compared")


def main(config: Evaluate) -> None:
    """Print the metrics, and write them where --output says.

    Raises:
        ValueError: see `check`; data, a model or a network that cannot be used.
    """
    check(config)
    disable_progress_bar()
    network = load_network(config.features)
    rows = load_rows(config.real, config.split, config.num_images)
    if config.model:
        images = generate(config, rows)
    else:
        images = read_images(load_rows(config.generated, "", config.num_images), config.image)
    real = extract_features(network, read_images(rows, config.image), config.size, config.input)
    fake = extract_features(network, images, config.size, config.input)
    if (few := min(len(real), len(fake))) <= real.shape[1]:
        said = f"{few} images for {real.shape[1]} features: the Fréchet distance is too large"
        print(said, file=sys.stderr)
    result = {"real": len(real), "generated": len(fake), "features": real.shape[1]}
    result |= {"frechet": frechet(fake, real), "kid": kid(fake, real)}
    if few > NEIGHBOURS:
        result |= prdc(real, fake)
    text = json.dumps(result, indent=1)
    print(text)
    if config.output:
        write_text(Path(config.output), text)


if __name__ == "__main__":
    run(main, Evaluate)
