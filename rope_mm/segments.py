"""What a sequence holds: text, images and videos, each a raster of tokens on the axes (t, y, x)."""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from rope_mm.choice import Choice


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind; its fields are its sizes, every one at least 1."""

    def __post_init__(self):
        for name, size in zip(self.__dataclass_fields__, astuple(self), strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be a whole number >= 1, not {size!r}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes along t, y and x; tokens run through it in raster order, x fastest."""
        t, y, x = (1,) * (3 - len(astuple(self))) + astuple(self)
        return t, y, x

    @property
    def tokens(self) -> int:
        """How many there are."""
        t, y, x = self.grid
        return t * y * x

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}:{'x'.join(map(str, astuple(self)))}"


@dataclass(frozen=True)
class Text(Segment):
    """Words, one after another."""

    length: int


@dataclass(frozen=True)
class Image(Segment):
    """One picture of y rows and x columns of patches."""

    y: int
    x: int


@dataclass(frozen=True)
class Video(Segment):
    """t frames of y rows and x columns of patches."""

    t: int
    y: int
    x: int


KINDS = Choice("segment", {kind.__name__.lower(): kind for kind in (Text, Image, Video)})


def parse_segments(story: str) -> list[Segment]:
    """Read "text:5 image:2x3 video:4x2x2"; `" ".join(map(str, segments))` writes it back.

    Raises:
        ValueError: where a word is no segment, with the form that is.
    """
    segments = []
    for word in story.split():
        match = re.fullmatch(r"([a-z]+):(\d+(?:x\d+)*)", word)
        if not match:
            raise ValueError(f"{word!r} is not a segment; write text:N, image:YxX or video:TxYxX")
        kind, sizes = KINDS[match[1]], match[2].split("x")
        if len(sizes) != len(kind.__dataclass_fields__):
            wanted = " x ".join(kind.__dataclass_fields__)
            raise ValueError(f"{word!r} has {len(sizes)} sizes, but {match[1]} takes {wanted}")
        segments.append(kind(*map(int, sizes)))
    return segments


def read_segments(story: str | Sequence[Segment]) -> list[Segment]:
    """Segments from a list of them or from their text form.

    Raises:
        ValueError: where an entry is not a segment.
    """
    segments = parse_segments(story) if isinstance(story, str) else list(story)
    for entry in segments:
        if not isinstance(entry, Segment):
            raise ValueError(f"a story holds Text, Image and Video segments, not {entry!r}")
    return segments
