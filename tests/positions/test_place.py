import importlib
import json
import math
from dataclasses import asdict

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
    PlacedBatch,
    Text,
    Unrotated,
    Video,
    augment_positions,
    pack,
    place,
    place_rows,
)
from rope_mm.positions.grids import Raster

place_module = importlib.import_module("rope_mm.positions.place")
SIZES = st.integers(1, 6)
SEGMENTS = st.one_of(
    *(st.builds(kind, SIZES) for kind in (Text, Audio, Unrotated)),
    st.builds(Image, SIZES, SIZES),
    st.builds(Video, SIZES, SIZES, SIZES, st.sampled_from([1.0, 0.25, 2.0])),
)
SEQUENCES = st.lists(SEGMENTS, min_size=1, max_size=6)
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
    "no pair": (lambda cursor, segment: torch.zeros(6, 2), "must return positions and next, not a Tensor"),
    "a row too few": (
        lambda cursor, segment: (torch.zeros(segment.tokens - 1, 2), 0.0),
        r"must place image:2x3 at positions \(6, 2\), not \(5, 2\)",
    ),
    "an axis too many": (lambda cursor, segment: (torch.zeros(segment.tokens, 3), 0.0), r"not \(6, 3\)"),
    "nan": (lambda cursor, segment: (torch.full((6, 2), math.nan), 0.0), "positions that are not finite"),
    "next of nan": (
        lambda cursor, segment: (torch.zeros(6, 2), math.nan),
        "next must be a finite number .*, not nan",
    ),
    "no next": (
        lambda cursor, segment: (torch.zeros(6, 2), None),
        "next must be a finite number .*, not None",
    ),
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
