"""A choice is a dict: name -> entry, and an unknown name is answered with the names there are."""

from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """A dict whose missing key raises a ValueError that names the nearest key and all the others."""

    def __init__(self, what: str, entries: dict[str, Entry]):
        super().__init__(entries)
        self.what = what

    def __missing__(self, key: str) -> Entry:
        near = get_close_matches(str(key), self, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{self.what} {key!r} is unknown; {hint}there are: {', '.join(sorted(self))}")
