"""Originals run beside ours: what agrees is collected, and the table of docs/conformance.md is made of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from rope_mm.analysis import markdown

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

ROWS: dict[tuple[str, str, str], float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write the table of docs/conformance.md")


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """`agree("qwen-image", "diffusers QwenEmbedRope", ours, theirs, 1e-6)`: no element differs by more."""

    def agree(
        scheme: str, original: str, ours: Tensor, theirs: Tensor, within: float, what: str = ""
    ) -> None:
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        error = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
        assert error <= within, f"{original} differs from {scheme} by {error:.1e}, allowed {within:.0e}"
        key = scheme, original, what
        ROWS[key] = max(error, ROWS.get(key, 0.0))

    return agree


@pytest.fixture
def compared() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Scheme, original and what was compared: the rows that the page has, and those of this run."""
    return {tuple(row[:3]) for row in markdown.read_table(PAGE, "originals")}, set(ROWS)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table", default=False):
        titles = "scheme", "original", "compared", "largest difference"
        rows = [(f"`{s}`", o, w, markdown.round_up(e)) for (s, o, w), e in sorted(ROWS.items())]
        markdown.write_table(PAGE, "originals", markdown.table(titles, rows))
