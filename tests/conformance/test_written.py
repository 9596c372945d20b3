"""docs/conformance.md lists what was compared. Runs last: its name sorts after the others'."""

from pathlib import Path

import pytest


def test_the_page_lists_every_original_that_was_compared(request, compared):
    here = Path(__file__).parent
    if not set(here.glob("test_*.py")) <= {item.path for item in request.session.items}:
        pytest.skip("a part of the folder compares a part of the originals")
    written, rows = compared
    assert len(rows) >= 40
    assert written == rows, "write it anew: pytest tests/conformance --write-table"
