"""Originals run beside ours: what agrees is collected, and README's table is made of it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "readme"))
import readme_table

ROWS: dict[tuple[str, str, str], float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write README's table of originals")


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
    """Scheme, original and what was compared: the rows that README has, and those of this run."""
    return {tuple(row[:3]) for row in readme_table.read("originals")}, set(ROWS)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table", default=False):
        titles = "scheme", "original", "compared", "largest difference"
        rows = [(f"`{s}`", o, w, readme_table.rounded_up(e)) for (s, o, w), e in sorted(ROWS.items())]
        readme_table.write("originals", titles, rows)
