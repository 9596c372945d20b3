from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import LAYOUTS, Cursor, Image, Text, Video, place

SIZES = st.integers(1, 6)
SEGMENTS = st.one_of(
    st.builds(Text, SIZES), st.builds(Image, SIZES, SIZES), st.builds(Video, SIZES, SIZES, SIZES)
)
STORIES = st.lists(SEGMENTS, min_size=1, max_size=6)
OWN_WORDS = {
    "stretched": [[0, 0, 0], [0, 0, 0]],
    "mochi": [[0, 0, 0], [0, 0, 0]],
    "flux": [[0, 0, 0], [0, 0, 0]],
    "flux2": [[0, 0, 0, 0], [0, 0, 0, 1]],
    "lumina": [[0, 0, 0], [1, 0, 0]],
    "z-image": [[1, 0, 0], [2, 0, 0]],
}
SYMMETRIC = ("flat", "rope-tie", "rope-tv", "rope-tv-2d", "rope-tv-causal")
EQUIVALENT = ("flat", "rope-tv", "rope-tv-2d", "rope-tv-causal")
CAUSAL = (
    "flat",
    "rope-tie",
    "rope-tv-2d",
    "rope-tv-causal",
)  # a longer video leaves earlier frames where they are


def one_based(story, layout):
    """Positions of the picture and of the word after it, counted from 1 as the articles do."""
    positions, cursor = place(story, layout)
    return positions[story[0].tokens : -1] + 1, positions[-1] + 1, cursor


@pytest.mark.parametrize(
    ("layout", "words", "image", "first", "last", "following"),
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
def test_images_stand_where_the_articles_put_them(layout, words, image, first, last, following):
    picture, after, _ = one_based([Text(words), Image(*image), Text(1)], layout)
    assert picture[0].tolist() == list(first)
    assert picture[-1].tolist() == list(last)
    assert set(after.tolist()) == {following}


def test_a_video_stands_where_rope_tv_puts_it():
    picture, after, _ = one_based([Text(9), Video(4, 3, 5), Text(1)], "rope-tv")
    assert picture[0].tolist() == [38, 38.5, 37.5]
    assert picture[-1].tolist() == [41, 40.5, 41.5]
    assert after.tolist() == [70, 70, 70]


def test_words_after_a_long_video_go_on_past_its_last_frame():
    # Qwen2-VL as released; some ports advance by the sides alone and put the words inside the video
    positions, cursor = place([Text(3), Video(20, 2, 3), Text(4)], "m-rope")
    assert positions[-4:, 0].tolist() == [23, 24, 25, 26]
    assert cursor.next == 27


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in OWN_WORDS])
@given(words=st.integers(1, 50))
def test_text_alone_is_counted_on_every_axis(layout, words):
    positions, cursor = place([Text(words)], layout)
    expected = torch.arange(words, dtype=torch.float64)
    assert torch.equal(positions, expected[:, None].expand(-1, len(LAYOUTS[layout].axes)))
    assert (cursor.next, cursor.tokens) == (words, words)


@pytest.mark.parametrize("layout", OWN_WORDS)
def test_words_of_diffusion_transformers_walk_where_their_models_put_them(layout):
    assert place([Text(2)], layout)[0].tolist() == OWN_WORDS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(story=STORIES, cut=st.integers(0, 6), split=st.integers(1, 5))
def test_a_story_placed_in_pieces_is_the_story_placed_at_once(layout, story, cut, split):
    pieces = [story[:cut], story[cut:]]
    if (
        pieces[1] and isinstance(pieces[1][0], Text) and pieces[1][0].length > split
    ):  # cut inside the words as well
        rest = pieces[1][0].length - split
        pieces = [[*pieces[0], Text(split)], [Text(rest), *pieces[1][1:]]]
    whole, end = place(story, layout)
    cursor, parts = None, []
    for piece in pieces:
        part, cursor = place(piece, layout, cursor)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert cursor == end


@pytest.mark.parametrize("layout", EQUIVALENT)
@given(story=STORIES)
def test_an_equivalent_layout_counts_a_patch_as_a_word(layout, story):
    _, cursor = place(story, layout)
    assert cursor.next == cursor.tokens == sum(segment.tokens for segment in story)


def assert_symmetric(segment, layout, words=3, **options):
    """Raster token k and its mirror image sum to the words before and after, exactly, on every axis."""
    positions, _ = place([Text(words), segment, Text(1)], layout, **options)
    rows = [[Fraction(x) for x in row] for row in positions.tolist()]
    around = {before + after for before, after in zip(rows[words - 1], rows[-1], strict=True)}
    picture = rows[words:-1]
    sums = {
        a + b
        for here, there in zip(picture, reversed(picture), strict=True)
        for a, b in zip(here, there, strict=True)
    }
    assert sums == around


@pytest.mark.parametrize("layout", SYMMETRIC)
@given(picture=st.one_of(st.builds(Image, SIZES, SIZES), st.builds(Video, SIZES, SIZES, SIZES)))
def test_a_picture_lies_symmetric_between_its_words_in_exact_arithmetic(layout, picture):
    assert_symmetric(picture, layout)


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
    with pytest.raises(AssertionError):
        assert_symmetric(Image(2, 5), layout)


@pytest.mark.parametrize("layout", CAUSAL)
@given(t=SIZES, y=SIZES, x=SIZES, more=SIZES)
def test_a_causal_layout_never_moves_a_frame_that_stands(layout, t, y, x, more):
    short, _ = place([Text(2), Video(t, y, x)], layout)
    long, _ = place([Text(2), Video(t + more, y, x)], layout)
    assert torch.equal(long[: len(short)], short)


def test_rope_tv_must_know_how_long_a_video_is():
    short, long = (place([Video(t, 2, 2)], "rope-tv")[0] for t in (2, 3))
    assert not torch.equal(short, long[:8])


@given(y=SIZES, x=SIZES, drift=st.sampled_from([0.5, 1.0, 2.0, 3.0]), t=st.integers(2, 6))
def test_only_a_drift_of_the_frames_own_room_counts_a_video_as_its_tokens(y, x, drift, t):
    _, own = place([Video(t, y, x)], "rope-tv-causal")
    _, other = place([Video(t, y, x)], "rope-tv-causal", drift=drift)
    assert own.next == t * y * x
    assert (other.next == t * y * x) == (drift == y * x)


@given(y=SIZES, x=SIZES)
def test_coordinates_are_halves_only_where_one_side_is_odd_and_the_other_even(y, x):
    positions, _ = place([Text(1), Image(y, x)], "rope-tv-2d")
    assert bool((positions % 1).any()) == (y % 2 != x % 2)


def test_a_video_of_one_frame_is_an_image():
    for layout in LAYOUTS:
        image, video = (
            place([Text(2), picture, Text(1)], layout) for picture in (Image(3, 4), Video(1, 3, 4))
        )
        assert torch.equal(image[0], video[0])
        assert image[1] == video[1]


def test_a_cursor_of_another_layout_is_refused():
    _, cursor = place([Text(2)], "m-rope")
    with pytest.raises(ValueError, match=r"stopped in layout 'm-rope', so it cannot go on in 'rope-tv'"):
        place([Text(1)], "rope-tv", cursor)
    _, cursor = place([Text(2)], "rope-tv-causal", rate=0.5)
    with pytest.raises(ValueError, match=r"rate=0\.5"):
        place([Text(1)], "rope-tv-causal", cursor)


def test_an_unknown_layout_or_option_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="did you mean 'rope-tv'"):
        place([Text(1)], "rope-tvv")
    with pytest.raises(ValueError, match=r"takes no options, not \['rate'\]"):
        place([Text(1)], "m-rope", rate=2.0)
    with pytest.raises(ValueError, match="rate"):
        place([Text(1)], "rope-tv-causal", speed=2.0)


def test_an_empty_story_has_no_positions_and_leaves_the_cursor():
    positions, cursor = place("", "rope-tv", Cursor(3.0, 3, "rope-tv"))
    assert positions.shape == (0, 3)
    assert cursor == Cursor(3.0, 3, "rope-tv")
