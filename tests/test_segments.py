import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import (
    Audio,
    Image,
    MoreFrames,
    Segment,
    Text,
    Unrotated,
    Video,
    VideoAudio,
    interleave_audio,
    parse_segments,
    timestamped_frames,
)
from rope_mm.segments import MOST, read_segments, segments_from_token_types

SIZES = st.integers(1, 6)
SECONDS = st.sampled_from([1.0, 0.5, 0.04, 2.5, 1 / 3, 0.7, 1 / 29.97])
SEGMENTS = st.one_of(
    *(st.builds(kind, SIZES) for kind in (Text, Audio, VideoAudio, Unrotated)),
    st.builds(Image, SIZES, SIZES),
    *(st.builds(kind, SIZES, SIZES, SIZES, SECONDS) for kind in (Video, MoreFrames)),
)


@given(st.lists(SEGMENTS, max_size=6))
def test_the_text_form_of_segments_reads_back(segments):
    assert parse_segments(" ".join(map(str, segments))) == segments


def test_a_segment_knows_its_grid_and_its_tokens():
    assert all(isinstance(s, Segment) for s in (Text(5), Image(2, 3), Video(4, 2, 3)))
    assert [s.grid for s in (Text(5), Image(2, 3), Video(4, 2, 3))] == [(1, 1, 5), (1, 2, 3), (4, 2, 3)]
    assert [s.tokens for s in (Text(5), Image(2, 3), Video(4, 2, 3))] == [5, 6, 24]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2fps", 0.5), ("0.5fps", 2.0), ("0.5s", 0.5), ("25fps", 0.04), ("1fps", 1.0), ("1e-2s", 0.01)],
)
def test_a_frame_rate_is_frames_per_second_or_seconds_per_frame(text, seconds):
    assert parse_segments(f"video:4x2x2@{text}") == [Video(4, 2, 2, seconds_per_frame=seconds)]


@pytest.mark.parametrize(
    ("segment", "text"),
    [
        (Video(4, 2, 2, 0.5), "video:4x2x2@2fps"),
        (Video(4, 2, 2), "video:4x2x2"),
        (Video(4, 2, 2, 5), "video:4x2x2@5s"),
    ],
)
def test_a_frame_rate_is_written_with_its_unit(segment, text):
    assert str(segment) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "text",
            r"write text:N, image:YxX, video:TxYxX@2fps or unrotated:N \(a class token is unrotated:1\)",
        ),
        ("imag:2x3", "did you mean 'image'"),
        ("still:1", "'still:1' is not a segment; write unrotated:1"),
        ("cls:1", "write unrotated:1"),
        ("frames:1x2x2", "write more_frames:1x2x2"),
        ("image:2x3x4", "'image:2x3x4' has the wrong number of sizes; write image:YxX$"),
        ("image:2", "write image:YxX$"),
        ("video:2x3", "write video:TxYxX$"),
        ("text:2x3", "write text:N$"),
        ("image:0x3", "y must be a whole number >= 1, not 0"),
        ("text:-1", "write text:N"),
        ("image:2x3@2fps", "only a video has frames"),
        ("video:2x2x2@0s", "seconds_per_frame must be a finite number > 0, not 0"),
        ("video:2x2x2@0fps", "seconds_per_frame must be a finite number > 0, not 0"),
        ("video:2x2x2@0.5", "needs a unit after '0.5'; write @2fps for frames per second or @0.5s"),
        ("video:2x2x2@", "needs a unit"),
        ("video:2x2x2@infs", "needs a unit"),
        ("text:99999999999999999999", f"too long; {MOST} tokens are the most"),
        ("image:99999x99999", f"Image of 9999800001 tokens is too long; {MOST} is the most"),
    ],
)
def test_a_word_that_is_no_segment_is_refused_with_the_form_that_is(text, message):
    with pytest.raises(ValueError, match=message):
        parse_segments(text)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "3", None])
def test_a_segment_takes_whole_sizes_only(size):
    with pytest.raises(ValueError, match="Text: length must be a whole number >= 1, not"):
        Text(size)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "1"])
def test_a_video_takes_a_positive_time_per_frame_only(seconds):
    with pytest.raises(ValueError, match="Video: seconds_per_frame must be a finite number > 0, not"):
        Video(1, 2, 3, seconds)


def test_sizes_of_numpy_and_torch_are_read_as_plain_numbers():
    image = Image(np.int64(2), torch.tensor(3))
    assert image == Image(2, 3)
    assert [type(size) for size in image.sizes] == [int, int]
    assert str(Video(np.int32(1), 2, 2, np.float32(0.5))) == "video:1x2x2@2fps"


@given(t=st.integers(1, 9), tokens=st.integers(1, 200), seconds=SECONDS)
def test_interleaving_keeps_every_frame_and_audio_token_in_chunks_of_two_seconds(t, tokens, seconds):
    segments = interleave_audio(Video(t, 2, 3, seconds), tokens)
    frames = [segment.t for segment in segments if isinstance(segment, Video)]
    audio = [segment.length for segment in segments if isinstance(segment, VideoAudio)]
    assert (sum(frames), sum(audio)) == (t, tokens)
    assert isinstance(segments[0], Video) and not isinstance(segments[0], MoreFrames)
    assert all(count == 50 for count in audio[:-1])
    assert all((count - 1) * seconds < 2 for count in frames)


def test_interleaving_cuts_at_whole_seconds_at_every_frame_rate():
    for fps in range(1, 121):
        chunks = interleave_audio(Video(6 * fps, 1, 1, 1 / fps), 1)
        assert [segment.t for segment in chunks if isinstance(segment, Video)] == [2 * fps] * 3


def test_a_timestamped_video_is_its_frames_as_images_each_after_its_text():
    segments = timestamped_frames(Video(2, 3, 4), text_tokens=5)
    assert " ".join(map(str, segments)) == "text:5 image:3x4 text:5 image:3x4"


def test_a_sequence_holds_segments_only():
    with pytest.raises(ValueError, match=r"segments such as Text\(5\) and Image\(2, 3\), not 5"):
        read_segments([Text(2), 5])
    with pytest.raises(ValueError, match=r"write \[Text\(length=2\)\]"):
        read_segments(Text(2))


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_segments_are_read_from_the_types_of_tokens(kind):
    visual = {1: [Image(2, 2), Image(1, 3)], 2: [Video(2, 1, 2), Video(2, 2, 1, 0.5)]}
    types = [0, 0, *[1] * 7, 0, *[2] * 4, 0, 2, 2, 0, 2, 2]
    assert segments_from_token_types(kind(types), visual) == [
        *(Text(2), Image(2, 2), Image(1, 3), Text(1), Video(2, 1, 2), Text(1)),
        *(Image(2, 1), Text(1), Video(1, 2, 1, 0.5)),  # the last video has text between its frames
    ]
    assert visual == {1: [], 2: []}


@pytest.mark.parametrize(("run", "message"), [(3, "image:2x2 needs 4"), (5, "no grid is left")])
def test_tokens_that_images_do_not_fill_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        segments_from_token_types([0] + [1] * run, {1: [Image(2, 2)]})


@pytest.mark.parametrize("given", [None, 3, ["text:2"], b"text:2"])
def test_segments_are_read_from_text_alone(given):
    with pytest.raises(ValueError, match="segments are read from text, such as 'text:5 image:2x3', not from"):
        parse_segments(given)
