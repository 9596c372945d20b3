import math

import pytest

from rope_mm.analysis import markdown


def test_a_table_has_its_titles_a_rule_and_its_rows():
    assert markdown.table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown.table(("a", "b"), [], "---:") == "| a | b |\n| --- | ---: |"


@pytest.mark.parametrize(
    ("values", "formats", "told"),
    [
        ([1.0, 3.0], (".4g", ".2g"), "2 ± 1.4"),
        ([0.0, 1.0], (".1f",), "0.5 ± 0.7"),
        ([0.0, math.inf], (".1f",), "inf ± nan"),
        ([0.25], (".2f",), "0.25"),
    ],
)
def test_a_mean_is_told_with_the_standard_deviation_of_a_sample_and_one_value_without(values, formats, told):
    assert markdown.spread(values, *formats) == told
