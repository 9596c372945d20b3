"""The pages of the documentation, and the option that writes their tables of promises anew."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from rope_mm import properties_table
from rope_mm.analysis import markdown
from rope_mm.analysis.choosing import choices_table
from rope_mm.schemes import zoo

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
PROMISES: dict[str, Iterable[str]] = {
    "promises": [*zoo.TEXT, *zoo.MULTIMODAL],
    "vision-promises": [*zoo.VISION, *zoo.DIFFUSION, *zoo.AUDIO],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-promises", action="store_true", help="write the tables of schemes.md and choosing.md"
    )


@pytest.fixture(scope="session")
def promises(request: pytest.FixtureRequest) -> dict[str, str]:
    """The tables of promises, measured; with --write-promises the page gets them."""
    tables = {name: properties_table(schemes, "markdown") for name, schemes in PROMISES.items()}
    if request.config.getoption("--write-promises", default=False):
        for name, table in tables.items():
            markdown.write_table(PAGE, name, table)
    return tables


@pytest.fixture(scope="session")
def choices(request: pytest.FixtureRequest) -> str:
    """The table of choices; with --write-promises the page gets it."""
    if request.config.getoption("--write-promises", default=False):
        markdown.write_table(PAGE.with_name("choosing.md"), "choices", choices_table())
    return choices_table()
