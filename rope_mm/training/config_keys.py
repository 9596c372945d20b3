"""The dotted keys of a configuration, and the types that they are declared with."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from rope_mm.training.old_keys import OLD_KEYS


def known_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass, groups included, with its declared type."""
    hints, known = get_type_hints(schema), {}
    for name in (entry.name for entry in fields(schema)):
        known[prefix + name] = hints[name]
        if is_dataclass(hints[name]):
            known |= known_keys(cast(type, hints[name]), f"{prefix}{name}.")
    return known


def check_key(key: str, known: dict[str, Any], source: str) -> None:
    """Refuse a key that the schema lacks, naming today's name or the nearest; a free dict takes any key.

    Args:
        key: dotted key.
        known: dotted key -> declared type.
        source: what the message names as the key's origin.
    """
    free = (name for name, hint in known.items() if hint is Any or is_dict(hint))
    if key in known or any(key.startswith(f"{name}.") for name in free):
        return
    if new := next((name for name in OLD_KEYS.get(key, ()) if name in known), None):
        raise ValueError(f"{source}: {key} is now called {new}")
    near = nearest_keys(key, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"{source}: {key} is unknown; {hint}--help shows all keys")


def hint_of(key: str, known: dict[str, Any]) -> Any:
    """The declared type of a dotted key, of one inside a dict as well.

    Args:
        key: dotted key.
        known: dotted key -> declared type.
    """
    if key in known or not key:
        return known.get(key, Any)
    table, _, entry = key.rpartition(".")
    around = hint_of(table, known)
    if is_dataclass(around):
        return get_type_hints(around).get(entry, Any)
    return (get_args(around) or (Any,))[-1] if is_dict(around) else Any


def is_dict(hint: Any) -> bool:
    """Whether a declared type is a dict of free keys."""
    return dict in (hint, get_origin(hint))


def is_table(hint: Any) -> bool:
    """Whether a declared type is a dict of rows: of dicts, or of groups of keys."""
    rows = (get_args(hint) or (Any,))[-1] if is_dict(hint) else Any
    return is_dict(rows) or is_dataclass(rows)


def describe(hint: Any) -> str:
    """A declared type, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(choice) or repr(choice) for choice in get_args(hint))}"
    if is_dataclass(hint):
        return f"a group of keys ({', '.join(entry.name for entry in fields(hint))})"
    return (
        hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    )


def nearest_keys(key: str, known: Mapping[str, Any]) -> list[str]:
    """Keys of the same name in other groups, else at most three of its group, or of all, with a like name.

    Args:
        key: dotted key that is unknown.
        known: dotted keys.
    """
    group, _, name = key.rpartition(".")
    names = [(*other.rpartition(".")[::2], other) for other in known]
    same = [other for _, last, other in names if last == name]
    of_group = {last: other for prefix, last, other in names if prefix == group}
    of_all = {last: other for _, last, other in names} | of_group
    for found in (of_group, of_all):
        same = same or [found[last] for last in get_close_matches(name, found, n=3, cutoff=0.7)]
    return same or get_close_matches(key, known, n=1)
