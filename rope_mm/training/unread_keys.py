"""Keys that are set although nothing reads them: they would change nothing, and nobody would notice."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from functools import reduce
from typing import Any, TypeVar

Config = TypeVar("Config")
Unread = Mapping[str, str]  # dotted key, of a group too -> why nothing reads it


def refuse_unread(config: Any, unread: Unread) -> None:
    """Refuse a key that nothing reads and that has another value than its default.

    Args:
        config: a dataclass whose fields all have defaults.
        unread: the keys that nothing reads in this configuration, with the reason.

    Raises:
        ValueError: with the key, its value, the reason and the default.
    """
    for key, reason in unread.items():
        for name, value, default in changed_keys(key, find(config, key), find(type(config)(), key)):
            raise ValueError(
                f"{name} {show(value)} would change nothing: {reason}; remove it, or give --{name} "
                f"{show(default)}, its default"
            )


def reset_unread(config: Config, unread: Unread) -> Config:
    """The configuration with the default of every key that nothing reads.

    Args:
        config: a dataclass whose fields all have defaults.
        unread: see `refuse_unread`.
    """
    for key in unread:
        config = put(config, key.split("."), find(type(config)(), key))
    return config


def changed_keys(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """The keys of a group, or the one key, whose value is not the default: name, value, default.

    Args:
        key: dotted.
        value: of the key; a group is a dataclass.
        default: of the same kind.
    """
    if is_dataclass(value):
        for name, part in vars(value).items():
            yield from changed_keys(f"{key}.{name}", part, getattr(default, name))
    elif value != default:
        yield key, value, default


def find(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def put(config: Any, path: list[str], value: Any) -> Any:
    """The configuration with another value at the end of a path of names."""
    name, *rest = path
    return replace(config, **{name: put(getattr(config, name), rest, value) if rest else value})


def show(value: Any) -> str:
    """A value as a flag spells it."""
    if isinstance(value, Mapping):
        return "'{" + ", ".join(f"{name}: {show(part)}" for name, part in value.items()) + "}'"
    if isinstance(value, list | tuple):
        return "'[" + ", ".join(map(show, value)) + "]'"
    words = {type(None): "null", bool: str(value).lower()}
    return words.get(type(value), str(value) or "''")
