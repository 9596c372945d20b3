"""How far the first patch of an image stands from the text around it."""

import pytest

from rope_mm import Image, Scheme
from rope_mm.analysis.offsets import measure_offsets, offsets_table


@pytest.mark.parametrize(
    ("layout", "before", "after"),
    [
        ("flat", [1], [12]),
        ("m-rope", [1, 1, 1], [4, 4, 4]),
        ("rope-tv", [6.5, 5.5, 5], [6.5, 7.5, 8]),  # h w / 2 on each axis, less half of the image's own size
        ("compact", [1, 0, 0], [1, 0, 0]),
        ("anchored", [1, 0, -0.5], [1, 2, 2.5]),
    ],
)
def test_offsets_of_an_image_of_3_x_4_patches(layout, before, after):
    found = measure_offsets(Scheme(layout=layout), Image(3, 4))
    assert (found.before.tolist(), found.after.tolist()) == (before, after)


def test_only_layouts_that_place_images_at_the_origin_depend_on_the_text_before():
    for layout, moves in (
        ("grid", True),
        ("m-rope-spatial-reset", True),
        ("compact", False),
        ("rope-tv", False),
    ):
        few, many = (measure_offsets(Scheme(layout=layout), Image(2, 3), before=n).before for n in (1, 9))
        assert (few.tolist() != many.tolist()) == moves


def test_the_table_has_a_row_for_each_scheme_and_two_columns_for_each_image():
    table = offsets_table({"text on one axis": Scheme(layout="compact")}, [Image(2, 2), Image(6, 6)]).split(
        "\n"
    )
    assert table[0] == "| layout | to 2 x 2 | to 6 x 6 | from 2 x 2 | from 6 x 6 |"
    assert table[2:] == ["| `text on one axis` | 1, 0, 0 | 1, 0, 0 | 1, 0, 0 | 1, 0, 0 |"]
