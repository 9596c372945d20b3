import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import (
    LAYOUTS,
    SCHEMES,
    Image,
    LayoutProperties,
    Scheme,
    Text,
    Video,
    measure_properties,
    properties_table,
)
from rope_mm.analysis import properties as measure
from rope_mm.positions.grids import grid_positions
from rope_mm.positions.layouts import TYX, Layout
from rope_mm.schemes.extensions import YaRN


@pytest.fixture(scope="module")
def table():
    return {scheme: measure_properties(scheme) for scheme in SCHEMES}


def test_the_table_has_a_line_for_every_scheme_in_every_format():
    few = {name: SCHEMES[name] for name in ("rope-tv", "grid")}
    rows = json.loads(properties_table(few, "json"))
    assert [row["scheme"] for row in rows] == list(few)
    assert rows[0]["rate"] == 1
    assert rows[1]["density"] is None
    head, rule, *lines = properties_table(few, "markdown").splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {len(measure.COLUMNS) + 2}
    assert [line.split("|")[1] for line in lines] == [" `rope-tv` ", " `grid` "]
    assert properties_table(["rope-tv"]).splitlines()[1].split() == [
        "rope-tv", "yes", "yes", "yes", "yes", "no", "yes", "0", "1", "128.5,", "128.5", "no", "yes",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="did you mean 'markdown'"):
        properties_table(few, "markdwn")


def test_every_scheme_keeps_to_the_definition(table):
    assert table.keys() == SCHEMES.keys()
    for name, row in table.items():
        assert isinstance(row, LayoutProperties)
        assert (row.scheme, row.rotary) == (name, True)
        assert row.equivalent == (row.rate == 1)
        assert row.central <= row.symmetric, "central symmetry is the stronger"


def which(table, promise):
    return {name for name, row in table.items() if getattr(row, promise)}


PRINCIPLES = ("compatible", "equivalent", "symmetric", "causal")


@pytest.mark.parametrize(
    ("scheme", "kept"),
    [
        ("flat", {"compatible", "equivalent", "symmetric", "causal"}),
        ("rope-tv", {"compatible", "equivalent", "symmetric"}),
        ("rope-tv-causal", {"compatible", "equivalent", "symmetric", "causal"}),
        ("rope-tv-2d", {"compatible", "equivalent", "symmetric", "causal"}),
        ("rope-tie", {"compatible", "symmetric", "causal"}),
        ("rope-tie-fractional", {"compatible", "equivalent", "symmetric", "causal"}),
        ("hunyuan-image", {"compatible", "equivalent", "causal"}),
        ("mixed", {"equivalent", "symmetric"}),
        ("m-rope", {"compatible", "causal"}),
        ("m-rope-qwen2.5-vl", {"compatible", "causal"}),
        ("vrope", {"compatible", "symmetric", "causal"}),
        ("videorope", {"compatible", "causal"}),
        ("hope", {"causal"}),
        ("shared-id", {"compatible", "symmetric", "causal"}),
        ("v2pe", {"compatible"}),
        ("mh-rope", {"compatible", "causal"}),
        ("local", {"equivalent", "causal"}),
        ("compact", {"causal"}),
        ("compact-centred", {"symmetric", "causal"}),
        ("anchored", {"compatible", "symmetric", "causal"}),
        ("dual", {"equivalent"}),
        ("flux", {"causal"}),
        ("pixtral", {"causal"}),
    ],
)
def test_the_principles_are_kept_by_those_that_are_known_to(table, scheme, kept):
    assert {promise for promise in PRINCIPLES if getattr(table[scheme], promise)} == kept


def test_hunyuan_image_is_symmetric_but_for_odd_by_even_images(table):
    assert not table["hunyuan-image"].symmetric
    assert table["hunyuan-image"].integral
    assert not table["rope-tv-2d"].integral
    for y, x in ((3, 4), (4, 5)):
        assert not measure.symmetric(measure.image_in_text(SCHEMES["hunyuan-image"], Image(y, x), 4)).all()
    for y, x in ((3, 5), (2, 4), (4, 4)):
        assert measure.symmetric(measure.image_in_text(SCHEMES["hunyuan-image"], Image(y, x), 4)).all()


def test_videorope_is_symmetric_in_time_alone(table):
    assert table["videorope"].symmetric_on == ("t",)
    assert table["m-rope"].symmetric_on == ()
    assert table["rope-tv"].symmetric_on == TYX


def test_text_after_a_long_video_stands_inside_it_in_transformers(table):
    released, ported = table["m-rope"], measure_properties(Scheme(layout="m-rope-hf"))
    assert released.inside_text
    assert not ported.inside_text
    image = measure.image_in_text(Scheme(layout="m-rope-hf"), Video(12, 2, 4), 1)
    assert (image.patches[:, 0] >= image.after[0]).sum() == 8 * 8, (
        "8 of its 12 frames are not before the text"
    )
    for frames, inside in ((4, False), (5, True)):
        image = measure.image_in_text(Scheme(layout="m-rope-hf"), Video(frames, 2, 4), 1)
        assert measure.inside_text(image) is not inside, "the fifth frame stands where the text does in time"


def test_images_at_a_shared_position_collide(table):
    assert table["shared-id"].collisions == 4 * 6 + 12 * 2 * 4
    assert table["rope-tv"].collisions == table["m-rope"].collisions == 0
    # text is not rotated, nor is the first patch of the first image; the video is the second, at t = 1
    assert (table["flux"].collisions, table["flux"].text_on_patches) == (21, 20)
    # without time, a patch one frame later is where its lower right neighbour was
    assert table["hope"].collisions > table["videorope"].collisions == 0


def test_density_and_distance_of_a_square_image(table):
    assert table["rope-tv"].density == table["flat"].density == 1
    assert table["m-rope"].density == 256 / 16
    assert table["rope-tie"].density == 256 / 288
    assert table["shared-id"].density == table["videorope"].density == 256
    assert table["pixtral"].density is None
    assert table["rope-tv"].distances == (128.5, 128.5)
    assert table["m-rope"].distances == (6, 11)
    assert table["m-rope-i"].distances is None, "rows and columns start at 0 wherever the text is"


def test_the_tokens_that_a_patch_counts_as_are_named_where_they_are_constant(table):
    half = Scheme(layout="rope-tv-causal", options=(("rate", 0.5),))
    assert measure_properties(half).rate == 0.5
    assert measure_properties(half).scheme == "rope-tv-causal(rate=0.5)"
    assert table["m-rope"].rate is None
    assert table["grid"].rate == 0
    assert table["flux"].rate is None, "text is not counted there"


def test_compatibility_is_lost_with_the_ladder_of_text():
    assert measure.compatible(SCHEMES["rope-tv"].replace(theta=1e6))
    assert measure.compatible(
        SCHEMES["rope-tv"].replace(extensions=(YaRN(factor=4.0, original_max_positions=64),))
    )
    assert measure.compatible(SCHEMES["m-rope"].replace(unrotated_fraction=0.5))
    assert not measure.compatible(SCHEMES["rope-tv"].replace(ladder="own"))
    assert not measure.compatible(SCHEMES["rope-tv"].replace(freq_scale=(1.0, 1.0, 0.5)))
    along_rows = YaRN(factor=4.0, original_max_positions=64, axes=("y",))
    assert not measure.compatible(SCHEMES["rope-tv"].replace(extensions=(along_rows,)))


SIZES = st.integers(1, 5)


def principles(scheme, y, x, frames=(1, 2, 3, 5)):
    """Which of the four principles hold for videos of this size, of these numbers of frames."""
    images = [measure.image_in_text(scheme, Video(t, y, x), before) for t in frames for before in (1, 4)]
    return {
        "compatible": measure.compatible(scheme),
        "equivalent": measure.rate(images) == 1,
        "symmetric": all(bool(measure.symmetric(image).all()) for image in images),
        "causal": measure.causal(scheme, y, x),
    }


@given(y=SIZES, x=SIZES)
def test_a_drift_of_the_frames_own_span_keeps_all_four_principles(y, x):
    options = (("rate", 1.0), ("drift", float(y * x)))
    assert all(principles(Scheme(layout="rope-tv-causal", options=options), y, x).values())


@given(y=SIZES, x=SIZES, rate=st.sampled_from([0.5, 1.0, 2.0]), drift=st.integers(0, 60).map(lambda n: n / 2))
def test_within_the_family_of_rate_and_drift_no_other_keeps_all_four(y, x, rate, drift):
    scheme = Scheme(layout="rope-tv-causal", options=(("rate", rate), ("drift", drift)))
    kept = principles(scheme, y, x)
    assert kept["compatible"]
    assert kept["symmetric"]
    assert kept["causal"]
    assert kept["equivalent"] == (rate == 1 and drift == y * x)


def drifting(cursor, segment, drift=(0.0, 0.0, 0.0)):
    """Frames of a unit grid, any drift on each axis, and the one start that is symmetric and equivalent."""
    t, y, x = segment.grid
    ends = [(n - 1) + d * (t - 1) for n, d in zip((1, y, x), drift, strict=True)]
    origin = [cursor.next + (segment.tokens - 1 - end) / 2 for end in ends]
    return grid_positions(segment.grid, origin, (drift, (0, 1, 0), (0, 0, 1))), cursor.next + segment.tokens


@given(data=st.data(), y=SIZES, x=SIZES)
def test_symmetry_equivalence_and_unknown_length_leave_no_other_drift_on_any_axis(data, y, x):
    # x_a(1) - L = (y x t + 1 - (n_a - 1) - drift_a (t - 1)) / 2 must not know t
    span = float(y * x)
    near = st.one_of(st.just(span), st.sampled_from([0.0, 1.0, span / 2, span + 1, 2 * span]))
    drift = data.draw(st.tuples(near, near, near))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, "drifting", Layout(TYX, drifting, "this test"))
        kept = principles(Scheme(layout="drifting", options=(("drift", drift),)), y, x)
    assert kept["compatible"]
    assert kept["equivalent"]
    assert kept["symmetric"]
    assert kept["causal"] == (drift == (span,) * 3)


def congruent(cursor, segment, offsets=(), steps=()):
    """Frames of one shape with any steps between them, the first centred: causal and equivalent."""
    t, y, x = segment.grid
    shape = torch.tensor(offsets, dtype=torch.float64)[: y * x]
    moved = torch.tensor([(0.0, 0.0, 0.0), *steps], dtype=torch.float64)[:t].cumsum(0)
    start = cursor.next + (y * x - 1 - shape[0] - shape[-1]) / 2
    return (start + moved[:, None] + shape).flatten(0, 1), cursor.next + segment.tokens


@given(data=st.data(), y=SIZES, x=SIZES)
def test_causal_symmetric_equivalent_frames_of_any_shape_drift_by_their_number_of_patches(data, y, x):
    # The theorem of docs/theory.md. L is the last text position, R(t) = L + y x t + 1 the next one after t
    # frames. Symmetric: first - L = R(t) - last(t) for every t, with one first, by causality. The difference
    # of two such equations is last(t + 1) - last(t) = R(t + 1) - R(t) = y x, whatever a frame's shape is.
    span = float(y * x)
    near = st.one_of(st.just(span), st.sampled_from([0.0, 1.0, span + 1]))
    steps = data.draw(
        st.one_of(st.just([(span,) * 3] * 7), st.lists(st.tuples(near, near, near), min_size=7))
    )
    whole = st.integers(-20, 20).map(float)
    offsets = data.draw(st.lists(st.tuples(whole, whole, whole), min_size=y * x, max_size=y * x))
    options = (("offsets", tuple(offsets)), ("steps", tuple(steps)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, "congruent", Layout(TYX, congruent, "this test"))
        kept = principles(Scheme(layout="congruent", options=options), y, x, frames=range(1, 6))
    assert kept["equivalent"]
    assert kept["causal"]
    assert kept["symmetric"] == all(step == (span,) * 3 for step in steps[:4])


def test_text_need_not_surround_the_image():
    scheme = SCHEMES["rope-tv"]
    assert measure.collisions(scheme, "image:2x2 image:2x2") == (0, 0)
    assert measure.collisions(SCHEMES["grid"], "image:2x2 image:2x2") == (8, 0)
    assert measure.rotating_positions(scheme, [Text(1)]).shape == (1, 3)
