import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import (
    LAYOUTS,
    SCHEMES,
    Image,
    LayoutProperties,
    Rotary,
    RotaryReport,
    Scheme,
    Text,
    Video,
    check_rotary,
    measure_properties,
    properties_table,
    rotate,
)
from rope_mm.analysis import properties as measure
from rope_mm.analysis.check import probe_positions
from rope_mm.positions.grids import grid_positions
from rope_mm.positions.layouts import TYX, Layout
from rope_mm.rotary.definition import PAIRINGS
from rope_mm.schemes.extensions import YaRN

OMEGA = 100.0 ** -(torch.arange(8, dtype=torch.float64) / 8)


def on(cos, sin, pairing="half"):
    """Heads x (b, s, h, d) times cos plus their quarter turn times sin, both (s, d), as models write it."""
    split, join = PAIRINGS[pairing]

    def one(x):
        first, second = split(x)
        return x * cos[:, None] + join(-second, first) * sin[:, None]

    return lambda q, k: (one(q), one(k))


def plain(q, k, p):
    angle = p @ OMEGA[None]
    twice = torch.cat((angle, angle), -1)
    return on(twice.cos(), twice.sin())(q, k)


def v_jepa2(q, k, p):
    """Angles repeated as half-split pairs want them, channels rotated as neighbours."""
    angle = p @ OMEGA[None]
    twice = torch.cat((angle, angle), -1)
    return on(twice.cos(), twice.sin(), "interleaved")(q, k)


def hunyuan_vl(q, k, p):
    """The d doubled angles of each axis, cut by twice its section: a pair's members get different axes."""
    angle = torch.cat((p[..., None] * OMEGA,) * 2, -1)  # (s, a, d)
    mixed = torch.cat([part[:, axis] for axis, part in enumerate(angle.split(4, dim=-1))], -1)
    return on(mixed.cos(), mixed.sin())(q, k)


def squared(q, k, p):
    return plain(q, k, p**2)


def product_of_axes(q, k, p):
    return plain(q, k, p.prod(-1, keepdim=True))


def check(rope, axes=1, **options):
    return check_rotary(rope, head_dim=16, axes=axes, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("heads", [None, 4])
def test_every_scheme_is_rotary(scheme, heads):
    rope = Rotary(64, scheme, heads=heads)
    assert check_rotary(rope).ok
    report = check_rotary(rope, reach=64)
    assert report.ok, report
    assert max(report.rotation, report.same_for_q_k, report.origin) < 1e-14
    assert report.scale == 1
    # LTX rotates by 15708 radians a step: an angle is rounded in proportion to its size
    angle = 4 * 64 * rope.omega.detach().abs().sum(-2).max().item()
    assert report.relative < 2 * torch.finfo(torch.float64).eps * (1 + angle)


def test_what_models_write_is_rotary():
    assert check(plain, heads=3).ok


@pytest.mark.parametrize(("wrong", "axes"), [(v_jepa2, 1), (hunyuan_vl, 4)])
def test_an_encoding_that_changes_lengths_is_caught(wrong, axes):
    report = check(wrong, axes)
    assert not report.ok
    assert report.rotation > 0.1
    assert report.origin == 0
    p = torch.tensor([report.position], dtype=torch.float64)
    q = torch.eye(16, dtype=torch.float64)[:, None, None]
    turned, _ = wrong(q, q, p)
    gram = turned[:, 0, 0] @ turned[:, 0, 0].T
    assert (gram - report.scale**2 * torch.eye(16)).abs().max() > 0.1, "the token named is one that fails"
    assert f"NO  a rotation, times {report.scale:.6g}" in str(report)
    assert f"worst at {report.position}" in str(report)


@pytest.mark.parametrize(("wrong", "axes"), [(squared, 1), (product_of_axes, 2)])
def test_a_rotation_that_sees_absolute_positions_is_caught_with_its_pair(wrong, axes):
    report = check(wrong, axes)
    assert not report.ok
    assert report.rotation < 1e-14
    assert report.relative > 0.1
    assert str(report).splitlines()[1] == (
        f"NO  relative: error {report.relative:.1e}, worst between {report.pair[0]} and {report.pair[1]} "
        f"in channels {report.channels[0]} and {report.channels[1]}"
    )

    def scores(start):
        """q at the start against k as far from it as the pair is apart."""
        here, there = torch.tensor(report.pair, dtype=torch.float64)
        q = torch.randn(1, 2, 1, 16, dtype=torch.float64).expand(1, 2, 1, 16)
        turned_q, turned_k = wrong(q, q, torch.stack((start, start + there - here)))
        return turned_q[0, 0, 0] @ turned_k[0, 1, 0]

    torch.manual_seed(1)
    moved = scores(torch.tensor(report.pair[0], dtype=torch.float64))
    torch.manual_seed(1)
    assert abs(moved - scores(torch.zeros(axes, dtype=torch.float64))) > 1e-3


def test_queries_treated_otherwise_than_keys_are_caught():
    def one_sided(q, k, p):
        return plain(q, k, p)[0], k

    report = check(one_sided)
    assert report.rotation < 1e-14
    assert not report.ok
    assert report.same_for_q_k > 1


def test_queries_that_grow_as_keys_shrink_are_relative_but_no_rotation():
    def xpos(q, k, p):
        q, k = plain(q, k, p)
        growth = (p / 512).exp()[..., None]
        return q * growth, k / growth

    report = check(xpos, reach=64)
    assert report.relative < 1e-13
    assert report.rotation > 0.1
    assert report.same_for_q_k > 0.1


def test_a_token_at_the_origin_that_turns_is_caught():
    report = check(lambda q, k, p: plain(q, k, p + 1), reach=64)
    assert max(report.rotation, report.relative, report.same_for_q_k) < 1e-13
    assert not report.ok
    assert report.origin == pytest.approx(2 * math.sin(0.5) * math.cos(0.5))
    assert str(report).splitlines()[4].startswith("NO  the origin not rotated: error 8.4e-01")


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_an_attention_factor_is_a_scale_and_no_error(fraction):
    yarn = YaRN(factor=8.0, original_max_positions=64)
    report = check_rotary(Rotary(32, "rope-tv", fraction=fraction, extensions=(yarn,)))
    assert report.ok
    assert report.scale == pytest.approx(0.1 * math.log(8) + 1)


def test_a_learned_encoding_stays_rotary_as_it_learns():
    rope = Rotary(16, "rope-vit-mixed", heads=2)
    with torch.no_grad():
        rope.omega_param.normal_()
    assert check_rotary(rope).ok


def test_functions_in_float32_are_checked_with_their_own_tolerance():
    def single(q, k, p):
        return rotate(q, k, p, OMEGA[None])

    report = check(single, dtype=torch.float32, tolerance=1e-5)
    assert report.ok
    assert report.relative > 1e-9
    assert not replace(report, tolerance=1e-9).ok


def test_nan_is_no_rotation():
    report = check(lambda q, k, p: (q * math.nan, k))
    assert isinstance(report, RotaryReport)
    assert not report.ok
    assert str(report).startswith("NO  a rotation")


def test_a_callable_must_say_its_sizes_and_keep_its_shape():
    with pytest.raises(ValueError, match="give head_dim= and axes="):
        check_rotary(plain, head_dim=16)
    with pytest.raises(ValueError, match="must keep their shape"):
        check(lambda q, k, p: (q[..., :4], k))


def moved(change):
    """The encoding of models at positions that are changed on the way."""
    return lambda q, k, p: plain(q, k, change(p))


def beyond_200(q, k, p):
    return plain(q, k, torch.where(p.abs() > 200, p + 1, p))


def by_content(q, k, p):
    return plain(q, k, p * (1 + q[..., :1].mean() / 100))


def mixing_tokens(q, k, p):
    q, k = plain(q, k, p)
    return q + q.roll(1, 1) / 100, k + k.roll(1, 1) / 100


MISTAKES = {
    "cut to whole numbers": moved(torch.floor),
    "cut to quarters": moved(lambda p: (p * 4).floor() / 4),
    "cast to int": moved(lambda p: p.long().double()),
    "cast to bfloat16": moved(lambda p: p.bfloat16().double()),
    "cast to float16": moved(lambda p: p.half().double()),
    "clamped at 0": moved(lambda p: p.clamp(min=0)),
    "clamped at 128": moved(lambda p: p.clamp(max=128)),
    "clamped at 2048": moved(lambda p: p.clamp(-2048, 2048)),
    "clamped at 131072": moved(lambda p: p.clamp(-131072, 131072)),
    "absolute": moved(torch.abs),
    "repeating after 4096": moved(lambda p: p % 4096),
    "wrong beyond 200": beyond_200,
    "angles of the content": by_content,
    "tokens mixed": mixing_tokens,
    "queries squared": lambda q, k, p: plain(q * q.abs(), k, p),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_common_mistakes_are_caught(mistake):
    report = check(MISTAKES[mistake])
    assert not report.ok
    assert "NO" in str(report)


@pytest.mark.parametrize("mistake", ["cut to whole numbers", "clamped at 128", "wrong beyond 200"])
def test_the_pair_and_channels_that_a_report_names_fail(mistake):
    wrong = MISTAKES[mistake]
    report = check(wrong)
    (here, there), (row, column) = report.pair, report.channels
    unit = torch.eye(16, dtype=torch.float64)[:, None, None]

    def between(start, end):
        p = torch.tensor([start, end], dtype=torch.float64)
        q, k = wrong(unit.expand(-1, 2, -1, -1), unit.expand(-1, 2, -1, -1), p)
        return q[row, 0, 0] @ k[column, 1, 0]

    origin = (0.0,)
    delta = tuple(b - a for a, b in zip(here, there, strict=True))
    assert abs(between(here, there) - between(origin, delta)).item() == pytest.approx(report.relative)


def test_content_that_changes_the_angles_is_named_with_its_position():
    report = check(by_content)
    assert report.linear > 1e-3
    assert f"NO  linear in q and k: error {report.linear:.1e}, worst at {report.linear_at}" in str(report)


def test_a_table_is_checked_at_whole_positions_below_its_length():
    table = torch.arange(512.0, dtype=torch.float64)[:, None]

    def by_table(q, k, p):
        return plain(q, k, table[p[:, 0].long()])

    assert check(by_table, whole=True, reach=200).ok
    assert not check(by_table, reach=200).ok


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("axes", [1, 3])
def test_probes_are_exact_in_float32_and_reach_where_they_should(axes, whole):
    p = probe_positions(axes, 2.0**18, whole)
    assert torch.equal(p.float().double(), p)
    assert p[0, 0].eq(0).all()
    assert torch.equal(p - p[:, :1], (p - p[:, :1])[:1].expand_as(p)), "the steps are the same at every start"
    assert p.abs().max() > 2**17 and (p.abs() > 2048).any()
    assert bool((p % 1).any()) != whole and bool((p < 0).any()) != whole


def test_numbers_of_the_check_are_checked():
    for name, value in (("reach", 0), ("tolerance", -1.0), ("head_dim", 1.5), ("heads", 0)):
        with pytest.raises(ValueError, match=f"check_rotary: {name} must be"):
            check_rotary(plain, **{"head_dim": 16, "axes": 1, name: value})


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
