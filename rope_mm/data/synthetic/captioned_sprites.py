"""Sprites and videos of them with captions: rendered, not downloaded, and the same for the same seed.

An image shows one of 576 combinations of shape, colour and place. Held out are those where shape + colour +
place is a multiple of 9: one place for each shape and colour; every value and every pair is in training.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from torch import Tensor

from rope_mm.data.seeding import batch_indices, make_generator
from rope_mm.data.synthetic.sprites import (
    COLUMNS,
    FACTORS,
    ROWS,
    VIDEO_FACTORS,
    Factors,
    render_sprites,
    render_videos,
    trajectory,
)

SPRITE_PHRASES = (
    "a {colour} {shape} at the {row} {column}",
    "{row} {column}: a {colour} {shape}",
    "the {shape} at the {row} {column} is {colour}",
    "in the {row} row, {column} column, a {colour} {shape}",
)
THREE_SHAPES = (16, 16), (12, 20), (20, 12)  # pixels (y, x)
VIDEO_PHRASES = (
    "a {colour} {shape} {motion}, first at the {row} {column}",
    "{row} {column} at first: a {colour} {shape}, {motion}",
    "the {shape} first at the {row} {column} is {colour} and {motion}",
    "{motion}, a {colour} {shape}, in the {row} row and {column} column at first",
)


def captioned_sprites(
    count: int = 8192,
    held_out: int = 512,
    size: int | tuple[int, int] = 16,
    seed: int = 0,
    phrases: Sequence[str] = SPRITE_PHRASES,
) -> DatasetDict:
    """Splits train and test with columns image, caption, shape, colour, row and column.

    Combinations come in shuffled rounds, each as often as any other; test has none of train.

    Args:
        count: images to train on; 512 show every combination that is not held out.
        held_out: images of the other 64.
        size: of a canvas, y and x in pixels; a sprite grows with it.
        seed: of their order, their place to a pixel, and their phrasing.
        phrases: to choose captions from.
    """

    def render(factors: Factors, jitter: Tensor) -> list[dict]:
        return encode_images(render_sprites(factors, size, jitter))

    combinations = all_combinations(FACTORS)
    columns = Features(image=Image())
    counts = {"train": count, "test": held_out}
    return build_splits(combinations, is_held_out(combinations), counts, seed, phrases, render, columns)


def captioned_sprites_of_three_shapes() -> DatasetDict:
    """Sprites on square, wide and tall canvases, of 16 x 16, 12 x 20 and 20 x 12 pixels in equal numbers."""
    splits = [captioned_sprites(4096, 170, size, seed) for seed, size in enumerate(THREE_SHAPES)]
    names = splits[0].keys()
    return DatasetDict({name: concatenate_datasets([split[name] for split in splits]) for name in names})


def captioned_videos(
    count: int = 2048,
    held_out: int = 512,
    frames: int = 4,
    size: int | tuple[int, int] = 16,
    seed: int = 0,
    phrases: Sequence[str] = VIDEO_PHRASES,
) -> DatasetDict:
    """Splits train and test with columns frames, caption, shape, colour, row, column and motion.

    Row and column are those of the first frame. Held out is a video whose way crosses a held-out place, even
    if it ends before: no frame of train shows a held-out combination.

    Args:
        count: videos to train on.
        held_out: videos to test on.
        frames: of a video.
        size: of a canvas, y and x in pixels; a sprite grows with it.
        seed: of their order, their place to a pixel, and their phrasing.
        phrases: to choose captions from.
    """

    def render(factors: Factors, jitter: Tensor) -> list[list[dict]]:
        videos = render_videos(factors, frames, size, jitter)
        images = encode_images(videos.flatten(0, 1))
        return [images[first : first + frames] for first in range(0, len(images), frames)]

    combinations = all_combinations(VIDEO_FACTORS)
    way = trajectory(combinations, max(len(ROWS), len(COLUMNS)))
    apart = is_held_out({**way, "shape": combinations["shape"][:, None]}).any(1)
    columns = Features(frames=List(Image()))
    counts = {"train": count, "test": held_out}
    return build_splits(combinations, apart, counts, seed, phrases, render, columns)


def all_combinations(names: Mapping[str, Sequence]) -> dict[str, Tensor]:
    """Every combination of factors, (n,) each."""
    columns = torch.cartesian_prod(*(torch.arange(len(words)) for words in names.values())).unbind(1)
    return dict(zip(names, columns, strict=True))


def is_held_out(factors: Factors) -> Tensor:
    """Whether a combination of shape, colour and place is in no training image."""
    place = factors["row"] * len(COLUMNS) + factors["column"]
    return (factors["shape"] + factors["colour"] + place) % (len(ROWS) * len(COLUMNS)) == 0


def build_splits(
    combinations: Factors,
    apart: Tensor,
    counts: Mapping[str, int],
    seed: int,
    phrases: Sequence[str],
    render: Callable[[Factors, Tensor], list],
    visuals: Features,
) -> DatasetDict:
    """Splits of captioned images or videos; test from the combinations set apart, train from the others.

    Args:
        combinations: of factors, (n,) each.
        apart: which of them (n,) are for test.
        counts: rows of each split.
        seed: of the order, the places to a pixel, and the phrasing.
        phrases: to choose captions from.
        render: factors and jitter (n, 2) -> what the column of images or videos holds.
        visuals: that column and its type.

    Raises:
        ValueError: a split without rows, or no phrases.
    """
    if min(counts.values()) < 1 or not phrases:
        raise ValueError(f"there must be a phrase and a row a split; there are {len(phrases)} and {counts}")
    splits = {}
    for split, rows in (("train", (~apart).nonzero()[:, 0]), ("test", apart.nonzero()[:, 0])):
        count = counts[split]
        chosen = rows[batch_indices(len(rows), count, seed, 0)]
        factors = {name: factor[chosen] for name, factor in combinations.items()}
        # another key would change the data of every measured run
        jitter = torch.randint(-1, 2, (count, 2), generator=make_generator(seed, "nudge", split))
        said = torch.randint(len(phrases), (count,), generator=make_generator(seed, "phrase", split))
        columns = {
            next(iter(visuals)): render(factors, jitter),
            "caption": write_captions(factors, phrases, said.tolist()),
            **{name: factor.tolist() for name, factor in factors.items()},
        }
        labels = {name: ClassLabel(names=list(VIDEO_FACTORS[name])) for name in factors}
        features = Features(**visuals, caption=Value("string"), **labels)
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def encode_images(images: Tensor) -> list[dict]:
    """Images (n, 1 or 3, y, x), uint8, as `datasets` stores them: in Netpbm, pixels after a header."""
    header = f"P{5 if images.shape[1] == 1 else 6} {images.shape[3]} {images.shape[2]} 255\n".encode()
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return [{"bytes": header + image.tobytes(), "path": None} for image in pixels]


def write_captions(factors: Factors, phrases: Sequence[str], said: Sequence[int]) -> list[str]:
    """What the factors say, in words.

    Args:
        factors: (n,) each.
        phrases: to choose from.
        said: the index of the phrase of each.
    """
    words = [[VIDEO_FACTORS[name][i] for i in factor.tolist()] for name, factor in factors.items()]
    return [
        phrases[index].format(**dict(zip(factors, row, strict=True)))
        for index, row in zip(said, zip(*words, strict=True), strict=True)
    ]


def read_caption(caption: str) -> dict[str, int]:
    """The factors that a caption names in any phrasing; -1 for one named not at all or in two ways."""
    named = {}
    for factor in reversed(VIDEO_FACTORS):  # the motion first: "moving left" says nothing of the column
        words = VIDEO_FACTORS[factor]
        pattern = rf"\b({'|'.join(words)})\b"
        found = set(re.findall(pattern, caption))
        caption = re.sub(pattern, " ", caption)
        named[factor] = words.index(found.pop()) if len(found) == 1 else -1
    return {factor: named[factor] for factor in VIDEO_FACTORS}
