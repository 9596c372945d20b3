"""Compare generated images with real ones: Fréchet distance, KID, precision, recall, captions and copies.

    python train/evaluate.py --real my/images --generated my/samples --features inception.pt --size 299
    python train/evaluate.py --real my/images --model runs/mine/model --caption text --features dinov2.pt2
    python train/evaluate.py --real DATA --split test --known train --model runs/mine/model --caption text
    python train/evaluate.py --real digits --model runs/mine/model --caption caption --label label

The features are those of a network in a file of yours, which torch.export or TorchScript wrote: with layer
pool3 of Inception the Fréchet distance is the FID. A model generates an image of each real one's caption;
`caption_retrieval` says how often that real image is the nearest of 50, `copied_share` how many images are
nearer to one of the known images than any other known image is. Without --features pixels are compared, and
these two alone are given. With --label a classifier that is trained on the real images says what
train/adversarial.py says of its own: whether generated images show what held-out captions ask for.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from datasets import Dataset, Image, concatenate_datasets
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rope_mm.data.columns import check_rows, choose_rows, read_captions, select_numbered, stored_row
from rope_mm.data.images import find_images, is_made_here, load, load_images, load_splits
from rope_mm.data.pixels import UNREADABLE, check_background, open_image, to_channels
from rope_mm.data.templates import read_template
from rope_mm.evaluation.features import INPUTS, extract_features, load_network
from rope_mm.evaluation.image_evaluators import IMAGE_EVALUATORS, make_evaluator
from rope_mm.evaluation.metrics import NEIGHBOURS, frechet, kid, prdc
from rope_mm.evaluation.retrieval import caption_retrieval, copied_share
from rope_mm.files import write_text
from rope_mm.models.pipeline import MAX_BATCH, RopeMMPipeline, generates_unconditionally
from rope_mm.training.config import check_options, option, run

LABELLED = 1_000  # images generated where a classifier reads them


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare the images of --generated or of --model with those of --real, by features or by pixels."""

    real: str = option("", "an embedded source, a folder, files, or a hub name")
    generated: str = option("", "the same, of generated images")
    model: str = option("", "folder of a model, which generates an image of each real one's caption")
    features: str = option(
        "", "file of a network, .pt2 or TorchScript: images (b, 3, size, size) -> features; empty: pixels"
    )
    size: int = option(
        0,
        "pixels of a side of what is compared; 0: 224 for a network, else that of generated images",
        minimum=0,
    )
    input: str = option(
        "0..1", "range of its pixels; imagenet: normalised by its mean and deviation", choices=INPUTS
    )
    split: str = option("", "of the real images; empty: all")
    known: str = option("", "split of the real images that training saw, of which copies are counted")
    image: str = option("image", "column of images")
    caption: str = option("", "column of captions, for a model that reads them")
    label: str = option(
        "", "column of classes, whole numbers from 0, which a classifier trained on the real images finds"
    )
    background: str = option(
        "white", "with --label, colour under transparent pixels of the real images", check=check_background
    )
    evaluator: str = option("caption", "the metrics by that classifier", choices=IMAGE_EVALUATORS)
    num_inference_steps: int | None = option(None, "of sampling; null: those of training", minimum=1)
    noise_scale: float | None = option(None, "of the model's noise; null: that of training", minimum=0)
    num_images: int = option(
        0, "at most, of each side; 0: all. With --label, generated ones; 0: 1,000", minimum=0
    )
    seed: int = option(0, "of the model's noise, and of the classifier")
    output: str = option("", "JSON file of the metrics, which are printed anyway")


def load_rows(path: str, split: str, most: int) -> Dataset:
    """The rows of a source, of one split or of all.

    Args:
        path: see `load_splits`.
        split: its name; empty: all splits.
        most: how many rows at most, chosen at random; 0: all.

    Raises:
        ValueError: a split that it has not.
    """
    splits = load_splits(path) if is_made_here(path) else load(path)
    if split and split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
    chosen = concatenate_datasets([rows for name, rows in splits.items() if split in ("", name)])
    rows = chosen if is_made_here(path) else find_images(chosen, Path(path).parent)
    return select_numbered(rows, choose_rows(len(rows), most)) if most else rows


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
            reason = f"row {stored_row(rows, number)}, column {column!r}: the image does not decode ({error})"
            if (skipped := skipped + 1) == len(rows):
                raise ValueError(f"no image of {len(rows)} rows decodes; {reason}") from error
            print(f"skipped: {reason}", file=sys.stderr)
            continue
        yield torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1


def load_model(config: Evaluate) -> RopeMMPipeline:
    """The model, which generates images as the settings say.

    Raises:
        ValueError: a model that generates none, or from captions where none are given, or in one pass only.
    """
    pipeline = RopeMMPipeline.from_pretrained(config.model)
    spec = pipeline.spec
    if "text2image" not in spec.tasks:
        raise ValueError(f"{config.model} generates no images; its templates are {spec.templates}")
    templates = map(read_template, spec.templates)
    if not config.caption and not any(generates_unconditionally(parts, spec.kinds) for parts in templates):
        raise ValueError(f"{config.model} generates images from captions; give --caption COLUMN")
    if (steps := config.num_inference_steps or 1) > 1 and spec.steps == 1:
        raise ValueError(
            f"{config.model} was trained to generate in 1 step; remove --num_inference_steps {steps}"
        )
    return pipeline


def generate(config: Evaluate, pipeline: RopeMMPipeline, captions: Sequence[str]) -> Iterator[Tensor]:
    """An image (ch, y, x) of the model for each caption.

    Args:
        config: the seed, the steps and the noise.
        pipeline: the model.
        captions: "" where it reads none.
    """
    generator = torch.Generator().manual_seed(config.seed)
    options = {"num_inference_steps": config.num_inference_steps, "noise_scale": config.noise_scale}
    options |= {"generator": generator, "output_type": "pt"}
    for first in range(0, len(captions), MAX_BATCH):
        yield from pipeline(list(captions[first : first + MAX_BATCH]), **options).images


def classify(config: Evaluate) -> dict[str, float]:
    """The metrics of the evaluator for images of held-out captions, and those of real images.

    Raises:
        ValueError: data or a model that cannot be used; images that the evaluator does not read.
    """
    samples, pipeline = config.num_images or LABELLED, load_model(config)
    size, channels = pipeline.spec.size, pipeline.model.config.num_channels
    columns = config.image, config.caption, config.label
    sides = load_images(config.real, size, channels, *columns, background=config.background)
    evaluator, captions = make_evaluator(config.evaluator, *sides, samples, config.seed, bool(config.caption))
    for reason in (reason for side in sides for reason in side.unreadable.values()):
        print(f"skipped: {reason}", file=sys.stderr)
    images = torch.stack(list(generate(config, pipeline, captions)))
    real = {f"real_{name}": value for name, value in evaluator.real_reference.items()}
    return evaluator.evaluate(images) | real


def read_texts(config: Evaluate, rows: Dataset) -> list[str]:
    """The caption of each row, "" where no column is named."""
    if not config.caption:
        return [""] * len(rows)
    check_rows(rows, 3, config.caption)
    return [texts[0] for texts in read_captions(rows, config.caption)]


def check(config: Evaluate) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: with what is missing.
    """
    check_options(config)
    if not config.real or bool(config.generated) == bool(config.model):
        raise ValueError("give --real SOURCE, and one of --generated SOURCE and --model FOLDER")
    if config.label:
        if not config.caption and IMAGE_EVALUATORS[config.evaluator].captions == "needed":
            raise ValueError(f"--evaluator {config.evaluator} needs the column of captions; give --caption")
        others = {"generated": config.generated, "features": config.features, "size": config.size}
        others |= {"split": config.split, "known": config.known, "input": config.input != Evaluate.input}
        if unread := [name for name, value in others.items() if value]:
            raise ValueError(
                f"--label evaluates --model on what is held out, by a classifier; remove --{unread[0]}"
            )
        return
    for name in ("evaluator", "background"):
        if (value := getattr(config, name)) != getattr(Evaluate, name):
            raise ValueError(f"--{name} {value} needs --label, the column of classes")
    of_model = "num_inference_steps", "noise_scale"
    if not config.model and (given := [name for name in of_model if getattr(config, name) is not None]):
        raise ValueError(f"--{given[0]} is of images that a model generates; give --model")
    if not config.features and not config.known and not (config.model and config.caption):
        raise ValueError(
            "give --features FILE, a network whose features are compared; without one pixels say how many "
            "images fit their captions, for --model with --caption, and how many copy those of --known SPLIT"
        )


def choose_features(
    config: Evaluate, images: Iterator[Tensor]
) -> tuple[Callable[[Iterable[Tensor]], Tensor], Iterator[Tensor]]:
    """Images -> features, of the network or the pixels themselves; and the generated images, from the first.

    Args:
        config: the network, its input and the size.
        images: the generated ones, whose size pixels are compared in.

    Raises:
        ValueError: a file without a network; no images.
    """
    if config.features:
        network = load_network(config.features)
        return partial(extract_features, network, size=config.size or 224, input=config.input), images
    if (first := next(images, None)) is None:
        raise ValueError("there are no generated images to compare")
    size = config.size or max(first.shape[1:])
    return partial(extract_features, torch.nn.Flatten(), size=size), chain([first], images)


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """How close the features (m, f) of generated images come to those (n, f) of real ones."""
    if (few := min(len(real), len(fake))) <= real.shape[1]:
        said = f"{few} images for {real.shape[1]} features: the Fréchet distance is too large"
        print(said, file=sys.stderr)
    found = {"frechet": frechet(fake, real), "kid": kid(fake, real)}
    return found | (prdc(real, fake) if few > NEIGHBOURS else {})


def retrieve(real: Tensor, fake: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How many images (n, f) have the real one (n, f) of their caption as nearest, or why it is not said."""
    if len(set(captions)) < len(captions):
        print(
            f"{len(captions)} captions, {len(set(captions))} different: no caption_retrieval", file=sys.stderr
        )
        return {}
    if len(real) < len(fake):
        print("some real images do not decode: no caption_retrieval", file=sys.stderr)
        return {}
    return {"caption_retrieval": caption_retrieval(real, fake)}


def measure(config: Evaluate) -> dict[str, float]:
    """The metrics of generated and real images by the features of a network, or by their pixels.

    Raises:
        ValueError: data, a model or a network that cannot be used.
    """
    rows = load_rows(config.real, config.split, config.num_images)
    captions = read_texts(config, rows)
    if config.model:
        images = generate(config, load_model(config), captions)
    else:
        images = read_images(load_rows(config.generated, "", config.num_images), config.image)
    features, images = choose_features(config, images)
    real, fake = features(read_images(rows, config.image)), features(images)
    result: dict[str, float] = {"real": len(real), "generated": len(fake), "features": real.shape[1]}
    if config.features:
        result |= compare(real, fake)
    if config.model and config.caption:
        result |= retrieve(real, fake, captions)
    if config.known:
        known = features(read_images(load_rows(config.real, config.known, 0), config.image))
        result["copied_share"] = copied_share(known, fake)
        if config.split not in ("", config.known):  # else the real images are known ones themselves
            result["copied_share_of_real"] = copied_share(known, real)
    return result


def main(config: Evaluate) -> None:
    """Print the metrics, and write them where --output says.

    Raises:
        ValueError: see `check`; data, a model or a network that cannot be used.
    """
    check(config)
    disable_progress_bar()
    result = classify(config) if config.label else measure(config)
    text = json.dumps(result, indent=1)
    print(text)
    if config.output:
        write_text(Path(config.output), text)


if __name__ == "__main__":
    run(main, Evaluate)
