import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.analysis import markdown


def test_a_table_has_titles_a_rule_and_rows():
    assert markdown.table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown.table(("a", "b"), [], "---:") == "| a | b |\n| --- | ---: |"


@pytest.mark.parametrize(
    ("values", "formats", "text"),
    [
        ([1.0, 3.0], (".4g", ".2g"), "2 ± 1.4"),
        ([0.0, 1.0], (".1f",), "0.5 ± 0.7"),
        ([0.0, math.inf], (".1f",), "inf ± nan"),
        ([0.25], (".2f",), "0.25"),
    ],
)
def test_a_mean_has_the_standard_deviation_of_a_sample_and_a_single_value_has_none(values, formats, text):
    assert markdown.spread(values, *formats) == text


@given(st.floats(1e-18, 1e-2))
def test_an_error_is_rounded_to_one_digit_that_is_not_below_it(error):
    text = markdown.round_up(error)
    assert len(text.split("e")[0]) == 1
    assert error * (1 - 1e-12) <= float(text) <= 2 * error * (1 + 1e-12)


def test_writing_a_table_changes_nothing_else_in_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: by x -->\nold\n<!-- /one -->\nb\n<!-- two: by y -->\n<!-- /two -->\n")
    markdown.write_table(page, "one", markdown.table(("p", "q"), [("`r`", 1)]))
    assert page.read_text() == (
        "a\n<!-- one: by x -->\n\n| p | q |\n| --- | --- |\n| `r` | 1 |\n\n<!-- /one -->\nb\n"
        "<!-- two: by y -->\n<!-- /two -->\n"
    )
    assert markdown.read_table(page, "one") == [["r", "1"]]


def test_a_page_without_the_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- one: by x -->\n")
    with pytest.raises(ValueError, match="has no table between <!-- one"):
        markdown.read_table(page, "one")
