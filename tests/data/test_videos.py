import io
import pickle
import sys

import numpy
import pytest
import torch
from datasets import Array4D, Dataset, Features, Image, List, Value, Video
from PIL import Image as PILImage

from rope_mm.data import VIDEO_FACTORS, CaptionedVideos, captioned_videos, load_videos
from rope_mm.data.videos import choose_reader
from rope_mm.evaluation.sprites import classify_videos

FRAMES = torch.arange(2 * 5 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(2, 5, 3, 8, 8)
CAPTIONS = ["one", "two"]


def images_of(video):
    return [PILImage.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]


def as_images():
    features = Features(frames=List(Image()), caption=Value("string"))
    return Dataset.from_dict({"frames": [images_of(clip) for clip in FRAMES], "caption": CAPTIONS}, features)


def as_array(kind=None):
    columns = {"frames": FRAMES.tolist(), "caption": CAPTIONS}
    return Dataset.from_dict(columns, kind and Features(frames=kind, caption=Value("string")))


def as_videos(*files):
    columns = {"frames": [{"bytes": file, "path": None} for file in files], "caption": CAPTIONS}
    return Dataset.from_dict(
        columns, Features(frames=Video(decode=False), caption=Value("string"))
    ).cast_column("frames", Video())


@pytest.mark.parametrize(
    "make",
    [
        as_images,
        as_array,
        lambda: as_array(Array4D((5, 3, 8, 8), "uint8")),
        lambda: as_array(Array4D((None, 3, 8, 8), "uint8")),
    ],
    ids=["images", "lists", "array", "any length"],
)
def test_a_video_has_the_same_pixels_from_every_kind_of_column(make):
    check_pixels(make)


def test_a_video_file_has_its_pixels(video_file):
    check_pixels(lambda: as_videos(*map(video_file, FRAMES)))


def check_pixels(make):
    loaded = CaptionedVideos(make(), 8, 3, frames=0)
    torch.testing.assert_close(loaded.videos(), FRAMES / 127.5 - 1, atol=0, rtol=0)
    assert (len(loaded), loaded.captions, loaded.labels) == (2, CAPTIONS, None)
    thinned = CaptionedVideos(make(), 8, 3, frames=3).videos([1])
    torch.testing.assert_close(thinned, FRAMES[1:, [0, 2, 4]] / 127.5 - 1, atol=0, rtol=0)


def test_a_reader_of_videos_goes_to_a_process_that_is_spawned(video_file):
    stored = {"bytes": video_file(FRAMES[1]), "path": None}
    read, _ = choose_reader(as_videos(stored["bytes"], b"").features["frames"], "frames")
    first, _ = pickle.loads(pickle.dumps(read))(stored, lambda total: [0, total - 1])
    assert (numpy.asarray(first) == FRAMES[1, 0].permute(1, 2, 0).numpy()).all()


def test_frames_are_cropped_resized_and_made_grey():
    loaded = CaptionedVideos(as_images(), 4, 1, frames=2).videos()
    assert loaded.shape == (2, 2, 1, 4, 4)


def test_rendered_videos_are_loaded_with_what_they_show():
    train, test = load_videos(label="motion")
    assert (len(train), len(test)) == (2048, 512)
    rows = captioned_videos()["test"]
    verdict = classify_videos(test.videos(range(100)))
    for name in VIDEO_FACTORS:
        assert verdict[name].tolist() == rows[name][:100]
    assert test.labels.tolist() == rows["motion"]


def test_video_files_without_their_extra_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError, match=r"'frames' holds videos, .* pip install 'rope-mm\[video\]'"
    ) as error:
        CaptionedVideos(as_videos(b"", b""), 8, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"no video", b""], ids=["text", "nothing"])
def test_a_video_that_does_not_decode_is_named_by_its_row(content, video_file):
    rows = as_videos(video_file(FRAMES[0]), content)
    with pytest.raises(ValueError, match="row 1, column 'frames': the video does not decode") as error:
        CaptionedVideos(rows, 8, 3).videos()
    assert "\n" not in str(error.value)


def rows_of(frames):
    return Dataset.from_dict({"frames": [frames], "caption": ["one"]})


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (FRAMES[0, :2].tolist(), "row 0, column 'frames': .*it has 2 frames, not the 4 to take"),
        (FRAMES[0, :, :2].tolist(), r"1, 3, 4 channels: \(5, 2, 8, 8\)"),
        ((FRAMES[0].long() + 100).tolist(), "whole numbers in 0 to 255"),
        ((FRAMES[0] / 255).tolist(), "whole numbers in 0 to 255"),
    ],
    ids=["short", "channels", "range", "fractions"],
)
def test_an_array_that_is_no_video_is_named_by_its_row(frames, words):
    with pytest.raises(ValueError, match=words):
        CaptionedVideos(rows_of(frames), 8, 3).videos()


def test_frames_of_animated_images_make_videos():
    content = io.BytesIO()
    frames = [PILImage.new("L", (8, 8), grey) for grey in (0, 100, 200)]
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:])
    held = {"frames": [{"bytes": content.getvalue(), "path": None}], "caption": ["one"]}
    rows = Dataset.from_dict(held, features=Features(frames=Image(), caption=Value("string")))
    loaded = CaptionedVideos(rows, 8, 1, frames=0).videos()
    assert ((loaded[0, :, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 100, 200]


def test_columns_without_videos_and_numbers_of_no_frames_are_refused():
    with pytest.raises(ValueError, match=r"column 'frames' holds .*, not lists of images"):
        CaptionedVideos(rows_of(1), 8, 3)
    with pytest.raises(ValueError, match=r"column 'frames' holds .*, not lists of images"):
        CaptionedVideos(rows_of(numpy.zeros((3, 8, 8), int).tolist()), 8, 3)
    with pytest.raises(ValueError, match="no column 'clip'; it has frames, caption"):
        CaptionedVideos(rows_of(1), 8, 3, video="clip")
    with pytest.raises(ValueError, match=r"frames must be 0 \(all\) or more, not -1"):
        CaptionedVideos(as_images(), 8, 3, frames=-1)


def test_videos_of_different_lengths_make_no_batch():
    columns = {"frames": [FRAMES[0].tolist(), FRAMES[1, :3].tolist()], "caption": CAPTIONS}
    loaded = CaptionedVideos(Dataset.from_dict(columns), 8, 3, frames=0)
    assert loaded.videos([1]).shape[1] == 3
    with pytest.raises(ValueError, match="these videos have 3 to 5 frames"):
        loaded.videos()
