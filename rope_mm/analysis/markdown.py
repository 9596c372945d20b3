"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], rule: str = "---") -> str:
    """Rows below their titles; `rule` is "---:" where all columns but the first stand to the right."""
    lines = [titles, ["---", *[rule] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Sequence[float], form: str, of_spread: str = "") -> str:
    """Mean ± standard deviation, in this format or one of its own; of one value, the value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    told = f" ± {numbers.std():{of_spread or form}}" if len(values) > 1 else ""
    return f"{numbers.mean():{form}}{told}"
