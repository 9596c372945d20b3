"""Originals run beside ours: what agrees is collected, and README's table is made of it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- originals: written by pytest tests/conformance --write-table -->"
END = "<!-- /originals -->"
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


def rounded_up(error: float) -> str:
    """One digit, never below the error itself."""
    if not error:
        return "0"
    power = math.floor(math.log10(error))
    return f"{math.ceil(error / 10**power) * 10.0**power:.0e}".replace("e-0", "e-")


def table() -> str:
    """Rows as Markdown, by scheme."""
    head = ["| scheme | original | compared | largest difference |", "| --- | --- | --- | --- |"]
    rows = [f"| `{s}` | {o} | {w} | {rounded_up(e)} |" for (s, o, w), e in sorted(ROWS.items())]
    return "\n".join(head + rows)


@pytest.fixture
def compared() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Scheme, original and what was compared: the rows that README has, and those of this run."""
    lines = README.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {tuple(row[:3]) for row in cells}, set(ROWS)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table", default=False):
        text = README.read_text()
        before, rest = text.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")
