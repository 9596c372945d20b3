"""A stored image -> pixels, in one way for training, evaluation and image grids.

Upright by its EXIF orientation; the first frame of an animation; 16- and 32-bit grey scaled to 8 bits; alpha
composited on a background where the model has no channel for it; cropped to the centre and resized.
"""

import logging
import math
import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import fsspec
import numpy
import torch
from PIL import Image as PILImage
from PIL import ImageColor, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BACKGROUND = "white"
ORIENTATION = 0x0112  # the EXIF tag that says how to turn an image upright
SIDEWAYS = 5, 6, 7, 8  # of its numbers, those that exchange height and width
GREY_RANGES = 255, 65_535, 2**31 - 1  # of whole numbers of more than 8 bits, where the file does not say

# what opening and fitting an image raise if its bytes are none
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, PILImage.DecompressionBombError)


class Once(logging.Filter):
    """Lets each message through once: an image is read again in every epoch."""

    def __init__(self):
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this message is new."""
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


LOG = logging.getLogger(__name__)
LOG.addFilter(Once())


def read_file(stored: Mapping[str, Any]) -> BytesIO:
    """The bytes of an image file from what `datasets` stores.

    Args:
        stored: {"bytes", "path"}; without bytes the path is read, here or wherever fsspec reaches.
    """
    content, path = stored["bytes"], stored["path"]
    if not content:
        with cast(Any, fsspec.open(os.fspath(path))) as file:
            content = file.read()
    return BytesIO(content)


def upright_size(stored: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image that stands upright, read without decoding it.

    Args:
        stored: see `read_file`.
    """
    image = PILImage.open(read_file(stored))
    return (image.width, image.height) if orientation(image) in SIDEWAYS else (image.height, image.width)


def file_kind(stored: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What one file of images has and another has not: format, mode, orientation, transparency, frames.

    Args:
        stored: see `read_file`.

    Returns:
        None for what is no image.
    """
    try:
        image = PILImage.open(read_file(stored))
        several = getattr(image, "n_frames", 1) > 1
        return image.format, image.mode, orientation(image), image.has_transparency_data, several
    except UNREADABLE:
        return None


def open_file(stored: Mapping[str, Any]) -> PILImage.Image:
    """An image file from what `datasets` stores, its first frame loaded.

    Args:
        stored: see `read_file`.

    Raises:
        ValueError: what does not decode, with its path where there is one.
    """
    content, path = read_file(stored), stored["path"]
    try:
        image = PILImage.open(content)
        image.load()  # here, where its path is known
        return image
    except UNREADABLE as error:
        reason = str(error).partition(" <_io.BytesIO")[0]
        raise ValueError(f"{reason}: {path}" if path else reason) from error


def open_image(stored: Mapping[str, Any]) -> PILImage.Image:
    """An image from what `datasets` stores, upright; of several frames the first one, with a word in the log.

    Args:
        stored: see `open_file`.

    Raises:
        ValueError: as from `open_file`.
    """
    image = open_file(stored)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        LOG.warning("%s holds %d frames; the first one is read", stored["path"] or "an image", frames)
        image.seek(0)  # counting them may have moved on
        image.load()
    return upright(image)


def orientation(image: PILImage.Image) -> int:
    """The number of an image's EXIF orientation, 1 for upright."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (*UNREADABLE, KeyError, AttributeError):  # a damaged block beside a good image
        return 1


def upright(image: PILImage.Image) -> PILImage.Image:
    """The image turned and flipped as its EXIF orientation says."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def resize_center_crop(
    image: PILImage.Image, size: int | tuple[int, int], channels: int, background: str = BACKGROUND
) -> Tensor:
    """Pixels (ch, y, x), uint8, of an image cropped around its centre and resized.

    Args:
        image: of any mode.
        size: y and x in pixels, or the side of a square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        background: the colour under what is transparent, where channels is 1 or 3.
    """
    height, width = (size, size) if isinstance(size, int) else size
    flat = to_channels(image, channels, background)
    fitted = ImageOps.fit(flat, (width, height), PILImage.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1)


def keep_aspect_ratio(height: int, width: int, side: int, patch_size: int) -> tuple[int, int]:
    """Pixels (y, x) of whole patches in the shape of an image, in as many patches as a square has at most.

    The most patches for which the shorter side, rounded to whole patches, has its share of the longer one: as
    the NaFlex form of SigLIP 2 (arXiv 2502.14786) resizes, but that what is left over is cropped.

    Args:
        height: of the image, in pixels or any other unit.
        width: of the image.
        side: of the square, in pixels.
        patch_size: pixels of a patch's side.

    Raises:
        ValueError: a square that whole patches do not tile.
    """
    if side % patch_size or side < patch_size:
        raise ValueError(f"size {side} is no multiple of patches of {patch_size} pixels")
    most, ratio = (side // patch_size) ** 2, min(height, width) / max(height, width)
    shapes = [(long, max(1, round(long * ratio))) for long in range(1, most + 1)]
    long, short = max(shape for shape in shapes if shape[0] * shape[1] <= most)
    y, x = (long, short) if height >= width else (short, long)
    return y * patch_size, x * patch_size


def to_channels(image: PILImage.Image, channels: int, background: str = BACKGROUND) -> PILImage.Image:
    """The image in grey, RGB or RGBA of 8 bits.

    Args:
        image: of any mode.
        channels: 1, 3 or 4.
        background: the colour under what is transparent, where channels is 1 or 3.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    if not image.has_transparency_data or channels == 4:
        return image.convert(MODES[channels])
    colours = image.convert("RGBA")
    ground = PILImage.new("RGBA", colours.size, check_background(background))
    return PILImage.alpha_composite(ground, colours).convert(MODES[channels])


def check_background(background: str) -> tuple[int, ...]:
    """The colour (red, green, blue, 255) of a name or a number such as "#808080".

    Raises:
        ValueError: no colour.
    """
    try:
        return (*ImageColor.getrgb(background)[:3], 255)
    except ValueError:
        raise ValueError(
            f"background must be a colour such as white or '#808080', not {background!r}"
        ) from None


def eight_bits(image: PILImage.Image) -> PILImage.Image:
    """A grey image of 16 or 32 bits or of real numbers, scaled to 0 to 255.

    16 bits reach to 65,535. 32 bits reach to 65,535 or to 2^31 - 1, whichever holds the image; real numbers
    to 1, 255 or 65,535.

    Raises:
        ValueError: values that are negative, beyond these or not finite.
    """
    values = numpy.asarray(image).astype("float64")
    low, high = float(values.min()), float(values.max())
    ranges = (1, *GREY_RANGES[:2]) if image.mode == "F" else GREY_RANGES[1:]
    top = 65_535 if image.mode.startswith("I;16") else next((top for top in ranges if high <= top), math.inf)
    if not low >= 0 or not math.isfinite(top):
        raise ValueError(f"grey values of {low:g} to {high:g} have no meaning; save them as 0 to 65,535")
    return PILImage.fromarray((values * (255 / top)).round().astype("uint8"))


def to_image(pixels: Tensor, background: str = BACKGROUND) -> PILImage.Image:
    """An image that a file or a grid can hold: grey or RGB, what is transparent composited.

    Args:
        pixels: (ch, y, x) in [-1, 1], ch 1, 3 or 4; what lies outside is clipped.
        background: the colour under what is transparent.
    """
    scaled = pixels.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    image = PILImage.fromarray(scaled.permute(1, 2, 0).squeeze(-1).numpy())
    return to_channels(image, 1 if len(pixels) == 1 else 3, background)
