"""check_rotary names what is no rotation, or sees more than distances."""

import math
from dataclasses import replace

import pytest
import torch

from rope_mm import (
    SCHEMES,
    Rotary,
    RotaryReport,
    check_rotary,
    rotate,
)
from rope_mm.analysis.check import probe_positions
from rope_mm.rotary.definition import PAIRINGS
from rope_mm.schemes.extensions import DynamicNTK, YaRN

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
def test_every_scheme_is_rotary(scheme):
    of_heads = SCHEMES[scheme].per_head or SCHEMES[scheme].ladder_over_heads
    rope = Rotary(64, scheme, heads=3 if of_heads else None)
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
    "nothing left": lambda q, k, p: (0 * q, 0 * k),
    "divided by the farthest position": moved(lambda p: p / p.abs().max()),
    "slower once a token is far": moved(lambda p: p / 2 if p.max() > 2048 else p),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_common_mistakes_are_caught(mistake):
    report = check(MISTAKES[mistake])
    assert not report.ok
    assert "NO" in str(report)


FAR_MISTAKES = {
    "one more": lambda p, far: p + (p > far),
    "one more at both sides": lambda p, far: p + p.sign() * (p.abs() > far),
    "faster": lambda p, far: torch.where(p > far, p * 1.01, p),
    "clamped": lambda p, far: p.clamp(max=far),
    "starting anew": lambda p, far: torch.where(p > far, p - far, p),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("far", [20, 200, 2048, 3000, 131_072])
@pytest.mark.parametrize("mistake", FAR_MISTAKES)
def test_what_is_wrong_only_beyond_a_position_is_caught_on_each_axis(mistake, far, whole):
    change = FAR_MISTAKES[mistake]

    def wrong(q, k, p, axis):
        one = change(p[:, axis], far)
        return rotate(q, k, p.index_copy(1, torch.tensor([axis]), one[:, None]), OMEGA.expand(2, -1))

    for axis in (0, 1):
        report = check(lambda q, k, p, axis=axis: wrong(q, k, p, axis), axes=2, whole=whole)
        assert not report.ok, axis
        start, end = (token[axis] for token in report.pair)
        assert max(abs(start), abs(end), abs(end - start)) >= far, "the pair named, or its step, is beyond it"


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


def test_angles_that_depend_on_the_longest_sequence_are_named():
    report = check_rotary(Rotary(32, "flat", extensions=(DynamicNTK(factor=2.0, original_max_positions=64),)))
    assert max(report.rotation, report.linear, report.origin) < 1e-12
    assert report.alone > 1e-3
    assert f"NO  the same without tokens farther away: error {report.alone:.1e}" in str(report)


def test_content_that_changes_the_angles_is_named_with_its_position():
    report = check(by_content)
    assert report.linear > 1e-3
    assert f"NO  linear in q and k: error {report.linear:.1e}, worst at {report.linear_at}" in str(report)


def test_a_table_is_checked_at_whole_positions_below_its_length():
    table = torch.arange(201.0, dtype=torch.float64)[:, None]

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
    assert 2**17 < p.abs().max() <= 2**18 and (p.abs() > 2048).any()
    assert bool((p % 1).any()) != whole and bool((p < 0).any()) != whole


def test_numbers_of_the_check_are_checked():
    for name, value in (("reach", 0), ("tolerance", -1.0), ("head_dim", 1.5), ("heads", 0)):
        with pytest.raises(ValueError, match=f"check_rotary: {name} must be"):
            check_rotary(plain, **{"head_dim": 16, "axes": 1, name: value})


def test_code_that_counts_tokens_and_ignores_positions_is_found():
    def counted(q, k, p):
        return plain(q, k, torch.arange(len(p), dtype=p.dtype)[:, None])

    assert not check_rotary(counted, head_dim=16, axes=1).ok
    assert check_rotary(plain, head_dim=16, axes=1).ok


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (lambda q, k, p: None, "NoneType"),
        (lambda q, k, p: q, "Tensor"),
        (lambda q, k, p: (q, None), r"\['Tensor', 'NoneType'\]"),
        (lambda q, k, p: (q.numpy(), k.numpy()), r"\['ndarray', 'ndarray'\]"),
    ],
)
def test_a_callable_that_returns_other_than_two_tensors_is_refused(found, kinds):
    with pytest.raises(ValueError, match=f"must return the tensors .q, k., not {kinds}"):
        check_rotary(found, head_dim=16, axes=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_rotary(3, head_dim=16, axes=1), "give a Rotary or a function"),
        (lambda: check_rotary(Rotary(16), dtype="float32"), "dtype is 'float32'; give that of the heads"),
        (lambda: check_rotary(Rotary(16), dtype=torch.int64), "dtype is torch.int64; give that of the heads"),
    ],
)
def test_what_is_no_rotary_and_no_dtype_of_heads_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
