"""Where each layout puts tokens, and which of its properties hold."""

import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import (
    LAYOUTS,
    Cursor,
    Image,
    MoreFrames,
    Text,
    Video,
    interleave_audio,
    place,
)
from rope_mm.positions.grids import fill

SIZES = st.integers(1, 6)
OWN_TEXT = {
    "local": [[0, 0, 0], [1, 0, 0]],
    "compact": [[0, 0, 0], [1, 0, 0]],
    "compact-scaled": [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    "dual": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "fixed-extent": [[0, 0, 0], [0, 0, 0]],
    "mochi": [[0, 0, 0], [0, 0, 0]],
    "flux": [[0, 0, 0], [0, 0, 0]],
    "frames": [[0, 0, 0], [0, 0, 0]],
    "ltx2": [[0, 0, 0], [0, 0, 0]],
    "music-flamingo": [[0, 0], [0, 0]],
    "flux2": [[0, 0, 0, 0], [0, 0, 0, 1]],
    "flux3": [[0, 0, 0, 0], [0, 0, 0, 1]],
    "lumina": [[0, 0, 0], [1, 0, 0]],
    "z-image": [[1, 0, 0], [2, 0, 0]],
}
SYMMETRIC = ("flat", "rope-tie", "rope-tv", "rope-tv-2d", "rope-tv-causal", "anchored")
# a longer video leaves earlier frames where they are
MOVING = ("normalized-corners", "rope-tv", "fixed-extent", "v2pe", "dual")
CAUSAL = [name for name in LAYOUTS if name not in MOVING]


def one_based(segments, layout):
    """Positions of the image and of the text token after it, counted from 1 as the articles do."""
    positions, cursor = place(segments, layout)
    return positions[segments[0].tokens : -1] + 1, positions[-1] + 1, cursor


@pytest.mark.parametrize(
    ("layout", "text", "image", "first", "last", "following"),
    [
        ("rope-tv-2d", 4, (3, 4), (9.5, 9), (11.5, 12), 17),
        ("rope-tv-2d", 100, (16, 16), (221, 221), (236, 236), 357),
        ("rope-tv-2d", 7, (2, 3), (10, 9.5), (11, 11.5), 14),
        ("rope-tv-2d", 10, (1, 5), (13, 11), (13, 15), 16),
        ("rope-tie", 4, (3, 4), (9, 8), (19, 20), 24),
        ("rope-tie", 100, (16, 16), (117, 117), (372, 372), 389),
        ("rope-tv", 4, (3, 4), (10.5, 9.5, 9), (10.5, 11.5, 12), 17),
        ("m-rope", 4, (3, 4), (5, 5, 5), (5, 7, 8), 9),
        ("flat", 4, (3, 4), (5,), (16,), 17),
        ("grid", 4, (3, 4), (1, 1, 1), (1, 3, 4), 5),
    ],
)
def test_images_stand_where_the_articles_put_them(layout, text, image, first, last, following):
    image, after, _ = one_based([Text(text), Image(*image), Text(1)], layout)
    assert image[0].tolist() == list(first)
    assert image[-1].tolist() == list(last)
    assert set(after.tolist()) == {following}


def test_a_video_stands_where_rope_tv_puts_it():
    image, after, _ = one_based([Text(9), Video(4, 3, 5), Text(1)], "rope-tv")
    assert image[0].tolist() == [38, 38.5, 37.5]
    assert image[-1].tolist() == [41, 40.5, 41.5]
    assert after.tolist() == [70, 70, 70]


@pytest.mark.parametrize(
    ("layout", "first", "last", "following"),
    [
        ("local", (3, 0, 0), (4, 1, 2), (15, 0, 0)),
        ("compact", (3, 0, 0), (4, 1, 2), (5, 0, 0)),
        ("compact-scaled", (3, 0, 0, -1, -4 / 3), (4, 1, 2, 1, 4 / 3), (5, 0, 0, 0, 0)),
        ("dual", (8, 8, 7.5, 0, 0), (9, 9, 9.5, 1, 2), (15, 15, 15, 0, 0)),
    ],
)
def test_layouts_with_rows_and_columns_of_the_image_itself(layout, first, last, following):
    positions, cursor = place("text:3 video:2x2x3 text:1", layout)
    assert [tuple(row) for row in positions[[3, -2, -1]].tolist()] == [first, last, following]
    assert cursor.next == following[0] + 1
    again, _ = place("text:3 image:2x3 text:1 image:2x3", layout)
    own = again[:, -2:]
    assert torch.equal(own[3:9], own[-6:]), "rows and columns do not depend on what stands before"


@pytest.mark.parametrize(
    ("layout", "origin", "first", "last", "following"),
    [
        ("local", "centre", (3, -0.5, -1), (4, 0.5, 1), (15, 0, 0)),
        ("compact", "centre", (3, -0.5, -1), (4, 0.5, 1), (5, 0, 0)),
        ("anchored", "centre", (3, 2.5, 2), (4, 4.5, 5), (5, 5, 5)),
        ("anchored", "corner", (3, 3, 3), (4, 5, 6), (5, 5, 5)),
    ],
)
def test_rows_and_columns_are_counted_from_the_corner_or_from_the_centre(
    layout, origin, first, last, following
):
    positions, _ = place("text:3 video:2x2x3 text:1", layout, origin=origin)
    assert [tuple(row) for row in positions[[3, -2, -1]].tolist()] == [first, last, following]


@given(t=SIZES, y=SIZES, x=SIZES)
def test_anchored_is_videorope_with_step_1_but_for_its_rounding(t, y, x):
    ours, theirs = (
        place([Text(2), Video(t, y, x), Text(1)], layout, **options)[0]
        for layout, options in (("anchored", {}), ("videorope", {"step": 1.0}))
    )
    rounded = torch.tensor([0.0, (y - 1) % 2 / 2, (x - 1) % 2 / 2], dtype=torch.float64)
    assert torch.equal((theirs - ours)[2:-1], rounded.expand(t * y * x, -1))
    assert torch.equal(theirs[[0, 1, -1]], ours[[0, 1, -1]])


def test_text_after_a_long_video_goes_on_past_its_last_frame():
    # Qwen2-VL as released; some ports advance by the sides alone and put the text inside the video
    positions, cursor = place([Text(3), Video(20, 2, 3), Text(4)], "m-rope")
    assert positions[-4:, 0].tolist() == [23, 24, 25, 26]
    assert cursor.next == 27


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in OWN_TEXT])
@given(text=st.integers(1, 50))
def test_text_alone_is_counted_on_every_axis(layout, text):
    positions, cursor = place([Text(text)], layout)
    expected = torch.arange(text, dtype=torch.float64)
    assert torch.equal(positions, expected[:, None].expand(-1, len(LAYOUTS[layout].axes)))
    assert (cursor.next, cursor.tokens) == (text, text)


@pytest.mark.parametrize("layout", OWN_TEXT)
def test_text_that_is_not_on_the_diagonal_stands_where_its_layout_puts_it(layout):
    assert place([Text(2)], layout)[0].tolist() == OWN_TEXT[layout]


def assert_symmetric(segment, layout, text=3, **options):
    """Raster token k and its mirror image sum to the text before and after, exactly, on every axis."""
    positions, _ = place([Text(text), segment, Text(1)], layout, **options)
    rows = [[Fraction(x) for x in row] for row in positions.tolist()]
    around = {before + after for before, after in zip(rows[text - 1], rows[-1], strict=True)}
    image = rows[text:-1]
    sums = {
        a + b
        for here, there in zip(image, reversed(image), strict=True)
        for a, b in zip(here, there, strict=True)
    }
    assert sums == around, "the sums differ"


@pytest.mark.parametrize("layout", SYMMETRIC)
@given(image=st.one_of(st.builds(Image, SIZES, SIZES), st.builds(Video, SIZES, SIZES, SIZES)))
def test_an_image_lies_symmetric_between_its_text_in_exact_arithmetic(layout, image):
    assert_symmetric(image, layout)


@given(
    t=SIZES,
    y=SIZES,
    x=SIZES,
    rate=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    drift=st.sampled_from([None, 0.5, 1.0, 2.0]),
)
def test_the_causal_family_is_symmetric_at_every_rate_and_drift(t, y, x, rate, drift):
    options = {"rate": rate} if drift is None else {"rate": rate, "drift": drift}
    assert_symmetric(Video(t, y, x), "rope-tv-causal", **options)


@pytest.mark.parametrize("layout", ["m-rope", "grid"])
def test_layouts_that_promise_no_symmetry_have_none(layout):
    with pytest.raises(AssertionError, match="the sums differ"):
        assert_symmetric(Image(2, 5), layout)


@pytest.mark.parametrize("layout", CAUSAL)
@given(t=SIZES, y=SIZES, x=SIZES, more=SIZES)
def test_a_causal_layout_never_moves_an_earlier_frame(layout, t, y, x, more):
    short, _ = place([Text(2), Video(t, y, x)], layout)
    long, _ = place([Text(2), Video(t + more, y, x)], layout)
    assert torch.equal(long[: len(short)], short)


@pytest.mark.parametrize("layout", CAUSAL)
@given(counts=st.lists(SIZES, min_size=1, max_size=4), y=SIZES, x=SIZES)
def test_a_video_of_unknown_length_is_placed_frame_by_frame_as_if_known(layout, counts, y, x):
    whole, end = place([Text(2), Video(sum(counts), 2 * y, 2 * x), Text(1)], layout)
    parts, cursor = place([Text(2), Video(counts[0], 2 * y, 2 * x)], layout)
    for count in counts[1:]:
        more, cursor = place([MoreFrames(count, 2 * y, 2 * x)], layout, cursor)
        parts = torch.cat((parts, more))
    text, cursor = place([Text(1)], layout, cursor)
    assert torch.equal(torch.cat((parts, text)), whole)
    assert cursor == end


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in CAUSAL])
def test_a_layout_that_would_move_placed_frames_refuses_more_of_them(layout):
    options = {"t": 4.0} if layout == "fixed-extent" else {}
    _, cursor = place([Text(2), Video(2, 3, 2)], layout, **options)
    with pytest.raises(ValueError, match="give the whole video at once, or take a causal layout"):
        place([MoreFrames(1, 3, 2)], layout, cursor, **options)


def test_more_frames_and_audio_need_their_video_and_audio_a_time_in_seconds():
    for segments in (
        "text:2 more_frames:1x2x2",
        "video:2x2x2 text:1 more_frames:1x2x2",
        "video:2x2x2 more_frames:1x2x3",
    ):
        with pytest.raises(ValueError, match="must come after a video of the same rows"):
            place(segments, "flat")
    with pytest.raises(ValueError, match="write audio for sound alone"):
        place("video_audio:3", "tm-rope")
    with pytest.raises(
        ValueError, match=r"has no time in seconds for video_audio:3; take \['tm-rope', 'tarope'\]"
    ):
        place("video:2x2x2 video_audio:3", "m-rope")


def test_qwen2_5_vl_counts_frames_in_seconds_and_rounds_down():
    positions, cursor = place([Text(3), Video(4, 1, 2, seconds_per_frame=0.7), Text(1)], "m-rope-time")
    assert positions[3:-1:2, 0].tolist() == [3, 4, 5, 7]  # 0, 1.4, 2.8, 4.2
    assert cursor.next == 9


def test_frames_and_audio_of_a_video_share_one_time():
    segments = interleave_audio(Video(4, 2, 2, seconds_per_frame=1.0), audio_tokens=90)
    assert " ".join(map(str, segments)) == "video:2x2x2 video_audio:50 more_frames:2x2x2 video_audio:40"
    positions, cursor = place([Text(5), *segments, Text(1)], "tm-rope")
    frames = torch.cat((positions[5:13], positions[63:71]))
    audio = torch.cat((positions[13:63], positions[71:111]))
    assert frames[::4, 0].tolist() == [5, 30, 55, 80]
    assert frames[:4, 1:].tolist() == [[5, 5], [5, 6], [6, 5], [6, 6]]
    assert torch.equal(audio, torch.arange(5, 95.0).double()[:, None].expand(-1, 3))
    assert cursor.next == 96


def test_audio_alone_is_counted_as_text_is():
    assert torch.equal(place("audio:7 text:2", "tm-rope")[0], place("text:9", "tm-rope")[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unrotated_tokens_are_at_the_origin_and_are_not_counted(layout):
    with_unrotated, cursor = place("text:3 unrotated:2 image:2x2 unrotated:1 text:2", layout)
    without, plain = place("text:3 image:2x2 text:2", layout)
    unrotated = torch.tensor([3, 4, 9])
    assert with_unrotated[unrotated].eq(0).all()
    rest = torch.ones(12, dtype=torch.bool).index_fill(0, unrotated, False)
    assert torch.equal(with_unrotated[rest], without)
    assert cursor.next == plain.next


def test_rope_tv_must_know_how_long_a_video_is():
    short, long = (place([Video(t, 2, 2)], "rope-tv")[0] for t in (2, 3))
    assert not torch.equal(short, long[:8])


@given(y=SIZES, x=SIZES, drift=st.sampled_from([0.5, 1.0, 2.0, 3.0]), t=st.integers(2, 6))
def test_only_a_drift_of_the_frames_own_span_counts_a_video_as_its_tokens(y, x, drift, t):
    _, own = place([Video(t, y, x)], "rope-tv-causal")
    _, other = place([Video(t, y, x)], "rope-tv-causal", drift=drift)
    assert own.next == t * y * x
    assert (other.next == t * y * x) == (drift == y * x)


@given(y=SIZES, x=SIZES)
def test_coordinates_are_halves_only_where_one_side_is_odd_and_the_other_even(y, x):
    positions, _ = place([Text(1), Image(y, x)], "rope-tv-2d")
    assert bool((positions % 1).any()) == (y % 2 != x % 2)


def test_a_video_of_one_frame_is_an_image():
    assert LAYOUTS
    for layout in LAYOUTS:
        image, video = (place([Text(2), image, Text(1)], layout) for image in (Image(3, 4), Video(1, 3, 4)))
        assert torch.equal(image[0], video[0])
        assert image[1] == video[1]


@pytest.mark.parametrize("layout", CAUSAL)
def test_more_frames_are_computed_without_those_before_them(monkeypatch, layout):
    tokens = []

    def count(rasters):
        tokens.extend(raster.tokens for raster in rasters)
        return fill(rasters)

    monkeypatch.setattr(importlib.import_module("rope_mm.positions.place"), "fill", count)
    _, cursor = place([Video(1, 2, 2)], layout)
    for _ in range(20):
        _, cursor = place([MoreFrames(1, 2, 2)], layout, cursor)
    assert tokens == [4] * 21


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"next": math.nan}, "Cursor: next must be a finite number .*, not nan"),
        ({"tokens": -1}, "Cursor: tokens must be a whole number >= 0, not -1"),
        ({"images": 1.5}, "Cursor: images must be a whole number >= 0, not 1.5"),
        ({"video": {"start": 0, "t": 0, "y": 1, "x": 1}}, "OpenVideo: t must be a whole number >= 1, not 0"),
    ],
)
def test_numbers_of_a_cursor_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Cursor(**fields)
