"""Documents with a question whose answer is a place: in an image, between images, or in time.

Each function takes a random generator and every size as an argument, so that sizes never trained can be
asked: finer grids, other aspect ratios, longer documents and videos. Rows, columns and frames count from 1.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from rope_mm.data.seeding import make_generator
from rope_mm.data.synthetic.captioned_sprites import write_captions
from rope_mm.data.synthetic.sprites import (
    BACKGROUND,
    COLOURS,
    FACTORS,
    PLACES,
    ROWS,
    SHAPES,
    VIDEO_FACTORS,
    render_sprites,
    render_videos,
)
from rope_mm.registry import Registry

WORDS = (
    "apple",
    "bread",
    "cloud",
    "drum",
    "eagle",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
)
WORDS += ("lemon", "mirror", "needle", "ocean", "pencil", "river", "stone", "table", "window")


class QASample(NamedTuple):
    """A question about a document, and its answer.

    Attributes:
        document: texts, images (3, y, x) and videos (t, 3, y, x), uint8.
        question: in words.
        answer: a text, or an image (3, y, x).
    """

    document: list[str | Tensor]
    question: str
    answer: str | Tensor


def make_cell(generator: Generator, rows: int = 4, columns: int = 4, cell: int = 4) -> QASample:
    """Where in a grid of cells the coloured one is.

    Args:
        generator: of all that is random.
        rows: of the grid.
        columns: of the grid.
        cell: side of a cell in pixels.

    Raises:
        ValueError: a size below 1.
    """
    check_sizes(rows=rows, columns=columns, cell=cell)
    row, column, colour = (draw(generator, n) for n in (rows, columns, len(COLOURS)))
    grid = torch.tensor(BACKGROUND).expand(rows, columns, 3).clone()
    grid[(torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1] += 14  # a chessboard, to count by
    grid[row, column] = torch.tensor(list(COLOURS.values())[colour])
    image = grid.permute(2, 0, 1).repeat_interleave(cell, 1).repeat_interleave(cell, 2).to(torch.uint8)
    question = f"which cell is {list(COLOURS)[colour]}?"
    return QASample([image], question, f"row {row + 1} column {column + 1}")


def make_neighbour(
    generator: Generator, images: int = 2, words: int = 2, size: int | tuple[int, int] = 16
) -> QASample:
    """Which word stands right before or after one of several images, with words between them.

    Args:
        generator: of all that is random.
        images: how many.
        words: in each gap.
        size: of an image, y and x in pixels, or the side of a square.

    Raises:
        ValueError: a count below 1, or more images than differ in shape and colour.
    """
    check_sizes(images=images, words=words)
    if images > len(SHAPES) * len(COLOURS):
        raise ValueError(f"there are {len(SHAPES) * len(COLOURS)} different sprites, not {images}")
    sprites = torch.randperm(len(SHAPES) * len(COLOURS), generator=generator)[:images]
    place = torch.randint(len(ROWS), (2, images), generator=generator)
    factors = {"shape": sprites // len(COLOURS), "colour": sprites % len(COLOURS)}
    rendered = render_sprites({**factors, **dict(zip(PLACES, place, strict=True))}, size)
    said = torch.randint(len(WORDS), (images + 1, words), generator=generator).tolist()
    gaps = [[WORDS[i] for i in gap] for gap in said]
    asked, after = draw(generator, images), draw(generator, 2)
    answer = gaps[asked + 1][0] if after else gaps[asked][-1]
    document: list[str | Tensor] = [" ".join(gaps[0])]
    for image, gap in zip(rendered, gaps[1:], strict=True):
        document += [image, " ".join(gap)]
    question = f"which word stands right {('before', 'after')[after]} the {name(factors, asked)}?"
    return QASample(document, question, answer)


def make_order(
    generator: Generator, images: int = 3, words: int = 1, size: int | tuple[int, int] = 16
) -> QASample:
    """Which colour the image of a number has, of several with words between them.

    Args:
        generator: of all that is random.
        images: how many.
        words: in each gap.
        size: of an image, y and x in pixels, or the side of a square.

    Raises:
        ValueError: a count below 1.
    """
    check_sizes(images=images, words=words)
    factors = {key: torch.randint(len(of), (images,), generator=generator) for key, of in FACTORS.items()}
    gaps = torch.randint(len(WORDS), (images, words), generator=generator).tolist()
    asked, document = draw(generator, images), list[str | Tensor]()
    for image, gap in zip(render_sprites(factors, size), gaps, strict=True):
        document += [image, " ".join(WORDS[i] for i in gap)]
    colour = FACTORS["colour"][factors["colour"][asked]]
    return QASample(document, f"which colour has image {asked + 1}?", colour)


def make_frame(
    generator: Generator, frames: int = 8, period: int = 2, size: int | tuple[int, int] = 16
) -> QASample:
    """In which frame of a video a sprite is, among look-alikes before and after it at every period-th frame.

    The look-alikes have its place and shape but another colour; all other frames are empty. A rotation of
    that period turns them all alike (a needle among periodic distractors, arXiv 2502.05173).

    Args:
        generator: of all that is random.
        frames: of the video.
        period: from one look-alike to the next, in frames.
        size: of a frame, y and x in pixels, or the side of a square.

    Raises:
        ValueError: less than two frames, or a period below 1.
    """
    check_sizes(period=period, frames=frames)
    if frames < 2:
        raise ValueError(f"a video of {frames} frame has no second one to choose; give it 2 or more")
    shape, colour, row, column = (draw(generator, len(FACTORS[factor])) for factor in FACTORS)
    other = (colour + 1 + draw(generator, len(COLOURS) - 1)) % len(COLOURS)
    needle = draw(generator, frames)
    time = torch.arange(frames)
    shapes = torch.where((time - needle) % period == 0, shape, -1)
    colours = torch.where(time == needle, colour, other)
    places = {"row": torch.full_like(time, row), "column": torch.full_like(time, column)}
    video = render_sprites({"shape": shapes, "colour": colours, **places}, size)
    sought = name({"shape": torch.tensor([shape]), "colour": torch.tensor([colour])}, 0)
    return QASample([video], f"which frame shows the {sought}?", f"frame {needle + 1}")


def make_sprite(generator: Generator, size: int | tuple[int, int] = 16) -> QASample:
    """The colour and the place of a sprite."""
    factors = random_factors(generator)
    (caption,) = write_captions(factors, ("{colour} at the {row} {column}",), [0])
    return QASample([render_sprites(factors, size)[0]], "what is it?", caption)


def make_generation(generator: Generator, size: int | tuple[int, int] = 16) -> QASample:
    """An image of a square of a colour at a place."""
    factors = random_factors(generator) | {"shape": torch.tensor([list(SHAPES).index("square")])}
    (caption,) = write_captions(factors, ("{colour} at the {row} {column}",), [0])
    return QASample([], f"generate {caption}", render_sprites(factors, size)[0])


def make_motion(generator: Generator, frames: int = 4, size: int | tuple[int, int] = 16) -> QASample:
    """The colour of a sprite, its first place and how it moves.

    Args:
        generator: of all that is random.
        frames: of the video.
        size: of a frame, y and x in pixels, or the side of a square.
    """
    factors = random_factors(generator)
    (caption,) = write_captions(factors, ("{colour}, first at the {row} {column}, {motion}",), [0])
    video = render_videos(factors, frames, size)[0]
    return QASample([video], "what happens?", caption)


QA_TASKS: Registry[Callable[..., QASample]] = Registry(
    "question",
    {
        "cell": make_cell,
        "neighbour": make_neighbour,
        "order": make_order,
        "frame": make_frame,
        "sprite": make_sprite,
        "generation": make_generation,
        "motion": make_motion,
    },
)


def make_qa_samples(task: str, form: Mapping[str, Any], count: int, *key: int | str) -> list[QASample]:
    """Questions of a form, which depend on the key alone.

    Args:
        task: a key of QA_TASKS, or any name where the form's `ask` is one.
        form: `ask` and sizes, the arguments of the task's function.
        count: how many.
        key: of the randomness.

    Raises:
        ValueError: an unknown task, sizes it does not take.
    """
    if not isinstance(form, Mapping):
        raise ValueError(f"task {task!r} takes sizes, a group of keys, not {form!r}")
    sizes = dict(form)
    name = sizes.pop("ask", task)
    generator, ask = make_generator(name, json.dumps(sizes, sort_keys=True), *key), QA_TASKS[name]
    try:
        return [ask(generator, **sizes) for _ in range(count)]
    except TypeError as error:
        raise ValueError(f"task {task!r} with sizes {sizes}: {error}") from None


def random_factors(generator: Generator) -> dict[str, Tensor]:
    """The factors of one video, (1,) each."""
    return {factor: torch.tensor([draw(generator, len(words))]) for factor, words in VIDEO_FACTORS.items()}


def name(factors: dict[str, Tensor], index: int) -> str:
    """What one sprite is called: "red circle"."""
    return " ".join(FACTORS[factor][factors[factor][index]] for factor in ("colour", "shape"))


def draw(generator: Generator, below: int) -> int:
    """A whole number from 0 to below - 1."""
    return int(torch.randint(below, (), generator=generator))


def check_sizes(**sizes: int) -> None:
    """Refuse sizes of nothing.

    Raises:
        ValueError: with the name and the size.
    """
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"{what} must be 1 or more, not {size}")
