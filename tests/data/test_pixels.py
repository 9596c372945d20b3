import io
import logging

import numpy
import pytest
import torch
from PIL import Image as PILImage

from rope_mm.data.pixels import ORIENTATION, file_kind, open_image, resize_center_crop, to_image


def stored(image, kind="png", **options):
    """What `datasets` stores of an image."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return {"bytes": content.getvalue(), "path": None}


def pixels(image, channels, kind="png", size=4, background="white", **options):
    return resize_center_crop(open_image(stored(image, kind, **options)), size, channels, background)


def halves(mode, left, right, size=4):
    """An image of two colours, side by side."""
    image = PILImage.new(mode, (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


def test_an_image_is_turned_upright_by_its_exif_orientation():
    lying = PILImage.new("L", (32, 32), 0)
    lying.paste(255, (0, 0, 16, 32))  # white on the left; upright, by orientation 6, white is at the top
    exif = PILImage.Exif()
    exif[0x0112] = 6
    found = pixels(lying, 1, "jpeg", size=2, exif=exif)[0]
    assert (found[0] > 250).all() and (found[1] < 5).all()
    assert (pixels(lying, 1, "jpeg", size=2)[0][:, 0] > 250).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0, 257 * 100, 65_535])
def test_sixteen_bit_grey_is_scaled(channels, value):
    image = PILImage.fromarray(numpy.full((4, 4), value, dtype="uint16"))
    assert image.mode.startswith("I;16")
    assert (pixels(image, channels) == value // 257).all()


@pytest.mark.parametrize(
    ("value", "dtype", "grey"),
    [
        (65_535, "int32", 255),
        (25_700, "int32", 100),
        (2**31 - 1, "int32", 255),
        (0.2, "float32", 51),
        (51.0, "float32", 51),
        (65_535.0, "float32", 255),
    ],
)
def test_thirty_two_bit_grey_is_scaled(value, dtype, grey):
    image = PILImage.fromarray(numpy.full((4, 4), value, dtype=dtype))
    assert (pixels(image, 1, "tiff") == grey).all()


@pytest.mark.parametrize("value", [-1.0, 70_000.0, float("nan")])
def test_grey_values_without_meaning_are_refused(value):
    with pytest.raises(ValueError, match="have no meaning; save them as 0 to 65,535"):
        pixels(PILImage.fromarray(numpy.full((4, 4), value, dtype="float32")), 1, "tiff")


def with_palette():
    """Red, and a black that is transparent."""
    image = PILImage.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(1, (2, 0, 4, 4))
    image.info["transparency"] = 1
    return image


TRANSPARENT = [
    halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)),
    halves("LA", (0, 255), (0, 0)),
    with_palette(),
]


@pytest.mark.parametrize("image", TRANSPARENT, ids=["RGBA", "LA", "palette"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("background", "grey"), [("white", 255), ("#808080", 128), ("black", 0)])
def test_what_is_transparent_shows_the_background_and_not_its_invisible_colour(
    image, channels, background, grey
):
    found = pixels(image, channels, background=background)
    assert (found[:, :, 2:] == grey).all()
    seen = image.convert("RGBA").convert("L" if channels == 1 else "RGB").getpixel((0, 0))
    assert found[:, 0, 0].tolist() == list(numpy.atleast_1d(seen))


def test_half_transparent_colours_are_mixed_with_the_background():
    half = PILImage.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixels(half, 3)[:, 0, 0].tolist() == [255, 127, 127]


def test_four_channels_keep_alpha():
    assert pixels(TRANSPARENT[0], 4)[3].unique().tolist() == [0, 255]
    assert (pixels(PILImage.new("RGB", (4, 4), "red"), 4)[3] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_white_is_white_in_every_mode(mode):
    image = PILImage.new("RGB", (4, 4), "white").convert(mode)
    assert (pixels(image, 3, "tiff") == 255).all()


def test_of_an_animation_the_first_frame_is_read_and_said_so_once(caplog):
    frames = [PILImage.new("L", (4, 4), grey) for grey in (10, 200, 250)]
    held = stored(frames[0], "gif", save_all=True, append_images=frames[1:])
    held["path"] = "test-of-an-animation.gif"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (resize_center_crop(open_image(held), 4, 1) == 10).all()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["test-of-an-animation.gif holds 3 frames; the first one is read"]


def test_an_image_is_cropped_around_its_centre_to_any_shape():
    image = PILImage.new("L", (12, 4), 0)
    image.paste(255, (4, 0, 8, 4))
    assert (resize_center_crop(image, 4, 1) == 255).all()
    wide = resize_center_crop(image, (2, 6), 1)
    assert wide.shape == (1, 2, 6)
    assert wide[0, 0].tolist() == [0, 0, 255, 255, 0, 0]


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(ValueError, match="background must be a colour such as white or '#808080'"):
        resize_center_crop(TRANSPARENT[0], 4, 3, "whitish")


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_the_image_that_they_were(channels):
    image = torch.rand(channels, 4, 6) * 2 - 1
    again = resize_center_crop(to_image(image), (4, 6), channels) / 127.5 - 1
    torch.testing.assert_close(again, image, rtol=0, atol=0.5 / 127.5 + 1e-6)


def test_an_image_of_four_channels_is_written_on_its_background():
    image = torch.ones(4, 2, 2) * -1  # black, and invisible
    assert to_image(image).getpixel((0, 0)) == (255, 255, 255)


def test_files_that_are_read_in_different_ways_are_of_different_kinds():
    photo = PILImage.new("RGB", (4, 6), "red")
    turned = PILImage.Exif()
    turned[ORIENTATION] = 6

    files = [
        stored(photo, "jpeg"),
        stored(photo, "jpeg", exif=turned),
        stored(photo.convert("CMYK"), "jpeg"),
        stored(PILImage.new("I;16", (4, 6)), "png"),
        stored(photo.convert("RGBA"), "png"),
        stored(photo, "gif"),
        stored(photo, "gif", save_all=True, append_images=[PILImage.new("RGB", (4, 6))]),
    ]
    kinds = [file_kind(file) for file in files]
    assert None not in kinds and len(set(kinds)) == len(files)
    assert file_kind(stored(PILImage.new("RGB", (9, 9)), "jpeg")) == kinds[0]
    assert file_kind({"bytes": b"no image", "path": None}) is None
