"""The pages of the documentation, and the option that writes their tables of promises anew."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from rope_mm import Image, Scheme, properties_table
from rope_mm.analysis import markdown
from rope_mm.analysis.choosing import choices_table
from rope_mm.analysis.offsets import offsets_table
from rope_mm.schemes import zoo

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
PROMISES: dict[str, Iterable[str]] = {
    "promises": [*zoo.TEXT, *zoo.MULTIMODAL],
    "vision-promises": [*zoo.VISION, *zoo.DIFFUSION, *zoo.AUDIO],
}

# the layouts of the factorial experiment
COMPARED = ("flat", "grid", "m-rope", "m-rope-spatial-reset", "rope-tie", "rope-tv", "videorope", "local")
COMPARED += ("compact", "compact-scaled", "anchored")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-promises",
        action="store_true",
        help="write the tables of schemes.md, choosing.md and factors.md",
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


@pytest.fixture(scope="session")
def offsets(request: pytest.FixtureRequest) -> str:
    """The table of offsets of growing images; with --write-promises the page gets it."""
    schemes = {name: Scheme(layout=name) for name in COMPARED}
    schemes["compact-centred"] = Scheme(layout="compact", options={"origin": "centre"})
    table = offsets_table(schemes, [Image(2, 2), Image(6, 6)])
    if request.config.getoption("--write-promises", default=False):
        markdown.write_table(PAGE.with_name("factors.md"), "offsets", table)
    return table
