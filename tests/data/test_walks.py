"""Walk cycles: sheets of parts, laid over each other, become videos of the right cells in the right order."""

import numpy
import pytest
from PIL import Image as PILImage

from rope_mm.data.images import load_splits
from rope_mm.data.synthetic.walks import CELL, FIRST, FRAMES, PARTS, SIZE, WAYS, walk_cycles

ROWS, COLUMNS = 21, 13  # cells of a sheet


def write_sheet(path, level):
    """A sheet of even cells: red counts rows, green counts columns, blue is the level; all opaque."""
    row, column = numpy.meshgrid(numpy.arange(ROWS), numpy.arange(COLUMNS), indexing="ij")
    cells = numpy.stack([row * 10, column * 10, row * 0 + level, row * 0 + 255], 2).astype(numpy.uint8)
    PILImage.fromarray(cells.repeat(CELL, 0).repeat(CELL, 1), "RGBA").save(path)


@pytest.fixture
def sheets(tmp_path):
    for part in PARTS:
        for number in range(2):
            write_sheet(tmp_path / f"{part}-{number}.png", 10 * PARTS.index(part) + number)
    return tmp_path


def test_a_video_shows_the_eight_steps_of_the_row_that_its_caption_names(sheets):
    rows = walk_cycles(sheets, train=8, test=4)["train"]
    assert len(rows) == 8 * len(WAYS)
    for row in rows:
        way = next(number for number, name in enumerate(WAYS) if row["caption"].endswith(name))
        frames = numpy.stack([numpy.asarray(frame) for frame in row["frames"]])
        assert frames.shape == (len(FRAMES), SIZE, SIZE, 3) and row["way"] == way
        assert (frames[..., 0] == 10 * (FIRST + way)).all()
        assert (frames[..., 1] == 10 * numpy.array(FRAMES)[:, None, None]).all()
        assert (frames[..., 2] == 40 + int(row["caption"].split("shoes ")[1][0])).all()  # the highest layer


def test_what_higher_layers_leave_transparent_shows_the_layer_below_them_and_else_white(sheets):
    clear = PILImage.new("RGBA", (CELL * COLUMNS, CELL * ROWS))
    for path in sheets.glob("*.png"):
        if not path.stem.startswith("body"):
            clear.save(path)
    rows = walk_cycles(sheets, train=1)["train"]
    assert numpy.asarray(rows[0]["frames"][0])[0, 0, 2] == int(rows[0]["caption"].split("body ")[1][0])
    other = sheets / "other"
    other.mkdir()
    for part in PARTS:
        clear.save(other / f"{part}-0.png")
        clear.save(other / f"{part}-1.png")
    assert (numpy.asarray(walk_cycles(other, train=1)["train"][0]["frames"][0]) == 255).all()


def characters(rows):
    return {caption.rpartition(",")[0] for caption in rows["caption"]}


def test_no_held_out_character_is_in_training_and_the_same_sheets_give_the_same_videos(sheets):
    splits, again = load_splits(f"walks:{sheets}"), load_splits(f"walks:{sheets}")
    known, unseen = characters(splits["train"]), characters(splits["test"])
    assert len(known) == 29 and len(unseen) == 3 and not known & unseen  # of 32
    assert splits["train"]["caption"] == again["train"]["caption"]


def test_a_folder_without_the_sheets_is_refused(sheets, tmp_path):
    (sheets / "body-1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"body-1\.png is no image"):
        walk_cycles(sheets)
    PILImage.new("RGBA", (640, 700)).save(sheets / "body-1.png")
    with pytest.raises(ValueError, match=r"body-1\.png is 640 x 700 pixels; its walks end at 576 x 768"):
        walk_cycles(sheets)
    for path in sheets.glob("*-1.png"):
        path.unlink()
    with pytest.raises(ValueError, match="has the sheets of one character"):
        walk_cycles(sheets)
    (sheets / "hair-0.png").unlink()
    with pytest.raises(ValueError, match=r"has no sheet of hair; a sheet's name is PART-N\.png"):
        walk_cycles(sheets)
