import pytest
import torch
from PIL import Image as PILImage

from rope_mm.evaluation.contact_sheet import (
    DATA_ROWS,
    GAP,
    HEAD,
    LOOKED_AT,
    MARGIN,
    NO_LETTER,
    caption_font,
    choose_rows,
    save_data_sheet,
    save_sheet,
    spread,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_of_a_grid_is_in_the_row_of_its_caption(channels, tmp_path):
    pictures = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, channels, 8, 8)
    save_sheet(tmp_path / "sheet.png", pictures, ["a dark one", "a light one"])
    sheet = PILImage.open(tmp_path / "sheet.png").convert("L")
    left = sheet.width - 3 * (48 + GAP)
    seen = [sheet.getpixel((left + 52 * x + 24, HEAD + 52 * y + 24)) for y in range(2) for x in range(3)]
    assert seen == [0, 51, 102, 153, 204, 255]
    words = sheet.crop((0, HEAD, left, HEAD + 48))
    assert words.getextrema()[0] < 100


def test_images_that_do_not_fill_the_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5 images do not fill 2 rows"):
        save_sheet(tmp_path / "sheet.png", torch.zeros(5, 1, 8, 8), ["a", "b"])


def test_a_grid_shows_transparent_pixels_as_white(tmp_path):
    images = torch.cat([torch.full((1, 3, 8, 8), -1.0), torch.full((1, 1, 8, 8), -1.0)], 1)  # invisible black
    save_sheet(tmp_path / "sheet.png", images, ["a"])
    sheet = PILImage.open(tmp_path / "sheet.png").convert("L")
    assert sheet.getpixel((sheet.width - GAP - 24, HEAD + 24)) == 255


def test_a_long_caption_is_wrapped_and_then_cut(tmp_path):
    captions = ["a short one", "a caption of many words " * 200, "x" * 3000]
    save_sheet(tmp_path / "sheet.png", torch.zeros(3, 1, 8, 8), captions)
    sheet = PILImage.open(tmp_path / "sheet.png").convert("L")
    assert sheet.width <= MARGIN + 2 * GAP + 48 + GAP + 1
    assert sheet.height == HEAD + 3 * (48 + GAP)
    rows = [
        sheet.crop((0, HEAD + 52 * row, sheet.width - 48 - GAP, HEAD + 52 * row + 48)) for row in range(3)
    ]
    inked = [sum(row.crop((0, y, row.width, y + 1)).getextrema()[0] < 128 for y in range(48)) for row in rows]
    assert inked[1] > 2 * inked[0] > 0 and inked[2] > 0  # several lines beside one


def test_no_captions_make_no_grid(tmp_path):
    with pytest.raises(ValueError, match="1 images do not fill 0 rows"):
        save_sheet(tmp_path / "sheet.png", torch.zeros(1, 1, 8, 8), [])


def inked(sheet, left, right):
    return sheet.crop((left, 0, right, HEAD)).getextrema()[0] < 128


def test_the_size_of_images_stands_above_the_columns_where_it_changes(tmp_path):
    images = [torch.zeros(1, *size) for size in ((8, 8), (8, 8), (4, 8), (8, 4), (8, 8))]
    save_sheet(tmp_path / "sheet.png", images, ["a"])
    sheet = PILImage.open(tmp_path / "sheet.png").convert("L")
    lefts = [sheet.width - (5 - column) * 52 for column in range(5)]
    assert [inked(sheet, left, left + 48) for left in lefts] == [True, False, True, True, True]


def test_the_whole_size_stands_above_a_narrow_image(tmp_path):
    save_sheet(tmp_path / "sheet.png", -torch.ones(2, 1, 128, 4), ["a", "b"])
    sheet = PILImage.open(tmp_path / "sheet.png").convert("L")
    size = caption_font([]).getmask("128x4").getbbox()
    head = sheet.crop((0, 0, sheet.width, HEAD - 1)).point(lambda value: 255 - value).getbbox()
    assert head[2] - head[0] >= size[2] - size[0] and head[2] < sheet.width


def test_a_sheet_of_data_has_an_image_with_its_size_in_each_row(tmp_path):
    train, held_out = [torch.full((1, 8, 8), -1.0)], [torch.full((1, 4, 8), 0.0)]
    read = []

    def rows_of(split, row):
        read.append((split is held_out, row))
        return [(split[row], "a row")]

    save_data_sheet(tmp_path / "data.png", train, held_out, rows_of)
    assert read == [(False, 0), (True, 0)]
    sheet = PILImage.open(tmp_path / "data.png").convert("L")
    assert sheet.height == HEAD + 2 * (48 + GAP)
    assert [sheet.getpixel((sheet.width - GAP - 24, HEAD + 52 * row + 12)) for row in (0, 1)] == [0, 128]
    save_data_sheet(tmp_path / "none.png", train, held_out, lambda split, row: [])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("count", [0, 1, 5, DATA_ROWS, 10_000])
def test_the_rows_of_a_sheet_of_data_are_spread_over_all_rows(count):
    rows = spread(count)
    assert len(rows) == len(set(rows)) == min(count, DATA_ROWS) and all(0 <= row < count for row in rows)
    assert count <= DATA_ROWS or rows[-1] > count * 0.9


@pytest.mark.parametrize("count", [0, 1, 5, DATA_ROWS, 77, LOOKED_AT])
def test_a_sheet_of_data_shows_each_kind_of_file_that_is_found(count):
    rare = {row for row in (count // 2, count // 3, count - 1) if 0 < row < count}
    rows = choose_rows(count, lambda row: row if row in rare else "photo")
    assert rare <= set(rows) and len(rows) == len(set(rows)) == min(count, DATA_ROWS)
    assert rows == sorted(rows) and all(0 <= row < count for row in rows)
    assert choose_rows(count, lambda row: row)[:1] == list(range(count))[:1]
    assert choose_rows(count, lambda row: None) == spread(count)


def test_of_very_many_rows_some_are_looked_at():
    looked = []
    rows = choose_rows(10_000, lambda row: looked.append(row) or (row > 9_000))
    assert len(looked) == LOOKED_AT and max(looked) > 9_900
    assert DATA_ROWS - 2 <= len(rows) <= DATA_ROWS and min(row for row in looked if row > 9_000) in rows


@pytest.mark.parametrize("caption", ["a circle", "ein grüner Kreis — groß", "зелёный круг", "ένας κύκλος"])
def test_captions_of_other_alphabets_are_written_in_a_font_that_has_their_letters(caption):
    font = caption_font([caption, "a circle"])
    unknown = bytes(font.getmask(NO_LETTER))
    assert not [letter for letter in caption if letter != " " and bytes(font.getmask(letter)) == unknown]


def test_a_sheet_shows_which_letters_of_another_alphabet_a_caption_has(tmp_path):
    for caption in ("жук", "шум"):  # in a font without them, each would be the same three boxes
        save_sheet(tmp_path / f"{caption}.png", torch.zeros(1, 1, 8, 8), [caption])
    assert (tmp_path / "жук.png").read_bytes() != (tmp_path / "шум.png").read_bytes()


def test_letters_that_no_font_has_do_not_hide_the_others():
    font = caption_font(["grün \ue000"])
    assert bytes(font.getmask("ü")) != bytes(font.getmask(NO_LETTER))
