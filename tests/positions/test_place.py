import importlib
import json
import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rope_mm import (
    LAYOUTS,
    Audio,
    Cursor,
    Image,
    Layout,
    MoreFrames,
    PlacedBatch,
    Text,
    Unrotated,
    Video,
    augment_positions,
    interleave_audio,
    pack,
    place,
    place_rows,
)
from rope_mm.positions.grids import Raster, fill

place_module = importlib.import_module("rope_mm.positions.place")
SIZES = st.integers(1, 6)
SEGMENTS = st.one_of(
    *(st.builds(kind, SIZES) for kind in (Text, Audio, Unrotated)),
    st.builds(Image, SIZES, SIZES),
    st.builds(Video, SIZES, SIZES, SIZES, st.sampled_from([1.0, 0.25, 2.0])),
)
SEQUENCES = st.lists(SEGMENTS, min_size=1, max_size=6)
OWN_TEXT = {
    "local": [[0, 0, 0], [1, 0, 0]],
    "compact": [[0, 0, 0], [1, 0, 0]],
    "dual": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "fixed-extent": [[0, 0, 0], [0, 0, 0]],
    "mochi": [[0, 0, 0], [0, 0, 0]],
    "flux": [[0, 0, 0], [0, 0, 0]],
    "flux2": [[0, 0, 0, 0], [0, 0, 0, 1]],
    "lumina": [[0, 0, 0], [1, 0, 0]],
    "z-image": [[1, 0, 0], [2, 0, 0]],
}
SYMMETRIC = ("flat", "rope-tie", "rope-tv", "rope-tv-2d", "rope-tv-causal")
EQUIVALENT = (
    "local",
    "dual",
    "flat",
    "rope-tie-fractional",
    "rope-tv",
    "rope-tv-2d",
    "rope-tv-causal",
    "hunyuan-image",
)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@given(segments=SEQUENCES, cut=st.integers(0, 6), split=st.integers(1, 5))
def test_a_sequence_placed_in_pieces_is_the_sequence_placed_at_once(layout, segments, cut, split):
    pieces = [segments[:cut], segments[cut:]]
    if (
        pieces[1] and isinstance(pieces[1][0], Text) and pieces[1][0].length > split
    ):  # cut inside the text as well
        rest = pieces[1][0].length - split
        pieces = [[*pieces[0], Text(split)], [Text(rest), *pieces[1][1:]]]
    whole, end = place(segments, layout)
    cursor, parts = Cursor(), []
    for piece in pieces:
        part, cursor = place(piece, layout, Cursor(**json.loads(json.dumps(asdict(cursor)))))
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert cursor == end


@pytest.mark.parametrize("layout", EQUIVALENT)
@given(segments=SEQUENCES)
def test_an_equivalent_layout_counts_a_patch_as_a_token(layout, segments):
    _, cursor = place(segments, layout)
    assert cursor.tokens == sum(segment.tokens for segment in segments)
    assert cursor.next == sum(segment.tokens for segment in segments if not isinstance(segment, Unrotated))


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
    with pytest.raises(ValueError, match=r"has no time in seconds for video_audio:3; take \['tm-rope'\]"):
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


@pytest.mark.parametrize("side", ["left", "right"])
@given(rows=st.lists(SEQUENCES, min_size=1, max_size=4), more=SEQUENCES)
def test_rows_of_a_batch_are_placed_and_go_on_as_each_by_itself(side, rows, more):
    batch = place_rows(rows, "rope-tv-causal", padding_side=side)
    assert isinstance(batch, PlacedBatch)
    assert batch.positions.shape[:2] == batch.mask.shape
    for segments, row, mask, cursor in zip(rows, batch.positions, batch.mask, batch.cursors, strict=True):
        alone, end = place(segments, "rope-tv-causal")
        assert torch.equal(row[mask], alone)
        assert row[~mask].eq(0).all()
        assert cursor == end
        pads = mask.logical_not().nonzero().flatten().tolist()
        assert pads == (list(range(len(pads))) if side == "left" else list(range(len(alone), len(mask))))
    after = place_rows([more] * len(rows), "rope-tv-causal", batch.cursors)
    for segments, row in zip(rows, after.positions, strict=True):
        whole, _ = place([*segments, *more], "rope-tv-causal")
        assert torch.equal(row, whole[len(whole) - len(row) :])


@given(seed=st.integers(0, 99), shift=st.floats(0, 2), jitter=st.floats(1, 3), rescale=st.floats(1, 3))
def test_augmented_positions_are_moved_and_scaled_within_bounds(seed, shift, jitter, rescale):
    positions = torch.cartesian_prod(*[torch.linspace(-1, 1, 3, dtype=torch.float64)] * 2)
    one, same = (
        augment_positions(positions, shift, jitter, rescale, torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(one, same)
    middle, corner = one[4], one[8]
    factor = corner - middle
    assert (factor <= jitter * rescale + 1e-9).all() and (factor >= 1 / (jitter * rescale) - 1e-9).all()
    assert (middle.abs() <= shift * factor + 1e-9).all()
    assert factor.max() / factor.min() <= jitter**2 + 1e-9  # the axes share one rescale
    torch.testing.assert_close(one, positions * factor + middle)


def test_augmentation_by_default_changes_nothing_and_bad_ranges_are_refused():
    positions, _ = place("text:2 image:2x2", "rope-tv")
    assert torch.equal(augment_positions(positions), positions)
    for name, value, least in (("shift", -1.0, 0), ("jitter", 0.5, 1), ("rescale", 0.9, 1)):
        with pytest.raises(ValueError, match=f"{name} must be a finite number >= {least}, not {value}"):
            augment_positions(positions, **{name: value})


def test_a_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 rows need as many cursors, not 1"):
        place_rows(["text:1", "text:2"], cursors=[Cursor()])
    with pytest.raises(ValueError, match=r"write \['text:1'\]"):
        place_rows("text:1")
    with pytest.raises(ValueError, match="'left' or 'right', not 'middle'"):
        place_rows(["text:1"], padding_side="middle")


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


def test_a_cursor_of_another_layout_is_refused():
    _, cursor = place([Text(2)], "m-rope")
    with pytest.raises(ValueError, match=r"stopped in layout 'm-rope', so it cannot go on in 'rope-tv'"):
        place([Text(1)], "rope-tv", cursor)
    _, cursor = place([Text(2)], "rope-tv-causal", rate=0.5)
    with pytest.raises(ValueError, match=r"rate=0\.5"):
        place([Text(1)], "rope-tv-causal", cursor)


def test_an_unknown_layout_or_option_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="did you mean 'rope-tv'"):
        place([Text(1)], "rope-tvv")
    with pytest.raises(ValueError, match=r"takes no options, not \['rate'\]"):
        place([Text(1)], "m-rope", rate=2.0)
    with pytest.raises(ValueError, match="rate"):
        place([Text(1)], "rope-tv-causal", speed=2.0)


def test_an_empty_sequence_has_no_positions_and_leaves_the_cursor():
    positions, cursor = place("", "rope-tv", Cursor(3.0, 3, layout="rope-tv"))
    assert positions.shape == (0, 3)
    assert cursor == Cursor(3.0, 3, layout="rope-tv")


@pytest.mark.parametrize(
    "positions", [torch.arange(6).view(3, 2), np.arange(6).reshape(3, 2), [[0, 1], [2, 3], [4, 5]]]
)
def test_whole_positions_are_augmented_as_real_numbers(positions):
    seed = torch.Generator().manual_seed(1)
    augmented = augment_positions(positions, shift=0.5, jitter=1.5, generator=seed)
    real = torch.arange(6, dtype=torch.float64).view(3, 2)
    expected = augment_positions(real, shift=0.5, jitter=1.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augmented, expected)
    assert (augmented % 1).all(), "nothing is rounded"


def test_augmentation_keeps_the_floating_type():
    assert augment_positions(torch.zeros(2, 3), shift=1.0).dtype == torch.float32


def test_positions_are_data_where_models_are_built_on_the_meta_device():
    expected, end = place("text:2 image:2x3 video:2x2x2 text:1", "rope-tv-causal")
    with torch.device("meta"):
        placed, cursor = place("text:2 image:2x3 video:2x2x2 text:1", "rope-tv-causal")
        batch = place_rows(["text:2", "image:2x2"], "circle")
        packed, number = pack(["text:2", "image:2x2"], "circle")
    assert torch.equal(placed, expected) and cursor == end
    assert {x.device.type for x in (batch.positions, batch.mask, packed, number)} == {"cpu"}


def counted(cursor, segment):
    return [[cursor.next + k, 0] for k in range(segment.tokens)], cursor.next + segment.tokens


WRONG = {
    "no pair": (lambda cursor, segment: torch.zeros(6, 2), "must return positions and next, not tensor"),
    "a row too few": (
        lambda cursor, segment: (torch.zeros(segment.tokens - 1, 2), 0.0),
        r"must place image:2x3 at positions \(6, 2\), not \(5, 2\)",
    ),
    "an axis too many": (lambda cursor, segment: (torch.zeros(segment.tokens, 3), 0.0), r"not \(6, 3\)"),
    "nan": (lambda cursor, segment: (torch.full((6, 2), math.nan), 0.0), "positions that are not finite"),
    "next of nan": (
        lambda cursor, segment: (torch.zeros(6, 2), math.nan),
        "next must be a finite number, not nan",
    ),
    "no next": (lambda cursor, segment: (torch.zeros(6, 2), None), "next must be a finite number, not None"),
    "a raster of one axis": (
        lambda cursor, segment: (Raster(segment.grid, (0,), ((0,),) * 3), 0.0),
        r"not \(6, 1\)",
    ),
    "a raster of unequal steps": (
        lambda cursor, segment: (Raster(segment.grid, (0, 0), ((0, 0), (0,), (0, 0))), 0.0),
        r"not \(6, ",
    ),
    "a raster of infinity": (
        lambda cursor, segment: (Raster(segment.grid, (math.inf, 0), ((0, 0),) * 3), 0.0),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layout_whose_rule_does_not_place_each_token_is_refused(monkeypatch, name):
    rule, message = WRONG[name]
    monkeypatch.setitem(LAYOUTS, "mine", Layout(("y", "x"), rule, "this test"))
    with pytest.raises(ValueError, match=f"the rule of 'this test'.* {message}"):
        place("text:1 image:2x3", "mine")


@pytest.mark.parametrize(
    "positions", ["abc", torch.zeros(6, 3, dtype=torch.complex64), torch.zeros(6, 3, device="meta")]
)
def test_a_rule_whose_positions_are_no_real_numbers_is_refused(monkeypatch, positions):
    rule = Layout(("t", "y", "x"), lambda cursor, segment: (positions, cursor.next + 1), "a paper")
    monkeypatch.setitem(LAYOUTS, "mine", rule)
    with pytest.raises(ValueError, match="the rule of 'a paper' must return"):
        place("image:2x3", "mine")


def test_positions_under_fake_tensors_have_their_shape():
    with FakeTensorMode():
        assert place("text:2 image:2x3 video:2x1x2", "m-rope")[0].shape == (12, 3)


def test_a_rule_for_text_is_checked_as_well(monkeypatch):
    text_rule = lambda cursor, n, a: (torch.zeros(n + 1, a), cursor.next)  # noqa: E731
    monkeypatch.setitem(LAYOUTS, "mine", Layout(("y", "x"), counted, "this test", text_rule))
    with pytest.raises(ValueError, match=r"must place text:2 at positions \(2, 2\), not \(3, 2\)"):
        place("text:2", "mine")


def test_a_rule_may_answer_with_lists_and_go_on_with_a_video(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "mine", Layout(("y", "x"), counted, "this test"))
    positions, _ = place("text:1 video:2x1x2 text:1", "mine")
    assert positions.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 5]]
    parts, _ = place("text:1 video:1x1x2 more_frames:1x1x2 text:1", "mine")
    assert torch.equal(parts, positions)


@pytest.mark.parametrize("layout", CAUSAL)
def test_more_frames_are_computed_without_those_before_them(monkeypatch, layout):
    tokens = []

    def count(rasters):
        tokens.extend(raster.tokens for raster in rasters)
        return fill(rasters)

    monkeypatch.setattr(place_module, "fill", count)
    _, cursor = place([Video(1, 2, 2)], layout)
    for _ in range(20):
        _, cursor = place([MoreFrames(1, 2, 2)], layout, cursor)
    assert tokens == [4] * 21


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"next": math.nan}, "Cursor: next must be a finite number, not nan"),
        ({"tokens": -1}, "Cursor: tokens must be a whole number >= 0, not -1"),
        ({"images": 1.5}, "Cursor: images must be a whole number >= 0, not 1.5"),
        ({"video": {"start": 0, "t": 0, "y": 1, "x": 1}}, "OpenVideo: t must be a whole number >= 1, not 0"),
    ],
)
def test_numbers_of_a_cursor_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Cursor(**fields)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("v2pe", {"stride": 0}, "layout 'v2pe': stride must be a finite number > 0, not 0"),
        ("videorope", {"step": math.nan}, "step must be a finite number > 0, not nan"),
        ("m-rope-time", {"rate": "2"}, "rate must be a finite number > 0, not '2'"),
        ("grid", {"merge": 1.5}, "merge must be a whole number >= 1, not 1.5"),
        ("circle", {"alpha": 2}, "alpha must be a finite number >= 0 and <= 1, not 2"),
        ("normalized-centers", {"norm": "mix"}, "norm must be 'separate', 'min' or 'max', not 'mix'"),
        ("rope-tv-causal", {"drift": -1}, "drift must be a finite number >= 0, not -1"),
    ],
)
def test_options_of_a_layout_are_checked(layout, options, message):
    with pytest.raises(ValueError, match=message):
        place("image:2x2", layout, **options)


def test_options_of_numpy_and_defaults_make_the_same_cursor():
    _, cursor = place("image:2x2", "rope-tv-causal", rate=np.float64(0.5))
    assert cursor.layout == "rope-tv-causal(rate=0.5)"
    _, cursor = place("image:2x2", "rope-tv-causal", rate=1, drift=None)
    assert cursor.layout == "rope-tv-causal"


def test_an_empty_batch_is_refused():
    for function in (place_rows, pack):
        with pytest.raises(ValueError, match="at least one sequence"):
            function([])
