"""Anything that `datasets` loads -> captioned videos as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy
import torch
from datasets import Dataset
from PIL import Image as PILImage
from torch import Tensor

from rope_mm.data.columns import check_rows, read_captions, read_labels
from rope_mm.data.images import load_splits
from rope_mm.data.pixels import (
    BACKGROUND,
    MODES,
    UNREADABLE,
    check_background,
    open_file,
    open_image,
    resize_center_crop,
)
from rope_mm.data.video_files import import_av, read_video_file

Pick = Callable[[int], list[int]]
Reader = Callable[[Any, Pick], list[PILImage.Image]]


class CaptionedVideos:
    """Rows of a split as videos in [-1, 1], captions, and labels where there is a column.

    A frame of another shape is cropped around its centre and resized.

    Args:
        rows: of `datasets`.
        size: y and x in pixels, or the side of a square.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        frames: how many of each video, evenly from the first to the last; 0 takes all.
        video: name of the column of lists of images, animated images, arrays (t, ch, y, x) of 0 to 255, or
            video files, which PyAV reads.
        caption: name of the column of captions.
        label: name of the column of labels, if any.
        background: the colour under what is transparent, where channels is 1 or 3.

    Raises:
        ValueError: a column that is missing, with those there are, or that holds no videos.
    """

    def __init__(
        self,
        rows: Dataset,
        size: int | tuple[int, int],
        channels: int,
        frames: int = 4,
        video: str = "frames",
        caption: str = "caption",
        label: str = "",
        background: str = BACKGROUND,
    ):
        check_rows(rows, channels, video, caption, label)
        check_background(background)
        if frames < 0:
            raise ValueError(f"frames must be 0 (all) or more, not {frames}")
        self.captions = [texts[0] for texts in read_captions(rows, caption)]
        self.labels = read_labels(rows, label) if label else None
        self.read, stored = choose_reader(rows.features[video], video)
        # undecoded, so that a video which cannot be read is named by its row
        self.rows = rows.cast_column(video, stored)
        self.size, self.channels, self.background = size, channels, background
        self.frames, self.video = frames, video

    def __len__(self) -> int:
        return len(self.rows)

    def videos(self, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Videos (b, t, ch, y, x) in [-1, 1]; all of them if no indices are given.

        Raises:
            ValueError: a video that cannot be decoded or is too short, with its row; different lengths.
        """
        wanted = list(range(len(self))) if indices is None else [int(i) for i in indices]
        stored = self.rows[wanted][self.video]
        videos = [self.decode(row, video) for row, video in zip(wanted, stored, strict=True)]
        lengths = sorted({len(video) for video in videos})
        if len(lengths) > 1:
            few, many = lengths[0], lengths[-1]
            raise ValueError(f"these videos have {few} to {many} frames; take the same number of each")
        return torch.stack(videos) / 127.5 - 1

    def decode(self, row: int, stored: Any) -> Tensor:
        """Pixels (t, ch, y, x) of one video, uint8."""
        try:
            frames = self.read(stored, self.pick)
            return torch.stack(
                [resize_center_crop(frame, self.size, self.channels, self.background) for frame in frames]
            )
        except UNREADABLE as error:
            message = f"row {row}, column {self.video!r}: the video does not decode ({error})"
            raise ValueError(message.splitlines()[0]) from error

    def pick(self, total: int) -> list[int]:
        """Which of a video's frames are taken."""
        if total < max(self.frames, 1):
            raise ValueError(f"it has {total} frames, not the {max(self.frames, 1)} to take")
        return torch.linspace(0, total - 1, self.frames or total).round().long().tolist()


def choose_reader(feature: Any, column: str) -> tuple[Reader, Any]:
    """How to read the videos of a column, and the column's type when its files are left undecoded.

    Raises:
        ValueError: a column without videos, or video files without PyAV.
    """
    if isinstance(feature, datasets.Image):
        return read_animation, datasets.Image(decode=False)
    if isinstance(feature, datasets.Video):
        return video_reader(column), datasets.Video(decode=False)
    within = getattr(feature, "feature", None)
    if isinstance(within, datasets.Image):
        return read_images, replace(feature, feature=datasets.Image(decode=False))
    depth = 0
    while isinstance(within, datasets.List):
        within, depth = within.feature, depth + 1
    if isinstance(feature, datasets.Array4D) or (depth == 3 and isinstance(within, datasets.Value)):
        return read_array, feature
    raise ValueError(
        f"column {column!r} holds {feature}, not lists of images, animations, arrays (t, ch, y, x) or videos"
    )


def read_images(stored: list[dict], pick: Pick) -> list[PILImage.Image]:
    """Frames of a list of images."""
    return [open_image(stored[frame]) for frame in pick(len(stored))]


def read_animation(stored: dict, pick: Pick) -> list[PILImage.Image]:
    """Frames of an animated image."""
    image, frames = open_file(stored), []
    for frame in pick(getattr(image, "n_frames", 1)):
        image.seek(frame)
        frames.append(image.copy())
    return frames


def read_array(stored: Any, pick: Pick) -> list[PILImage.Image]:
    """Frames of an array (t, ch, y, x).

    Raises:
        ValueError: another shape, or other values than whole numbers in 0 to 255.
    """
    array = numpy.asarray(stored)
    if array.ndim != 4 or array.shape[1] not in MODES:
        raise ValueError(
            f"it must be (t, ch, y, x) with {', '.join(map(str, MODES))} channels: {array.shape}"
        )
    if not numpy.issubdtype(array.dtype, numpy.integer) or array.min() < 0 or array.max() > 255:
        raise ValueError("its values must be whole numbers in 0 to 255")
    frames = array[pick(len(array))].astype("uint8").transpose(0, 2, 3, 1)
    return [PILImage.fromarray(frame.squeeze(2) if frame.shape[2] == 1 else frame) for frame in frames]


def video_reader(column: str) -> Reader:
    """A reader of video files.

    Raises:
        ValueError: PyAV is missing.
    """
    try:
        import_av()
    except ImportError as error:
        raise ValueError(f"column {column!r} holds videos, which PyAV reads: {error}") from error
    return read_video_file


def take_all(total: int) -> list[int]:
    """All of a video's frames."""
    return list(range(total))


def load_videos(
    path: str = "videos",
    size: int | tuple[int, int] = 16,
    channels: int = 3,
    frames: int = 4,
    video: str = "frames",
    caption: str = "caption",
    label: str = "",
    background: str = BACKGROUND,
) -> tuple[CaptionedVideos, CaptionedVideos]:
    """Train and test videos of a source.

    Args:
        path: see `load_splits`; all else as of `CaptionedVideos`.
        size: y and x in pixels, or the side of a square.
        channels: 1, 3 or 4.
        frames: how many of each video; 0 takes all.
        video: name of the column of videos.
        caption: name of the column of captions.
        label: name of the column of labels, if any.
        background: the colour under what is transparent.

    Raises:
        ValueError: as from `load_splits` and `CaptionedVideos`.
    """
    splits, columns = load_splits(path), (frames, video, caption, label, background)
    return (
        CaptionedVideos(splits["train"], size, channels, *columns),
        CaptionedVideos(splits["test"], size, channels, *columns),
    )
