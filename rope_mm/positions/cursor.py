"""Where a sequence of segments stopped, so that `place` can go on there."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from rope_mm.checks.fields import Count, Position, Positive, String, WholeNumber, check_fields


@dataclass(frozen=True)
class OpenVideo:
    """The video that more frames or its audio would go on with.

    Attributes:
        start: the cursor's `next` before the video.
        t: frames so far.
        y: rows of patches in a frame.
        x: columns of patches in a frame.
        seconds_per_frame: seconds from one frame to the next.
        audio_tokens: tokens of its audio so far.
    """

    start: Position
    t: Count
    y: Count
    x: Count
    seconds_per_frame: Positive = 1.0
    audio_tokens: WholeNumber = 0

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Cursor:
    """Where a sequence stopped: given back to `place`, the sequence goes on with the same numbers.

    `Cursor()` is the start of any sequence. `dataclasses.asdict` makes a dict for JSON, `Cursor(**dict)`
    reads it.

    Attributes:
        next: position of the next text token.
        tokens: number of tokens before it.
        images: number of images and videos before it.
        layout: the layout that counted, with its options; "" before the first segment.
        video: the video that stands last, if one does.
    """

    next: Position = 0.0
    tokens: WholeNumber = 0
    images: WholeNumber = 0
    layout: Annotated[str, String()] = ""
    video: OpenVideo | None = None

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "video", read_video(self.video))


def read_video(video: Any) -> OpenVideo | None:
    """The video of a cursor, from one or from its dict, as JSON holds it.

    Raises:
        ValueError: what is neither.
    """
    if video is None or isinstance(video, OpenVideo):
        return video
    try:
        return OpenVideo(**video)
    except TypeError:
        known = ", ".join(field.name for field in fields(OpenVideo))
        raise ValueError(
            f"Cursor: video must be an OpenVideo or a dict of its {known}, not {video!r}"
        ) from None
