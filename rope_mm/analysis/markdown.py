"""Tables in Markdown, alone or in a page between two comments that name them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], rule: str = "---") -> str:
    """A table.

    Args:
        titles: of the columns.
        rows: of cells.
        rule: below the titles of all columns but the first; "---:" aligns these columns to the right.
    """
    lines = [titles, ["---", *[rule] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Sequence[float], form: str, of_spread: str = "") -> str:
    """Mean ± standard deviation of a sample; of one value, the value.

    Args:
        values: of the sample.
        form: format of the mean, such as ".1f".
        of_spread: format of the deviation; that of the mean if empty.
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {numbers.std():{of_spread or form}}" if len(values) > 1 else ""
    return f"{numbers.mean():{form}}{deviation}"


def round_up(error: float) -> str:
    """An error as one digit that is never below it: 1.2e-7 is "2e-7"."""
    if not error:
        return "0"
    power = math.floor(math.log10(error))
    return f"{math.ceil(error / 10**power) * 10.0**power:.0e}".replace("e-0", "e-")


def split_page(page: Path, name: str) -> tuple[str, str, str]:
    """A page up to the end of `<!-- name: ... -->`, the table, and the page from `<!-- /name -->` on.

    Raises:
        ValueError: a page without these two comments.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {name}: ")
    comment, arrow, rest = rest.partition("-->")
    body, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise ValueError(f"{page} has no table between <!-- {name}: ... --> and <!-- /{name} -->")
    return before + begin + comment + arrow, body, end + after


def read_table(page: Path, name: str) -> list[list[str]]:
    """The rows of a page's table, each a list of its cells without code quotes."""
    _, body, _ = split_page(page, name)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body.split("\n") if line][
        2:
    ]


def write_table(page: Path, name: str, text: str) -> None:
    """Put a table in the place of a page's table; nothing else changes.

    Args:
        page: a Markdown file.
        name: of the table, in the comments around it.
        text: of the new table.

    Raises:
        ValueError: a page without these comments.
    """
    before, _, after = split_page(page, name)
    page.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")
