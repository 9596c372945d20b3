"""What is said of a dataclass's fields: the comments after them -> comments after the keys of its YAML."""

import ast
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from io import StringIO
from textwrap import dedent
from tokenize import COMMENT, generate_tokens
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rope_mm.registry import Registry


def read_comments(schema: type, prefix: str = "") -> dict[str, str]:
    """What the source says after each dotted key of a dataclass, groups and bases included.

    The name of a `Registry` is replaced by its keys; those of a Literal are said without a comment.
    """
    said: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        said |= {f"{prefix}{name}": comment for name, comment in comments_of(owner).items()}
    for name, hint in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if get_origin(hint) is Literal:
            said[key] = "; ".join(filter(None, [describe(hint), said.get(key)]))
        elif is_dataclass(hint):
            said |= read_comments(hint, f"{key}.")  # pyright: ignore[reportArgumentType]
    return said


def comments_of(owner: type) -> dict[str, str]:
    """The comments in the lines of a class's own fields; none where there is no source."""
    try:
        source = dedent(inspect.getsource(owner))
    except (OSError, TypeError):
        return {}
    tokens = generate_tokens(StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == COMMENT}
    body = ast.parse(source).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    return {
        ast.unparse(field.target): spell_out(lines[line], vars(sys.modules[owner.__module__]))
        for field in body
        if isinstance(field, ast.AnnAssign)
        for line in range(field.lineno, (field.end_lineno or field.lineno) + 1)
        if line in lines
    }


def spell_out(comment: str, names: dict[str, object]) -> str:
    """A comment with the keys of each choice in place of its name."""
    choices = {name: ", ".join(entry) for name, entry in names.items() if isinstance(entry, Registry)}
    return re.sub(r"\w+", lambda word: choices.get(word[0], word[0]), comment)


def describe(hint: Any) -> str:
    """A declared type, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if is_dataclass(hint):
        return f"a group of keys ({', '.join(field.name for field in fields(hint))})"
    return (
        hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    )


def annotate(text: str, said: dict[str, str]) -> str:
    """A YAML text, indented by 2, with what is said of each dotted key after its line."""
    path, lines = [], []
    for line in text.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            line = "  # ".join(filter(None, [line, said.get(".".join(path))]))
        lines.append(line)
    return "\n".join(lines) + "\n"
