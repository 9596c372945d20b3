"""Templates: columns of a row in braces among text, and the tasks that they train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

GENERATE = "generate"  # after the name of a column whose image or video the model learns to generate
OLD_MARKS = ("draw",)  # the same in older templates
TASKS = {  # (kind that is read, kind that is generated) -> name
    ("text", "image"): "text2image",
    ("image", "text"): "image2text",
    ("text", "video"): "text2video",
    ("video", "text"): "video2text",
}


@dataclass(frozen=True)
class Column:
    """A column of a row, in a template.

    Attributes:
        column: its name.
        generate: whether the model learns to generate its image or video, and does not only read it.
    """

    column: str
    generate: bool = False


Template = tuple[str | Column, ...]


@dataclass(frozen=True)
class Task:
    """What a template asks of the model.

    Attributes:
        before: the prompt: everything in the template before the column.
        column: the column whose content the model generates.
    """

    before: Template
    column: str


def read_template(text: str) -> Template:
    """Parts of "{caption} {image:generate}": text as it is, columns in braces.

    Raises:
        ValueError: braces that do not close, or anything after a column's name but ":generate".
    """
    parts: list[str | Column] = []
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}") from None
    for literal, column, mark, conversion in parsed:
        parts += [literal] if literal else []
        if column is None:
            continue
        if mark in OLD_MARKS:
            raise ValueError(f"template {text!r}: {{{column}:{mark}}} is now {{{column}:{GENERATE}}}")
        if not column or conversion or mark not in ("", GENERATE):
            raise ValueError(
                f"template {text!r}: a column is {{name}}, or {{name:{GENERATE}}} if it is to be generated"
            )
        parts.append(Column(column, mark == GENERATE))
    return tuple(parts)


def find_tasks(templates: Sequence[Template], kinds: Mapping[str, str]) -> dict[str, Task]:
    """The first task of each name in TASKS that the templates train.

    A task that reads text is preferred to one that generates an image or video without any.

    Args:
        templates: as `read_template` gives them.
        kinds: what each column holds: "text", "image" or "video".
    """
    found: dict[str, Task] = {}
    for template in templates:
        previous = ""
        for place, part in enumerate(template):
            if isinstance(part, str):
                continue
            kind = kinds[part.column]
            task = Task(template[:place], part.column)
            if part.generate:
                name = TASKS["text", kind]
                if name not in found or reads_text(task, kinds) > reads_text(found[name], kinds):
                    found[name] = task
            if kind == "text" and previous in ("image", "video"):
                found.setdefault(TASKS[previous, kind], task)
            previous = kind
    return found


def reads_text(task: Task, kinds: Mapping[str, str]) -> bool:
    """Whether a column of text stands before the task's own."""
    return any(isinstance(part, Column) and kinds[part.column] == "text" for part in task.before)
