"""What a sequence holds: text, images, videos and audio, each a grid of tokens on the axes (t, y, x)."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise

from rope_mm.checks.fields import Count, Positive, check_fields
from rope_mm.registry import Registry

MOST = 2**31 - 1  # tokens of a segment
AUDIO_STEP = 0.04  # seconds of an audio token
FORMS = "text:N, image:YxX, video:TxYxX@2fps or unrotated:N (a class token is unrotated:1)"


def type_name(kind: type) -> str:
    """A segment type in the text form of segments: MoreFrames is more_frames."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind; its sizes are whole numbers >= 1."""

    def __post_init__(self):
        check_fields(self)
        if self.tokens > MOST:
            raise ValueError(f"{type(self).__name__} of {self.tokens} tokens is too long; {MOST} is the most")

    @classmethod
    def names(cls) -> list[str]:
        """Names of the sizes."""
        return [field.name for field in fields(cls) if field.name != "seconds_per_frame"]

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
        """How many tokens it has."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{type_name(type(self))}:{'x'.join(map(str, self.sizes))}"


@dataclass(frozen=True)
class Text(Segment):
    """Text tokens, one after another.

    Attributes:
        length: number of tokens.
    """

    length: Count


@dataclass(frozen=True)
class Image(Segment):
    """One image.

    Attributes:
        y: rows of patches.
        x: columns of patches.
    """

    y: Count
    x: Count

    @property
    def grid(self) -> tuple[int, int, int]:
        return 1, self.y, self.x


@dataclass(frozen=True)
class Video(Segment):
    """Frames of one video.

    Attributes:
        t: number of frames.
        y: rows of patches in a frame.
        x: columns of patches in a frame.
        seconds_per_frame: seconds from one frame to the next.
    """

    t: Count
    y: Count
    x: Count
    seconds_per_frame: Positive = 1.0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.t, self.y, self.x

    def __str__(self) -> str:
        return super().__str__() + rate_text(self.seconds_per_frame)


@dataclass(frozen=True)
class MoreFrames(Video):
    """t more frames of the video just before: what one longer video would have held."""


@dataclass(frozen=True)
class Audio(Segment):
    """Audio tokens of 40 ms each.

    Attributes:
        length: number of tokens.
    """

    length: Count


@dataclass(frozen=True)
class VideoAudio(Audio):
    """Audio tokens that go with the video just before, from where its earlier audio stopped."""


@dataclass(frozen=True)
class Unrotated(Segment):
    """Tokens that are not rotated and not counted, such as class and register tokens.

    Attributes:
        length: number of tokens.
    """

    length: Count


SEGMENT_TYPES: Registry[type[Segment]] = Registry(
    "segment",
    {type_name(kind): kind for kind in (Text, Image, Video, MoreFrames, Audio, VideoAudio, Unrotated)},
)
OTHER_NAMES = {
    **dict.fromkeys(("still", "cls", "class", "class_token", "register", "registers"), "unrotated"),
    **dict.fromkeys(("frames", "frame"), "more_frames"),
    "sound": "video_audio",
}


def timestamped_frames(video: Video, text_tokens: int) -> list[Segment]:
    """A video as images, each after the text of its timestamp (Qwen3-VL, GLM-4.1V).

    Args:
        video: the video.
        text_tokens: tokens of each timestamp.
    """
    return [Text(text_tokens), Image(video.y, video.x)] * video.t


def count_before(second: float, step: float) -> int:
    """How many of what comes every `step` seconds have begun before this second, whatever rounding adds."""
    return math.ceil(second / step - 1e-9)


def interleave_audio(video: Video, audio_tokens: int, chunk: float = 2.0) -> list[Segment]:
    """A video and its audio tokens in chunks of seconds, the frames of each chunk first (Qwen2.5-Omni).

    Args:
        video: the video.
        audio_tokens: tokens of its audio, of 40 ms each.
        chunk: seconds of a chunk.
    """
    every = video.seconds_per_frame
    length = max(video.t * every, audio_tokens * AUDIO_STEP)
    cuts = [number * chunk for number in range(math.ceil(length / chunk) + 1)]
    segments: list[Segment] = []
    for start, end in pairwise(cuts):
        frames = range(video.t)[count_before(start, every) : count_before(end, every)]
        tokens = range(audio_tokens)[count_before(start, AUDIO_STEP) : count_before(end, AUDIO_STEP)]
        kind = MoreFrames if start else Video
        segments += [kind(len(frames), video.y, video.x, every)] if frames else []
        segments += [VideoAudio(len(tokens))] if tokens else []
    return segments


def segments_from_token_types(token_types: Iterable[int], visual: dict[int, list[Segment]]) -> list[Segment]:
    """The segments of a row of tokens: text where the type is 0, elsewhere the images and videos of the type.

    Segments are taken out of the lists. A video's frames may have text between them.

    Args:
        token_types: the type of each token, 0 for text.
        visual: images and videos of each other type, in order.

    Raises:
        ValueError: a run of tokens that images and videos do not fill.
    """
    segments: list[Segment] = []
    for kind, tokens in groupby(map(int, token_types)):
        run = len(list(tokens))
        while run:
            waiting: list[Segment] = visual[kind] if kind else [Text(run)]
            now = waiting.pop(0) if waiting else None
            if isinstance(now, Video) and now.y * now.x == run < now.tokens:
                waiting.insert(0, Video(now.t - 1, now.y, now.x, now.seconds_per_frame))
                now = Image(now.y, now.x)
            if now is None or now.tokens > run:
                needed = f"{now} needs {now.tokens}" if now else "no grid is left for them"
                raise ValueError(
                    f"{run} image or video tokens stand in a row, but {needed}; give the grids with which "
                    "the processor laid the tokens out"
                )
            segments.append(now)
            run -= now.tokens
    return segments


def rate_text(seconds: float) -> str:
    """A frame rate as text: "@2fps", or "@0.7s" where that is not the same; "" for one frame a second."""
    if seconds == 1:
        return ""
    per_second = f"{1 / seconds:g}"
    return f"@{per_second}fps" if seconds < 1 and 1 / float(per_second) == seconds else f"@{seconds!r}s"


def read_rate(word: str, rate: str, kind: type[Segment]) -> dict[str, float]:
    """Seconds per frame from "2fps" or "0.5s".

    Raises:
        ValueError: a rate without a unit, of nothing, or of a segment without frames.
    """
    if not issubclass(kind, Video):
        raise ValueError(f"{word!r} has a frame rate, @{rate}, but only a video has frames")
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)(fps|s)", rate)
    if not match:
        raise ValueError(
            f"{word!r} needs a unit after {rate!r}; write @2fps for frames per second or @0.5s for seconds "
            "per frame"
        )
    number = float(match[1])
    if match[2] == "fps" and number:
        return {"seconds_per_frame": 1 / number}
    return {"seconds_per_frame": number}


def parse_segment(word: str) -> Segment:
    """Read one segment, such as "video:4x2x2@2fps".

    Raises:
        ValueError: a word that is no segment, with the form that is.
    """
    match = re.fullmatch(r"([a-z_]+):(\d+(?:x\d+)*)(?:@(.*))?", word)
    if not match:
        raise ValueError(f"{word!r} is not a segment; write {FORMS}")
    name, sizes = match[1], match[2].split("x")
    if name in OTHER_NAMES:
        raise ValueError(f"{word!r} is not a segment; write {OTHER_NAMES[name]}:{match[2]}")
    kind = SEGMENT_TYPES[name]
    if len(sizes) != len(kind.names()):
        wanted = "N" if kind.names() == ["length"] else "x".join(map(str.upper, kind.names()))
        raise ValueError(f"{word!r} has the wrong number of sizes; write {name}:{wanted}")
    if any(len(size) > 10 for size in sizes):
        raise ValueError(f"{word!r} is too long; {MOST} tokens are the most")
    rate = read_rate(word, match[3], kind) if match[3] is not None else {}
    return kind(*map(int, sizes), **rate)


def parse_segments(text: str) -> list[Segment]:
    """Read "text:5 image:2x3 video:4x2x2@2fps"; `" ".join(map(str, segments))` writes it back.

    After a video's sizes, `@2fps` is its frames per second and `@0.5s` its seconds per frame; without either
    it has one frame a second. A class token is `unrotated:1`.

    Raises:
        ValueError: no text; where a word is no segment, with the form that is.

    Examples:
        >>> parse_segments("text:5 image:2x3")
        [Text(length=5), Image(y=2, x=3)]
    """
    if not isinstance(text, str):
        raise ValueError(f"segments are read from text, such as 'text:5 image:2x3', not from {text!r}")
    return [parse_segment(word) for word in text.split()]


def read_segments(segments: str | Sequence[Segment]) -> list[Segment]:
    """Segments from a list of them or from their text form.

    Raises:
        ValueError: where an entry is not a segment.
    """
    if isinstance(segments, str):
        return parse_segments(segments)
    if isinstance(segments, Segment):
        raise ValueError(f"a sequence is a list of segments; write [{segments!r}]")
    try:
        segments = list(segments)
    except TypeError:  # a tensor () has __iter__, too
        raise ValueError(
            f"a sequence is a list of segments, such as 'text:5 image:2x3', not {segments!r}"
        ) from None
    for entry in segments:
        if not isinstance(entry, Segment):
            raise ValueError(f"a sequence holds segments such as Text(5) and Image(2, 3), not {entry!r}")
    return segments
