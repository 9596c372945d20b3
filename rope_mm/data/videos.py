"""Anything that `datasets` loads -> captioned clips as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy
import torch
from datasets import Dataset
from PIL import Image as Picture
from torch import Tensor

from rope_mm.data.images import (
    MODES,
    UNREADABLE,
    check_rows,
    load_splits,
    open_image,
    read_captions,
    read_labels,
    resize_center_crop,
)

Pick = Callable[[int], list[int]]
Reader = Callable[[Any, Pick], list[Picture.Image]]


class CaptionedVideos:
    """Rows of a split as clips in [-1, 1] (b, t, ch, size, size), captions, labels where there is a column.

    A column holds lists of images, arrays (t, ch, y, x) of 0 to 255, or video files, which torchcodec reads.
    `frames` are taken of each, evenly from the first to the last; 0 takes all. A frame of another shape is
    cropped to a centred square and resized.

    Raises:
        ValueError: a column that is missing, with those there are, or that holds no clips.
    """

    def __init__(
        self,
        rows: Dataset,
        size: int,
        channels: int,
        frames: int = 4,
        clip: str = "frames",
        caption: str = "caption",
        label: str = "",
    ):
        check_rows(rows, channels, clip, caption, label)
        if frames < 0:
            raise ValueError(f"frames must be 0 (all) or more, not {frames}")
        self.captions = read_captions(rows[caption], caption)
        self.labels = read_labels(rows[label], label) if label else None
        self.read, stored = choose_reader(rows.features[clip], clip)
        # undecoded, so that a clip which cannot be read is named by its row
        self.rows = rows.cast_column(clip, stored)
        self.size, self.channels, self.frames = size, channels, frames
        self.clip = clip

    def __len__(self) -> int:
        return len(self.rows)

    def clips(self, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Clips (b, t, ch, size, size) in [-1, 1]; all of them if no indices are given.

        Raises:
            ValueError: a clip that cannot be decoded or is too short, with its row; different lengths.
        """
        wanted = list(range(len(self))) if indices is None else [int(i) for i in indices]
        stored = self.rows[wanted][self.clip]
        clips = [self.decode(row, clip) for row, clip in zip(wanted, stored, strict=True)]
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            few, many = lengths[0], lengths[-1]
            raise ValueError(f"these clips have {few} to {many} frames; take the same number of each")
        return torch.stack(clips) / 127.5 - 1

    def decode(self, row: int, stored: Any) -> Tensor:
        """Pixels (t, ch, size, size) of one clip, uint8."""
        try:
            pictures = self.read(stored, self.pick)
            return torch.stack(
                [resize_center_crop(picture, self.size, self.channels) for picture in pictures]
            )
        # torchcodec raises RuntimeError
        except (*UNREADABLE, RuntimeError) as error:
            message = f"row {row}, column {self.clip!r}: the clip does not decode ({error})"
            raise ValueError(message.splitlines()[0]) from error

    def pick(self, total: int) -> list[int]:
        """Which of a clip's frames are taken."""
        if total < max(self.frames, 1):
            raise ValueError(f"it has {total} frames, not the {max(self.frames, 1)} to take")
        return torch.linspace(0, total - 1, self.frames or total).round().long().tolist()


def choose_reader(feature: Any, column: str) -> tuple[Reader, Any]:
    """How to read the clips of a column, and the column's type when its files are left undecoded.

    Raises:
        ValueError: a column without clips, or video files without torchcodec.
    """
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
        f"column {column!r} holds {feature}, not lists of images, arrays (t, ch, y, x) or videos"
    )


def read_images(stored: list[dict], pick: Pick) -> list[Picture.Image]:
    """Frames of a list of images."""
    return [open_image(stored[frame]) for frame in pick(len(stored))]


def read_array(stored: Any, pick: Pick) -> list[Picture.Image]:
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
    return [Picture.fromarray(frame.squeeze(2) if frame.shape[2] == 1 else frame) for frame in frames]


def video_reader(column: str) -> Reader:
    """A reader of video files.

    Raises:
        ValueError: torchcodec or its libraries are missing.
    """
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError) as error:
        reason = f"column {column!r} holds videos, which torchcodec reads: pip install rope-mm[video]"
        raise ValueError(f"{reason} ({error})".splitlines()[0]) from error
    return partial(read_video, VideoDecoder)


def read_video(decoder: Callable[[Any], Any], stored: dict, pick: Pick) -> list[Picture.Image]:
    """Frames of a video file."""
    video = decoder(stored["bytes"] or stored["path"])
    return read_array(video.get_frames_at(pick(len(video))).data, take_all)


def take_all(total: int) -> list[int]:
    """All of a clip's frames."""
    return list(range(total))


def load_videos(
    path: str = "videos",
    size: int = 16,
    channels: int = 3,
    frames: int = 4,
    clip: str = "frames",
    caption: str = "caption",
    label: str = "",
) -> tuple[CaptionedVideos, CaptionedVideos]:
    """Train and test clips of a source; see `load_splits` and `CaptionedVideos`."""
    splits, columns = load_splits(path), (frames, clip, caption, label)
    return (
        CaptionedVideos(splits["train"], size, channels, *columns),
        CaptionedVideos(splits["test"], size, channels, *columns),
    )
