"""Scheme: a field without effect is refused, and an axis without pairs is named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import SCHEMES, Rotary, Scheme
from rope_mm.schemes.extensions import YaRN
from rope_mm.schemes.frequencies import DIRECTIONS, SPACINGS, make_omega

OTHERS = {"theta": 777.0, "freq_range": (2.0, 9.0), "axis_shares": (1, 3), "ladder": "own"}


@given(
    st.sampled_from(sorted(SPACINGS)),
    st.sampled_from([*sorted(DIRECTIONS), "chunk", "round-robin"]),
    st.sampled_from(sorted(OTHERS)),
)
def test_a_field_is_refused_exactly_where_it_would_not_change_omega(spacing, ownership, field):
    fields = {"spacing": spacing, "ownership": ownership}
    fields |= {"freq_range": (1.0, 50.0)} if spacing != "geometric" else {}
    changed = fields | {field: OTHERS[field]}
    effect = not torch.equal(make_omega(2, 12, heads=4, **fields), make_omega(2, 12, heads=4, **changed))
    scheme = Scheme(layout="grid", axis_order=("y", "x"), **fields)
    assert (field not in scheme.unused) == effect
    if effect:
        assert not torch.equal(scheme.omega(24, 4), scheme.replace(**{field: OTHERS[field]}).omega(24, 4))
        return
    with pytest.raises(ValueError, match=f"{field} has no effect with (spacing|ownership) '.*'; "):
        Scheme(layout="grid", axis_order=("y", "x"), **changed)


@pytest.mark.parametrize("name", ["pixel-log", "pixel-linear", "golden-gate", "ltx", "ltx2", "ltx2-audio"])
def test_theta_is_refused_where_frequencies_have_a_range(name):
    with pytest.raises(ValueError, match=r"theta has no effect with spacing '.*'; set freq_range"):
        Rotary(16, name, theta=10.0)


def test_yarn_reads_theta_also_where_frequencies_have_a_range():
    log = {"layout": "grid", "spacing": "log", "freq_range": (1e-3, 1.0)}
    yarn = (YaRN(factor=4, original_max_positions=64),)
    one, other = (Scheme(**log, extensions=yarn, theta=theta) for theta in (1e4, 50.0))
    assert not torch.equal(one.omega(64), other.omega(64))


def test_a_change_of_spacing_leaves_the_fields_of_the_old_one_at_their_defaults():
    log = SCHEMES["dinov3"].replace(spacing="log", freq_range=(1.0, 8.0))
    assert (log.theta, log.freq_range, log.ladder) == (Scheme.theta, (1.0, 8.0), "own")
    back = log.replace(spacing="geometric", theta=100.0)
    assert back == SCHEMES["dinov3"]
    assert SCHEMES["m-rope"].replace(ownership="golden").axis_shares is None


def test_one_ladder_over_all_heads_needs_their_number():
    with pytest.raises(ValueError, match="ladder_over_heads has no effect without heads; give heads="):
        Rotary(16, "rope-tv", ladder_over_heads=True)
    one, many = (Rotary(16, "rope-tv", heads=4, ladder_over_heads=x).omega for x in (False, True))
    assert not torch.equal(one, many)


@pytest.mark.parametrize(
    ("scheme", "head_dim", "heads", "changes", "unseen"),
    [
        ("rope-tv", 4, None, {}, ["x"]),
        ("rope-tv", 6, None, {}, []),
        ("m-rope", 4, 2, {}, ["t"]),
        ("mh-rope", 64, 2, {}, ["t"]),
        ("mh-rope", 64, 3, {}, []),
        ("p-rope", 4, None, {}, ["t"]),
        ("rope-tv", 4, None, {"axis_order": ("t", "y")}, []),
        ("rope-tv", 4, None, {"axis_shares": (1, 1, 0)}, []),
        ("rope-tv", 64, None, {"freq_scale": (1, 1, 0)}, []),
        ("rope-tv", 64, None, {"freq_scale": 0}, []),
    ],
)
def test_axes_that_no_pair_is_left_for_are_named(scheme, head_dim, heads, changes, unseen):
    chosen = SCHEMES[scheme].replace(**changes)
    assert chosen.unseen_axes(chosen.omega(head_dim, heads)) == unseen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 2**70}, "head_dim must be a whole number >= 1 and <= 65536"),
        ({"heads": 2**70}, "heads must be a whole number >= 1 and <= 65536"),
        ({"length": torch.tensor([1.0])}, "length must be 3 numbers"),
        ({"length": "9"}, "length must be a finite number >= 0, not '9'"),
    ],
)
def test_sizes_that_fill_the_memory_and_lengths_that_are_none_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SCHEMES["rope-tv"].omega(**{"head_dim": 16, **change})
    assert torch.equal(SCHEMES["rope-tv"].omega(16, length=torch.tensor(9.0)), SCHEMES["rope-tv"].omega(16))
    with pytest.raises(ValueError, match="extensions must be extensions such as YaRN"):
        Scheme(layout="grid", extensions=torch.tensor(2.0))
