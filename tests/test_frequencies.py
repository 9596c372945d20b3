import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import SCHEMES, Scheme
from rope_mm.frequencies import OWNERSHIPS, apportion, make_omega
from rope_mm.schemes import read_scheme


def owners(omega):
    """Which axis turns each pair."""
    assert (omega.count_nonzero(0) == 1).all()
    return omega.abs().argmax(0).tolist()


@given(st.integers(1, 128), st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_every_pair_is_given_to_one_axis_within_one_of_its_share(pairs, shares):
    counts = apportion(pairs, tuple(shares))
    assert sum(counts) == pairs
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - pairs * share / sum(shares)) < 1


@pytest.mark.parametrize(
    ("pairs", "counts"), [(32, [11, 11, 10]), (48, [16, 16, 16]), (64, [22, 21, 21]), (128, [43, 43, 42])]
)
def test_equal_shares_put_what_is_left_over_on_the_first_axes(pairs, counts):
    assert apportion(pairs, (1, 1, 1)) == counts


def test_qwen2_vl_owns_in_chunks_of_16_24_24():
    omega = SCHEMES["m-rope-qwen2-vl"].omega(128)
    assert owners(omega) == [0] * 16 + [1] * 24 + [2] * 24
    torch.testing.assert_close(omega.sum(0), 1e6 ** (-torch.arange(64, dtype=torch.float64) / 64))


def test_qwen3_vl_strides_by_three_and_leaves_the_tail_to_time():
    owned = owners(SCHEMES["m-rope-qwen3-vl"].omega(128))
    assert owned[:60] == [0, 1, 2] * 20
    assert owned[60:] == [0] * 4


def test_round_robin_takes_turns_and_skips_who_is_served():
    assert OWNERSHIPS["round-robin"]([3, 1, 2]) == [0, 1, 2, 0, 2, 0]
    assert owners(SCHEMES["rope-tv-2d"].omega(8)) == [0, 1, 0, 1]


def test_stride3_and_round_robin_differ_where_shares_do():
    # the word "interleaved" has meant both
    assert OWNERSHIPS["stride3"]([8, 12, 12]).count(0) == 11
    assert OWNERSHIPS["round-robin"]([8, 12, 12]).count(0) == 8


def test_an_own_ladder_starts_at_one_radian_on_every_axis():
    omega = SCHEMES["grid"].omega(48, None)
    assert omega.shape == (3, 24)
    for axis in omega:
        ladder = axis[axis != 0]
        torch.testing.assert_close(ladder, 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8))


@pytest.mark.parametrize("scheme", [name for name, s in SCHEMES.items() if s.ladder == "shared"])
def test_a_shared_ladder_is_the_one_of_rope_1d_whoever_owns_it(scheme):
    spec = read_scheme(scheme, theta=1e4)
    assert torch.equal(spec.omega(64).sum(0), SCHEMES["flat"].omega(64)[0])


def test_a_dense_omega_turns_every_pair_on_every_axis_along_perpendicular_directions():
    omega = make_omega(3, 12, ownership="dense", ladder="own", heads=4)
    assert torch.equal(omega, make_omega(3, 12, ownership="dense", ladder="own", heads=4))
    assert omega.shape == (4, 3, 12)
    assert (omega != 0).all()
    for head in omega:
        triple = head[:, ::4] / head[:, ::4].norm(dim=0)
        torch.testing.assert_close(triple.T @ triple, torch.eye(3, dtype=torch.float64))
    assert not torch.allclose(omega[0], omega[1])


def test_a_scheme_is_hashable_printable_and_reads_its_own_lists_as_tuples():
    spec = read_scheme("m-rope", shares=[1, 1, 2], theta=500.0)
    assert spec == Scheme(layout="m-rope", ownership="chunk", shares=(1, 1, 2), theta=500.0)
    assert hash(spec) == hash(read_scheme("m-rope", shares=(1, 1, 2), theta=500.0))
    assert "theta=500.0" in repr(spec)
    with pytest.raises(AttributeError):
        spec.theta = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ownership": "chunks"}, "did you mean 'chunk'"),
        ({"ladder": "shard"}, "did you mean 'shared'"),
        ({"layout": "rope-vt"}, "layout 'rope-vt' is unknown"),
        ({"shares": (1, 2)}, "3 numbers >= 0, one per axis"),
        ({"bases": 3}, "a scheme has no \\['bases'\\]"),
        ({"fraction": 0.0}, "makes no whole pairs"),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_scheme("rope-tv", **change).omega(64)


@pytest.mark.parametrize("head_dim", [63, 1])
def test_an_odd_head_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim}"):
        SCHEMES["rope-tv"].omega(head_dim)
