"""A registry: a dict of named entries that answers an unknown name with the nearest names that there are."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")

MOST_LISTED = 16  # names that a message lists; of more it names the nearest


class Registry(dict[str, Entry]):
    """A dict whose missing key raises a ValueError that names the nearest keys, and all where they are few.

    Args:
        kind: what an entry is, in the message: "scheme".
        entries: name -> entry.
        aliases: other name -> name; an alias is looked up like its name and is not listed.
        listing: where all names are listed, for a message that has no room for them.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str] | None = None,
        listing: str = "",
    ):
        super().__init__(entries)
        self.kind, self.listing = kind, listing
        self.aliases = dict(aliases or {})

    def __getitem__(self, key: str) -> Entry:
        try:
            return super().__getitem__(key)
        except TypeError:  # a list, a dict: no name
            raise ValueError(self.refusal(key)) from None

    def __missing__(self, key: str) -> Entry:
        if key in self.aliases:
            return self[self.aliases[key]]
        raise ValueError(self.refusal(key))

    def refusal(self, key: object) -> str:
        """The message for a key that is not there."""
        few = len(self) <= MOST_LISTED or not self.listing
        near = self.nearest(str(key).lower(), 1 if few else 3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        rest = f"there are: {', '.join(sorted(self))}" if few else f"{self.listing} lists all {len(self)}"
        return f"{self.kind} {key!r} is unknown; {hint}{rest}"

    def nearest(self, key: str, most: int = 1) -> list[str]:
        """Names and aliases that contain the key, else the nearest in spelling, else those sharing a word."""
        names = [*self, *self.aliases]
        containing = [name for name in names if len(key) > 2 and key in name]
        words = [word for word in key.replace("_", "-").split("-") if len(word) > 2]
        sharing = [name for name in names if any(word in name for word in words)]
        close = get_close_matches(key, names, n=most)
        # of many names three are worth a look, however far they are
        far = get_close_matches(key, names, n=most, cutoff=0.1) if most > 1 else []
        return containing[:3] or close or sharing[:3] or far
