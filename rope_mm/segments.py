"""What a sequence holds: text, images, videos and sound, each a raster of tokens on the axes (t, y, x)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from math import ceil

from rope_mm.registry import Registry


def type_name(kind: type) -> str:
    """A segment type in the text form of segments: MoreFrames is more_frames."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


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
        name, sizes = type_name(type(self)), "x".join(map(str, self.sizes))
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
class MoreFrames(Video):
    """t more frames of the video that came just before: what one longer video would have held."""


@dataclass(frozen=True)
class Audio(Segment):
    """Tokens of sound, 40 ms each."""

    length: int


@dataclass(frozen=True)
class VideoAudio(Audio):
    """Tokens of sound that goes with the video just before, from where its earlier sound stopped."""


@dataclass(frozen=True)
class Unrotated(Segment):
    """Tokens that are not rotated and not counted, such as class and register tokens."""

    length: int


SEGMENT_TYPES = Registry(
    "segment",
    {type_name(kind): kind for kind in (Text, Image, Video, MoreFrames, Audio, VideoAudio, Unrotated)},
)


def timestamped_frames(video: Video, words: int) -> list[Segment]:
    """A video as pictures, each after the words of its timestamp (Qwen3-VL, GLM-4.1V)."""
    return [Text(words), Image(video.y, video.x)] * video.t


def count_before(second: float, pace: float) -> int:
    """How many of what comes every `pace` seconds have begun before this second, whatever rounding adds."""
    return ceil(second / pace - 1e-9)


def interleave_audio(video: Video, sound: int, chunk: float = 2.0) -> list[Segment]:
    """A video and its sound tokens in chunks of seconds, in each the frames first (Qwen2.5-Omni)."""
    length = max(video.t * video.seconds, sound * 0.04)
    cuts = [number * chunk for number in range(ceil(length / chunk) + 1)]
    story: list[Segment] = []
    for start, end in pairwise(cuts):
        frames = range(video.t)[count_before(start, video.seconds) : count_before(end, video.seconds)]
        tokens = range(sound)[count_before(start, 0.04) : count_before(end, 0.04)]
        kind = MoreFrames if start else Video
        story += [kind(len(frames), video.y, video.x, video.seconds)] if frames else []
        story += [VideoAudio(len(tokens))] if tokens else []
    return story


def segments_from_token_types(kinds: Sequence[int], seen: dict[int, list[Segment]]) -> list[Segment]:
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
        match = re.fullmatch(r"([a-z_]+):(\d+(?:x\d+)*)(?:@([\d.e+-]+))?", word)
        if not match:
            raise ValueError(f"{word!r} is not a segment; write text:N, image:YxX or video:TxYxX[@SECONDS]")
        kind, sizes = SEGMENT_TYPES[match[1]], match[2].split("x")
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
