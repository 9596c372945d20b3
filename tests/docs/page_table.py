"""A table of README between two comments that name it, written of what tests find."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rope_mm.analysis import markdown

README = Path(__file__).parents[2] / "README.md"


def parts(name: str) -> tuple[str, str, str]:
    """README up to the first comment's end, the table, and README from the second comment on."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(f"<!-- {name}: ")
    told, arrow, rest = rest.partition("-->")
    table, end, after = rest.partition(f"<!-- /{name} -->")
    return before + begin + told + arrow, table, end + after


def read(name: str) -> list[list[str]]:
    """The rows of a table."""
    _, table, _ = parts(name)
    lines = table.strip().splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def write(name: str, titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Put these rows in place of a table's."""
    before, _, after = parts(name)
    README.write_text(f"{before}\n\n{markdown.table(titles, rows)}\n\n{after}", encoding="utf-8")


def rounded_up(error: float) -> str:
    """One digit, never below the error itself."""
    if not error:
        return "0"
    power = math.floor(math.log10(error))
    return f"{math.ceil(error / 10**power) * 10.0**power:.0e}".replace("e-0", "e-")
