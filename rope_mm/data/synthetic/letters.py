"""Letters and digits in twelve styles with captions: the DejaVu fonts that matplotlib carries, no download.

An image shows one of 744 combinations of 62 characters and 12 styles (family, slant, weight), a little
rotated, sheared, scaled and shifted. Of each character one style is held out, and of each style five or six
characters.
"""

from itertools import product
from pathlib import Path
from string import ascii_letters, digits

import numpy
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from rope_mm.checks.extras import extra
from rope_mm.data.seeding import batch_indices, make_generator
from rope_mm.data.synthetic.captioned_sprites import encode_images

CHARACTERS = ascii_letters + digits
# family -> its font, and what the font calls italic
FAMILIES = {
    "sans": ("DejaVuSans", "Oblique"),
    "serif": ("DejaVuSerif", "Italic"),
    "mono": ("DejaVuSansMono", "Oblique"),
}
SLANTS = "upright", "italic"
WEIGHTS = {"regular": "", "bold": "Bold"}
STYLES = tuple(product(FAMILIES, SLANTS, WEIGHTS))  # (family, slant, weight)

SIZE = 32  # pixels of a side
FONT_SIZE = 23  # pixels: a bold W is 25 of them wide, the canvas less the shift 29
BASELINE = 23  # pixels below the upper edge
FINE = 4  # pixels of a drawn glyph across a pixel of the image, in both directions
SAMPLES = 2  # across a pixel, in both directions, of the moved glyph
# the largest change of an image, both ways: so small that an upright letter never looks like an italic one
ROTATION, SHEAR, SCALE, SHIFT = 0.04, 0.03, 0.04, 1.5  # radians, of the height, of the size, pixels
CHUNK = 256  # images at once


def captioned_letters(train: int = 16, held_out: int = 8, seed: int = 0) -> DatasetDict:
    """Splits train and test with columns image, caption, label, character and style.

    A caption is "a bold italic serif letter g", "... capital g" or "... digit 7". The label is the
    combination, character * 12 + style. Combinations that are held out are in test alone; the other half of
    test are new images of combinations that train has.

    Args:
        train: images of each of the 682 combinations to train on.
        held_out: images of each of the 62 combinations that are held out.
        seed: of the order of the images, and of how each is rotated, sheared, scaled and shifted.

    Raises:
        ValueError: a split without rows; matplotlib, whose fonts these are, is not installed.
    """
    if min(train, held_out) < 1:
        raise ValueError(
            f"train and held_out are 1 image or more of a combination, not {train} and {held_out}"
        )
    labels = torch.arange(len(CHARACTERS) * len(STYLES))
    apart, known = labels[is_held_out_letter(labels)], labels[~is_held_out_letter(labels)]
    count = held_out * len(apart)
    unseen, seen = apart.repeat(held_out), known[batch_indices(len(known), count, seed, 0)]
    glyphs = draw_glyphs()
    splits = {"train": known.repeat(train), "test": torch.cat([unseen, seen])}
    return DatasetDict({name: make_split(glyphs, rows, seed, name) for name, rows in splits.items()})


def is_held_out_letter(labels: Tensor) -> Tensor:
    """Whether a combination (n,), character * 12 + style, is in no training image."""
    return (labels // len(STYLES) + labels) % len(STYLES) == 0


def make_split(glyphs: Tensor, labels: Tensor, seed: int, split: str) -> Dataset:
    """Images of these combinations in random order.

    Args:
        glyphs: (744, y, x) in 0 to 1.
        labels: of the images, (n,).
        seed: of order and movement.
        split: its name, which is part of the seed.
    """
    labels = labels[torch.randperm(len(labels), generator=make_generator(seed, "order", split))]
    images = move_at_random(glyphs, labels, make_generator(seed, "change", split))
    columns = {
        "image": encode_images((images[:, None] * 255).round().to(torch.uint8)),
        "caption": [caption_letter(label) for label in labels.tolist()],
        "label": labels.tolist(),
        "character": (labels // len(STYLES)).tolist(),
        "style": (labels % len(STYLES)).tolist(),
    }
    features = Features(
        image=Image(),
        caption=Value("string"),
        label=Value("int64"),
        character=ClassLabel(names=list(CHARACTERS)),
        style=ClassLabel(names=[f"{weight} {slant} {family}" for family, slant, weight in STYLES]),
    )
    return Dataset.from_dict(columns, features=features)


def move_at_random(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, SIZE, SIZE) in 0 to 1 of these combinations, each moved at random.

    Args:
        glyphs: (744, y, x) in 0 to 1.
        labels: of the images, (n,).
        generator: of the movements.
    """
    change = (torch.rand(len(labels), 5, generator=generator) * 2 - 1).split(CHUNK)
    return torch.cat(
        [move(glyphs[rows], part) for rows, part in zip(labels.split(CHUNK), change, strict=True)]
    )


def caption_letter(label: int) -> str:
    """What a combination is called: "a bold italic serif letter g"."""
    character, (family, slant, weight) = CHARACTERS[label // len(STYLES)], STYLES[label % len(STYLES)]
    kind = "digit" if character.isdigit() else "capital" if character.isupper() else "letter"
    return f"a {weight} {slant} {family} {kind} {character.lower()}"


def draw_glyphs() -> Tensor:
    """Every combination (744, y, x), in 0 to 1, FINE pixels for one: centred, on one baseline, at one size.

    Raises:
        ValueError: matplotlib is not installed.
    """
    fonts, side = [read_font(*style) for style in STYLES], SIZE * FINE
    glyphs = numpy.zeros((len(CHARACTERS), len(STYLES), side, side), dtype="uint8")
    for row, character in enumerate(CHARACTERS):
        for column, font in enumerate(fonts):
            left, _, right, _ = font.getbbox(character, anchor="ls")
            canvas = PILImage.new("L", (side, side))
            where = ((side - left - right) / 2, BASELINE * FINE)
            ImageDraw.Draw(canvas).text(where, character, fill=255, font=font, anchor="ls")
            glyphs[row, column] = canvas
    return torch.from_numpy(glyphs).flatten(0, 1).float() / 255


def read_font(family: str, slant: str, weight: str) -> ImageFont.FreeTypeFont:
    """A font that matplotlib carries, FINE times its size.

    Args:
        family: a name of FAMILIES.
        slant: a name of SLANTS.
        weight: a name of WEIGHTS.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with extra("plots"):
        from matplotlib import get_data_path
    font, italic = FAMILIES[family]
    form = WEIGHTS[weight] + (italic if slant == "italic" else "")
    file = Path(get_data_path(), "fonts", "ttf", f"{font}{form and '-' + form}.ttf")
    return ImageFont.truetype(str(file), FONT_SIZE * FINE, layout_engine=ImageFont.Layout.BASIC)


def move(glyphs: Tensor, change: Tensor) -> Tensor:
    """Images (n, SIZE, SIZE) in 0 to 1 of glyphs, rotated, sheared and scaled about the centre, then shifted.

    Args:
        glyphs: (n, y, x), FINE pixels for one.
        change: rotation, shear, scale, shift right and shift down (n, 5), each in -1 to 1 of the largest one.
    """
    largest = torch.tensor([ROTATION, SHEAR, SCALE, SHIFT * 2 / SIZE, SHIFT * 2 / SIZE])
    angle, shear, scale, right, down = (change * largest).T
    cos, sin, size = angle.cos(), angle.sin(), 1 / (1 + scale)
    # where each place of the image comes from: the inverse movement
    x = torch.stack([size * (cos + shear * sin), size * (sin - shear * cos)], 1)
    y = torch.stack([-size * sin, size * cos], 1)
    matrix = torch.stack([x, y], 1)
    source = -(matrix @ torch.stack([right, down], 1)[:, :, None])
    side = SIZE * SAMPLES
    grid = affine_grid(torch.cat([matrix, source], 2), [len(glyphs), 1, side, side], align_corners=False)
    return avg_pool2d(grid_sample(glyphs[:, None], grid, align_corners=False), SAMPLES)[:, 0]
