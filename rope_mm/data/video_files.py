"""Video files, read and written by PyAV (extra `video`), whose packages bring FFmpeg's libraries along."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from rope_mm.checks.extras import extra
from rope_mm.data.pixels import MODES, read_file, to_image
from rope_mm.files import write_file

VIDEO_ENDS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # of files that are read
MP4 = ".mp4"  # of files that are written
SECONDS_PER_FRAME = Fraction(1, 4)  # of what is written


def import_av() -> Any:
    """PyAV.

    Raises:
        MissingPackage: it is not installed.
    """
    with extra("video"):
        import av  # pyright: ignore[reportMissingImports]
    return av


def read_video_file(stored: Mapping[str, Any], pick: Callable[[int], list[int]]) -> list[PILImage.Image]:
    """Frames of a video file, upright.

    Args:
        stored: {"bytes", "path"}, see `read_file`.
        pick: which frames of how many.

    Raises:
        OSError: what does not decode.
    """
    av, content = import_av(), read_file(stored)
    try:
        wanted = pick(count_packets(av, content))
        frames, found = decode(av, content, wanted)
        if len(frames) < len(set(wanted)):  # some packets hold no frame
            wanted = pick(found)
            frames, _ = decode(av, content, wanted)
    except av.FFmpegError as error:
        raise OSError(f"{error.strerror}: {stored['path'] or 'a video'}") from error
    return [frames[number] for number in wanted]


def count_packets(av: Any, content: Any) -> int:
    """How many packets of a video a file holds, which are its frames with hardly an exception.

    Raises:
        OSError: a file without a video, such as one of sound alone.
    """
    with av.open(content) as file:
        if not file.streams.video:
            raise OSError("the file holds no video")
        return sum(1 for packet in file.demux(video=0) if packet.size)


def decode(av: Any, content: Any, wanted: Sequence[int]) -> tuple[dict[int, PILImage.Image], int]:
    """The frames of these numbers, and how many frames were read.

    Args:
        av: PyAV.
        content: the file.
        wanted: numbers of frames.
    """
    found, count, last = {}, 0, max(wanted, default=-1)
    content.seek(0)
    with av.open(content) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number in wanted:
                image = frame.to_image()
                found[number] = image.rotate(frame.rotation, expand=True) if frame.rotation else image
            count = number + 1
            if number >= last:
                break
    return found, count


def write_video_file(path: Path, frames: Tensor) -> None:
    """Write an MP4 file (H.264) of four frames a second.

    Args:
        path: of the file.
        frames: (t, ch, y, x) in [-1, 1], ch 1, 3 or 4; alpha is composited on white.

    Raises:
        ValueError: an odd side, which H.264 has no pixels for.
    """
    av, (height, width) = import_av(), frames.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"frames of an MP4 file have even sides, not {height} x {width}; write a GIF or WebP"
        )
    images = [to_image(frame).convert(MODES[3]) for frame in frames]

    def write(part: Path) -> None:
        with av.open(str(part), "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=1 / SECONDS_PER_FRAME, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in images:
                file.mux(stream.encode(av.VideoFrame.from_image(image)))
            file.mux(stream.encode())

    write_file(path, write)
