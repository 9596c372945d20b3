"""Templates: columns of a row in braces among words, and the tasks that they set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Column:
    """A column of a row, in a template; `drawn` where its picture is to be drawn, not only read."""

    column: str
    drawn: bool = False


Template = tuple[str | Column, ...]


@dataclass(frozen=True)
class Task:
    """What a template asks of the model: after `before`, to draw or to write what is in a column."""

    before: Template
    column: str


def read_template(text: str) -> Template:
    """Parts of "{caption} {image:draw}": words as they are, columns in braces.

    Raises:
        ValueError: braces that do not close, anything after a column's name but ":draw".
    """
    parts: list[str | Column] = []
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}") from None
    for words, column, told, conversion in parsed:
        parts += [words] if words else []
        if column is None:
            continue
        if not column or conversion or told not in ("", "draw"):
            raise ValueError(f"template {text!r}: a column is {{name}}, or {{name:draw}} where it is drawn")
        parts.append(Column(column, told == "draw"))
    return tuple(parts)


def find_tasks(templates: Sequence[Template], kinds: Mapping[str, str]) -> dict[str, Task]:
    """The first task of each name: to "draw" or "caption" a picture, to "film" or "narrate" a clip."""
    found: dict[str, Task] = {}
    making, telling = {"picture": "draw", "clip": "film"}, {"picture": "caption", "clip": "narrate"}
    for template in templates:
        seen = ""
        for place, part in enumerate(template):
            if isinstance(part, str):
                continue
            kind = kinds[part.column]
            task = Task(template[:place], part.column)
            if part.drawn:
                found.setdefault(making[kind], task)
            if kind == "words" and seen:
                found.setdefault(telling[seen], task)
            seen = seen if kind == "words" else kind
    return found
