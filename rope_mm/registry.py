"""A registry: a dict of named entries that answers an unknown name with the names that there are."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """A dict whose missing key raises a ValueError that names the nearest keys and all the others.

    Args:
        kind: what an entry is, in the message: "scheme".
        entries: name -> entry.
        aliases: other name -> name; an alias is looked up like its name and is not listed.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry], aliases: Mapping[str, str] | None = None):
        super().__init__(entries)
        self.kind = kind
        self.aliases = dict(aliases or {})

    def __missing__(self, key: str) -> Entry:
        if key in self.aliases:
            return self[self.aliases[key]]
        near = self.nearest(str(key).lower())
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"{self.kind} {key!r} is unknown; {hint}there are: {', '.join(sorted(self))}")

    def nearest(self, key: str) -> list[str]:
        """Names and aliases that contain the key, else the nearest in spelling, else those sharing a word."""
        names = [*self, *self.aliases]
        containing = [name for name in names if len(key) > 2 and key in name]
        words = [word for word in key.replace("_", "-").split("-") if len(word) > 2]
        sharing = [name for name in names if any(word in name for word in words)]
        return containing[:3] or get_close_matches(key, names, n=1) or sharing[:3]
