import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import readme_table


@given(st.floats(1e-18, 1e-2))
def test_an_error_is_told_by_one_digit_that_is_not_below_it(error):
    told = readme_table.rounded_up(error)
    assert len(told.split("e")[0]) == 1
    assert error * (1 - 1e-12) <= float(told) <= 2 * error * (1 + 1e-12)


def test_a_table_is_written_between_its_comments_and_nothing_else_changes(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- one: by x -->\nold\n<!-- /one -->\nb\n<!-- two: by y -->\n<!-- /two -->\n")
    monkeypatch.setattr(readme_table, "README", readme)
    readme_table.write("one", ("p", "q"), [("`r`", 1)])
    assert readme.read_text() == (
        "a\n<!-- one: by x -->\n\n| p | q |\n| --- | --- |\n| `r` | 1 |\n\n<!-- /one -->\nb\n"
        "<!-- two: by y -->\n<!-- /two -->\n"
    )
    assert readme_table.read("one") == [["r", "1"]]


@pytest.mark.parametrize("name", ["originals", "families"])
def test_a_table_of_readme_written_again_is_the_same(name, tmp_path, monkeypatch):
    copy, text = tmp_path / "README.md", readme_table.README.read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    _, table, _ = readme_table.parts(name)
    titles, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()
    ]
    monkeypatch.setattr(readme_table, "README", copy)
    readme_table.write(name, titles, rows)
    assert copy.read_text(encoding="utf-8") == text
