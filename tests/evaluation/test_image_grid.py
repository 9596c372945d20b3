import pytest
import torch
from PIL import Image as Picture

from rope_mm.evaluation.image_grid import GAP, save_sheet


@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_stands_in_the_row_of_its_caption(channels, tmp_path):
    pictures = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, channels, 8, 8)
    save_sheet(tmp_path / "sheet.png", pictures, ["a dark one", "a light one"])
    sheet = Picture.open(tmp_path / "sheet.png").convert("L")
    left = sheet.width - 3 * (48 + GAP)
    seen = [sheet.getpixel((left + 52 * x + 24, 52 * y + 24)) for y in range(2) for x in range(3)]
    assert seen == [0, 51, 102, 153, 204, 255]
    words = sheet.crop((0, 0, left, 48))
    assert words.getextrema()[0] < 100


def test_pictures_that_do_not_fill_the_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5 pictures do not fill 2 rows"):
        save_sheet(tmp_path / "sheet.png", torch.zeros(5, 1, 8, 8), ["a", "b"])
