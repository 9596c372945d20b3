import pytest
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
from rope_mm.segments import read_segments, segments_from_token_types

SIZES = st.integers(1, 6)
PACES = st.sampled_from([1.0, 0.5, 0.04, 2.5])
SEGMENTS = st.one_of(
    *(st.builds(kind, SIZES) for kind in (Text, Audio, VideoAudio, Unrotated)),
    st.builds(Image, SIZES, SIZES),
    *(st.builds(kind, SIZES, SIZES, SIZES, PACES) for kind in (Video, MoreFrames)),
)


@given(st.lists(SEGMENTS, max_size=6))
def test_the_text_form_of_a_story_reads_back(story):
    assert parse_segments(" ".join(map(str, story))) == story


def test_a_segment_knows_its_raster_and_its_tokens():
    assert all(isinstance(s, Segment) for s in (Text(5), Image(2, 3), Video(4, 2, 3)))
    assert [s.grid for s in (Text(5), Image(2, 3), Video(4, 2, 3))] == [(1, 1, 5), (1, 2, 3), (4, 2, 3)]
    assert [s.tokens for s in (Text(5), Image(2, 3), Video(4, 2, 3))] == [5, 6, 24]


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ("text", "write text:N, image:YxX or video:TxYxX"),
        ("imag:2x3", "did you mean 'image'"),
        ("image:2x3x4", "'image:2x3x4' has 3 sizes, but image takes y x x"),
        ("image:0x3", "y must be a whole number >= 1, not 0"),
        ("text:-1", "write text:N"),
        ("image:2x3@0.5", "only a video has frames to pace"),
        ("video:2x2x2@0", "seconds must be a number > 0"),
    ],
)
def test_a_word_that_is_no_segment_is_refused_with_the_form_that_is(story, message):
    with pytest.raises(ValueError, match=message):
        parse_segments(story)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "3"])
def test_a_segment_takes_whole_sizes_only(size):
    with pytest.raises(ValueError, match="whole number"):
        Text(size)


@given(t=st.integers(1, 9), sound=st.integers(1, 200), seconds=PACES)
def test_a_film_holds_every_frame_and_every_sound_token_in_chunks_of_two_seconds(t, sound, seconds):
    story = interleave_audio(Video(t, 2, 3, seconds), sound)
    frames = [segment.t for segment in story if isinstance(segment, Video)]
    tokens = [segment.length for segment in story if isinstance(segment, VideoAudio)]
    assert (sum(frames), sum(tokens)) == (t, sound)
    assert isinstance(story[0], Video) and not isinstance(story[0], MoreFrames)
    assert all(count == 50 for count in tokens[:-1])
    assert all((count - 1) * seconds < 2 for count in frames)


def test_a_film_cuts_at_whole_seconds_at_every_frame_rate():
    for fps in range(1, 121):
        chunks = interleave_audio(Video(6 * fps, 1, 1, 1 / fps), 1)
        assert [segment.t for segment in chunks if isinstance(segment, Video)] == [2 * fps] * 3


def test_a_stamped_video_is_its_pictures_each_after_its_words():
    assert (
        " ".join(map(str, timestamped_frames(Video(2, 3, 4), words=5))) == "text:5 image:3x4 text:5 image:3x4"
    )


def test_a_story_holds_segments_only():
    with pytest.raises(ValueError, match="not 5"):
        read_segments([Text(2), 5])


def test_a_story_is_read_from_the_kinds_of_its_tokens():
    seen = {1: [Image(2, 2), Image(1, 3)], 2: [Video(2, 1, 2), Video(2, 2, 1, 0.5)]}
    kinds = [0, 0, *[1] * 7, 0, *[2] * 4, 0, 2, 2, 0, 2, 2]
    assert segments_from_token_types(kinds, seen) == [
        *(Text(2), Image(2, 2), Image(1, 3), Text(1), Video(2, 1, 2), Text(1)),
        *(Image(2, 1), Text(1), Video(1, 2, 1, 0.5)),  # the last video was told frame by frame
    ]
    assert seen == {1: [], 2: []}


@pytest.mark.parametrize(("run", "said"), [(3, "image:2x2 needs 4"), (5, "no grid is left")])
def test_tokens_that_pictures_do_not_fill_are_refused(run, said):
    with pytest.raises(ValueError, match=said):
        segments_from_token_types([0] + [1] * run, {1: [Image(2, 2)]})
