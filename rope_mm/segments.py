"""What a sequence holds: text, images, videos and sound, each a raster of tokens on the axes (t, y, x)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from math import ceil

from rope_mm.registry import Choice


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind; its sizes are whole numbers, every one at least 1."""

    def __post_init__(self):
        for name, size in zip(self.names(), self.sizes, strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be a whole number >= 1, not {size!r}")

    @classmethod
    def names(cls) -> list[str]:
        """Names of the sizes."""
        return [field.name for field in fields(cls) if field.name != "seconds"]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens along each of its directions."""
        return tuple(getattr(self, name) for name in self.names())

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes along t, y and x; tokens run through it in raster order, x fastest."""
        t, y, x = (1,) * (3 - len(self.sizes)) + self.sizes
        return t, y, x

    @property
    def tokens(self) -> int:
        """How many there are."""
        t, y, x = self.grid
        return t * y * x

    def __str__(self) -> str:
        name, sizes = type(self).__name__.lower(), "x".join(map(str, self.sizes))
        pace = getattr(self, "seconds", 1.0)
        return f"{name}:{sizes}" + (f"@{pace}" if pace != 1.0 else "")


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
    """t frames of y rows and x columns of patches, `seconds` from one frame to the next."""

    t: int
    y: int
    x: int
    seconds: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"{type(self).__name__}: seconds must be a number > 0, not {self.seconds!r}")


@dataclass(frozen=True)
class Frames(Video):
    """t more frames of the video that came just before: what one longer video would have held."""


@dataclass(frozen=True)
class Audio(Segment):
    """Tokens of sound, 40 ms each."""

    length: int


@dataclass(frozen=True)
class Sound(Audio):
    """Tokens of sound that goes with the video just before, from where its earlier sound stopped."""


@dataclass(frozen=True)
class Still(Segment):
    """Tokens that are not rotated and not counted, such as class and register tokens."""

    length: int


KINDS = Choice(
    "segment", {kind.__name__.lower(): kind for kind in (Text, Image, Video, Frames, Audio, Sound, Still)}
)


def stamped(video: Video, words: int) -> list[Segment]:
    """A video as pictures, each after the words of its timestamp (Qwen3-VL, GLM-4.1V)."""
    return [Text(words), Image(video.y, video.x)] * video.t


def due(second: float, pace: float) -> int:
    """How many of what comes every `pace` seconds have begun before this second, whatever rounding adds."""
    return ceil(second / pace - 1e-9)


def film(video: Video, sound: int, chunk: float = 2.0) -> list[Segment]:
    """A video and its sound tokens in chunks of seconds, in each the frames first (Qwen2.5-Omni)."""
    length = max(video.t * video.seconds, sound * 0.04)
    cuts = [number * chunk for number in range(ceil(length / chunk) + 1)]
    story: list[Segment] = []
    for start, end in pairwise(cuts):
        frames = range(video.t)[due(start, video.seconds) : due(end, video.seconds)]
        tokens = range(sound)[due(start, 0.04) : due(end, 0.04)]
        kind = Frames if start else Video
        story += [kind(len(frames), video.y, video.x, video.seconds)] if frames else []
        story += [Sound(len(tokens))] if tokens else []
    return story


def story_of(kinds: Sequence[int], seen: dict[int, list[Segment]]) -> list[Segment]:
    """The story of tokens of these kinds: words where 0, elsewhere what was `seen` of the kind, in turn.

    Pictures are taken out of their lists. A video's frames may have words between them.

    Raises:
        ValueError: a run of tokens that pictures do not fill.
    """
    story: list[Segment] = []
    for kind, tokens in groupby(kinds):
        run = len(list(tokens))
        while run:
            waiting: list[Segment] = seen[kind] if kind else [Text(run)]
            now = waiting.pop(0) if waiting else None
            if isinstance(now, Video) and now.y * now.x == run < now.tokens:
                waiting.insert(0, Video(now.t - 1, now.y, now.x, now.seconds))
                now = Image(now.y, now.x)
            if now is None or now.tokens > run:
                needed = f"{now} needs {now.tokens}" if now else "no grid is left for them"
                raise ValueError(
                    f"{run} image or video tokens stand in a row, but {needed}; give the grids with which "
                    "the processor laid the tokens out"
                )
            story.append(now)
            run -= now.tokens
    return story


def parse_segments(story: str) -> list[Segment]:
    """Read "text:5 image:2x3 video:4x2x2@0.5"; `" ".join(map(str, segments))` writes it back.

    Raises:
        ValueError: where a word is no segment, with the form that is.
    """
    segments = []
    for word in story.split():
        match = re.fullmatch(r"([a-z]+):(\d+(?:x\d+)*)(?:@([\d.e+-]+))?", word)
        if not match:
            raise ValueError(f"{word!r} is not a segment; write text:N, image:YxX or video:TxYxX[@SECONDS]")
        kind, sizes = KINDS[match[1]], match[2].split("x")
        if len(sizes) != len(kind.names()):
            wanted = " x ".join(kind.names())
            raise ValueError(f"{word!r} has {len(sizes)} sizes, but {match[1]} takes {wanted}")
        if match[3] and not issubclass(kind, Video):
            raise ValueError(f"{word!r} has a pace, @{match[3]}, but only a video has frames to pace")
        pace = {"seconds": float(match[3])} if match[3] else {}
        segments.append(kind(*map(int, sizes), **pace))
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
