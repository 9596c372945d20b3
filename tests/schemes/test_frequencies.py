import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import SCHEMES, Rotary, Scheme
from rope_mm.rotary.definition import PAIRINGS
from rope_mm.schemes.frequencies import DIRECTIONS, OWNERSHIPS, apportion, make_omega, ownership_map
from rope_mm.schemes.scheme import PAIRING_NAMES
from rope_mm.schemes.zoo import read_scheme


def owners(omega):
    """Which axis rotates each pair."""
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
def test_equal_shares_give_the_remainder_to_the_first_axes(pairs, counts):
    assert apportion(pairs, (1, 1, 1)) == counts


def test_qwen2_vl_owns_in_chunks_of_16_24_24():
    omega = SCHEMES["m-rope-qwen2-vl"].omega(128)
    assert owners(omega) == [0] * 16 + [1] * 24 + [2] * 24
    torch.testing.assert_close(omega.sum(0), 1e6 ** (-torch.arange(64, dtype=torch.float64) / 64))


def test_qwen3_vl_strides_by_three_and_gives_the_last_pairs_to_time():
    owned = owners(SCHEMES["m-rope-qwen3-vl"].omega(128))
    assert owned[:60] == [0, 1, 2] * 20
    assert owned[60:] == [0] * 4


def test_round_robin_skips_axes_that_have_all_their_pairs():
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


@pytest.mark.parametrize(
    ("scheme", "head_dim", "owned"),
    [
        ("m-rope-qwen2-vl", 32, "ttttyyyyyyxxxxxx"),
        ("m-rope-qwen3-vl", 32, "tyxtyxtyxtyxtyxt"),
        ("m-rope-ernie-4.5-vl", 32, "yxyxyxyxyxyttttt"),
        ("videorope", 32, "yxyxyxyxyxyxtttt"),
        ("hope", 32, "yxyxyxyxyxyx...."),
        ("mm-rope", 32, "ttyxyxyxttyxyxyx"),
        ("vrope", 16, "pqrspqrs"),
        ("rope-tv", 16, "tyxtyxty"),
        ("moonvit", 16, "xyxyxyxy"),
        ("p-rope", 32, "tttt............"),
        ("mixed", 16, "********"),
        ("flux2", 16, "ttyyxxll"),
        ("dual", 20, "ttyyxxiijj"),
    ],
)
def test_one_line_says_which_axis_owns_which_pair(scheme, head_dim, owned):
    spec = SCHEMES[scheme]
    assert ownership_map(spec.omega(head_dim), spec.axes) == owned


def test_headwise_gives_whole_heads_to_axes_and_every_head_the_whole_ladder():
    omega = SCHEMES["mh-rope"].omega(16, heads=8)
    assert ownership_map(omega, "tyx").split() == ["t" * 8] * 2 + ["y" * 8] * 3 + ["x" * 8] * 3
    for head in omega:
        assert torch.equal(head.sum(0), SCHEMES["flat"].omega(16)[0])


ON_AXES = [(name, axes) for name in DIRECTIONS for axes in (1, 2, 3, 4) if name != "spiral" or axes == 2]


@pytest.mark.parametrize(("ownership", "axes"), ON_AXES)
def test_directions_are_unit_vectors_and_frequencies_their_lengths(ownership, axes):
    omega = make_omega(axes, 12, ownership=ownership, heads=4)
    speed = 1e4 ** (-torch.arange(12, dtype=torch.float64) / 12)
    torch.testing.assert_close(omega.norm(dim=1), speed.expand(4, 12))


@pytest.mark.parametrize("axes", [2, 3])
def test_the_corners_of_a_simplex_are_equally_far_apart_and_cancel(axes):
    omega = make_omega(axes, 2 * (axes + 1), ownership="simplex", ladder="own", heads=3)
    for head in omega:
        corners = head[:, : axes + 1]
        inner = corners.T @ corners
        torch.testing.assert_close(inner.diag(), torch.ones(axes + 1, dtype=torch.float64))
        torch.testing.assert_close(inner - inner.diag().diag(), (torch.eye(axes + 1) - 1).double() / axes)
    assert not torch.allclose(omega[0], omega[1])


def test_golden_directions_on_two_axes_are_a_golden_angle_apart():
    omega = make_omega(2, 6, ownership="golden", heads=2, spacing="log", freq_range=(0.2, 20.0))
    wave = torch.complex(*omega.transpose(0, 1).reshape(2, 12))
    step = (wave[1:] / wave[:-1]).angle()
    golden = torch.pi * (5**0.5 - 1) / 2
    torch.testing.assert_close(torch.exp(1j * step), torch.exp(1j * torch.full_like(step, golden)))
    torch.testing.assert_close(
        wave.abs()[:6], torch.logspace(-0.69897, 1.30103, 6).double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("axes", [3, 4])
def test_golden_directions_on_more_axes_are_spread_evenly(axes):
    vectors = make_omega(axes, 500, ownership="golden", theta=1.0, heads=4).transpose(0, 1).reshape(axes, -1)
    torch.testing.assert_close(vectors.mean(1), torch.zeros(axes).double(), atol=0.02, rtol=0)
    spread = vectors @ vectors.T / vectors.shape[1]
    torch.testing.assert_close(spread, torch.eye(axes).double() / axes, atol=0.02, rtol=0)


def test_frequencies_are_spaced_over_their_range():
    ends = {"spacing": "linear", "freq_range": (1.0, 5.0), "ladder": "own", "ownership": "chunk"}
    assert make_omega(2, 10, **ends)[0].sum(0).tolist() == [1, 2, 3, 4, 5] * 2
    ends |= {"spacing": "log", "freq_range": (1.0, 16.0)}
    torch.testing.assert_close(
        make_omega(2, 10, **ends)[0].sum(0), torch.tensor([1.0, 2, 4, 8, 16] * 2).double()
    )
    assert make_omega(2, 2, **ends)[0].sum(0).tolist() == [1, 1]  # a ladder of one place


def test_a_dealt_ladder_is_the_one_of_rope_1d_dealt_out_to_the_axes():
    omega, flat = SCHEMES["pixtral"].omega(16), SCHEMES["flat"].omega(16)[0]
    assert torch.equal(omega[1, :4], flat[0::2])
    assert torch.equal(omega[2, 4:], flat[1::2])


def test_padding_rotates_as_many_pairs_of_each_axis_and_the_first_not_at_all():
    omega = SCHEMES["ltx"].omega(32, heads=2)  # 32 pairs in both heads: 10 an axis, 2 unrotated
    owned = ownership_map(omega, "tyx").replace("\n", "")
    assert owned == ".." + "tyx" * 10
    first, last = omega[0, :, 2:5].sum(0), omega[1, :, -3:].sum(0)
    torch.testing.assert_close(first, torch.full((3,), torch.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(last, torch.full((3,), torch.pi / 2 * 1e4, dtype=torch.float64))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_reads_back_from_json(scheme):
    spec = SCHEMES[scheme]
    assert Scheme.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "scheme",
    [
        n
        for n, s in SCHEMES.items()
        if s.layout in ("m-rope", "rope-tv") and s.fraction == 1 and s.ladder == "shared"
    ],
)
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
    spec = read_scheme("m-rope", axis_shares=[1, 1, 2], theta=500.0)
    assert spec == Scheme(layout="m-rope", ownership="chunk", axis_shares=(1, 1, 2), theta=500.0)
    assert hash(spec) == hash(read_scheme("m-rope", axis_shares=(1, 1, 2), theta=500.0))
    assert repr(spec) == "Scheme(layout='m-rope', theta=500.0, ownership='chunk', axis_shares=(1, 1, 2))"
    with pytest.raises(AttributeError, match="cannot assign to field 'theta'"):
        spec.theta = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ownership": "chunks"}, "did you mean 'chunk'"),
        ({"ladder": "shard"}, "did you mean 'shared'"),
        ({"layout": "rope-vt"}, "layout 'rope-vt' is unknown"),
        ({"axis_shares": (1, 2)}, "3 numbers >= 0, one per axis"),
        ({"channel_offset": "middle"}, "'start', 'end' or 'padded'"),
        ({"axis_order": ("z",)}, r"axis_order names \['z'\]"),
        ({"options": (("rate", 2.0),)}, "takes no options"),
        ({"bases": 3}, "a scheme has no field 'bases'; .*`help"),
        ({"base": 3}, "a scheme has no field 'base'; write 'theta'$"),
        ({"pairs": 3}, "did you mean 'pairing'"),
        ({"fraction": 0.01}, "makes no whole pairs"),
        ({"fraction": 0.0}, "fraction must be a finite number > 0 and <= 1, not 0.0"),
        ({"theta": 0}, "Scheme: theta must be a finite number > 0, not 0"),
        ({"theta": -1.0}, "theta must be a finite number > 0"),
        ({"theta": float("nan")}, "theta must be a finite number > 0, not nan"),
        ({"theta": 1e-300}, "beyond 1.09951e.12 radians a step"),
        ({"theta": "x"}, "theta must be a finite number > 0, not 'x'"),
        ({"freq_scale": float("nan")}, "freq_scale must be a finite number, not nan"),
        ({"freq_scale": 1e308}, "frequencies that are not finite"),
        ({"freq_range": (0, 0), "spacing": "linear"}, "all frequencies are 0"),
        (
            {"extensions": [{"rope_type": "linear", "factor": 2, "axes": ("t", "t")}]},
            "Linear: axes names each axis once",
        ),
        ({"freq_scale": (1.0, 2.0)}, "freq_scale is one number or one for each of"),
        ({"attention_factor": 0}, "attention_factor must be a finite number > 0"),
        ({"unrotated_fraction": 1.5}, "unrotated_fraction must be a finite number >= 0 and < 1, not 1.5"),
        ({"axis_order": ("t", "t")}, r"names each axis once, not \('t', 't'\)"),
        ({"axis_shares": (1, 2, -1)}, "axis_shares must be a list of numbers, each a finite number >= 0"),
        ({"axis_shares": (0, 0, 0)}, "not all 0"),
        ({"freq_range": (0, 0), "spacing": "log"}, "'log' must be > 0"),
        ({"freq_range": (1, 2, 3)}, "freq_range must be 2 numbers"),
        ({"spacing": "lin"}, "did you mean 'linear'"),
        ({"pairing": "halves"}, "pairing must be 'half', 'interleaved' or 'block', not 'halves'"),
        ({"pairing": "block", "channel_offset": "padded", "fraction": 0.5}, "has no padded channels"),
        ({"learnable": 1}, "learnable must be True or False"),
        (
            {"layout": "v2pe", "options": {"stride": 0}},
            "layout 'v2pe': stride must be a finite number > 0, not 0",
        ),
        ({"extensions": [5]}, "holds extensions or their dicts, not 5"),
        ({"theta": 1e-300, "freq_scale": 1e300}, "frequencies that are not finite"),
        ({"still": 0.5}, "a scheme has no field 'still'; write 'unrotated_fraction'"),
        ({"slot": "tail"}, "write 'channel_offset'"),
        ({"extensions": 3}, "extensions must be extensions such as YaRN"),
        ({"extensions": "yarn"}, "extensions must be extensions such as YaRN"),
        ({"extensions": [{"rope_type": ["yarn"]}]}, r"rope_type \['yarn'\] is unknown"),
        ({"options": 3}, "options must be a dict"),
        ({"options": ["rate"]}, "options must be a dict"),
        ({"axis_order": 3}, "axis_order must be a list of names, not 3"),
        ({"axis_order": [["t"]]}, "axis_order must be a list of names"),
        ({"axis_order": "tyx"}, "axis_order names"),
        *(
            ({name: [value]}, f"{name} .*{value}.* is unknown")
            for name, value in (
                ("layout", "grid"),
                ("ladder", "own"),
                ("spacing", "log"),
                ("ownership", "chunk"),
            )
        ),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_scheme("rope-tv", **change).omega(64)


@pytest.mark.parametrize("head_dim", [63, 1])
def test_an_odd_head_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim}"):
        SCHEMES["rope-tv"].omega(head_dim)


def test_lists_and_numbers_of_numpy_make_the_same_scheme():
    plain = Scheme(
        layout="rope-tv-causal",
        options=(("rate", 0.5),),
        axis_order=("y", "x", "t"),
        axis_shares=(1, 1, 2),
        freq_scale=(1.0, 1.0, 0.5),
        theta=500.0,
        fraction=0.5,
    )
    other = Scheme(
        layout="rope-tv-causal",
        options={"rate": np.float32(0.5)},
        axis_order=["y", "x", "t"],
        axis_shares=np.array([1, 1, 2]),
        freq_scale=[1.0, 1.0, 0.5],
        theta=torch.tensor(500),
        fraction=np.float64(0.5),
    )
    assert plain == other and hash(plain) == hash(other) and repr(plain) == repr(other)
    assert torch.equal(plain.omega(np.int64(32), torch.tensor(2)), plain.omega(32, 2))


@pytest.mark.parametrize("heads", [0, -1, 1.5, True])
def test_heads_are_a_whole_number_of_at_least_one(heads):
    with pytest.raises(ValueError, match=f"heads must be a whole number >= 1 and <= 65536, not {heads}"):
        SCHEMES["rope-tv"].omega(64, heads)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("rope-1d", "flat"), ("rope-2d", "rope-2d"), ("rope-3d", "grid"), ("axial", "rope-2d")],
)
def test_common_names_find_their_scheme(alias, name):
    assert read_scheme(alias) is SCHEMES[name]


@pytest.mark.parametrize(
    ("unknown", "found"),
    [
        ("RoPE-TV", "'rope-tv'"),
        ("vision", "'qwen2-vl-vision' or 'kimi-vision' or 'llama4-vision'"),
        ("qwen2", "'m-rope-qwen2-vl'"),
        ("golden_gate_rope", "'golden-gate'"),
    ],
)
def test_an_unknown_scheme_is_answered_with_near_names(unknown, found):
    with pytest.raises(ValueError, match=f"scheme '{unknown}' is unknown; did you mean .*{found}"):
        read_scheme(unknown)


def test_rope_2d_rotates_by_rows_and_columns_and_nothing_else():
    rope = Rotary(64, "rope-2d")
    p, _ = rope.place("unrotated:1 image:14x14")
    assert p.shape == (197, 2)
    assert p[0].tolist() == [0, 0] and p[-1].tolist() == [13, 13]
    assert ownership_map(rope.omega, rope.scheme.axes) == "y" * 16 + "x" * 16
    assert rope.omega[0].max() == rope.omega[1].max() == 1


def test_the_pairings_of_a_scheme_are_those_of_the_definition():
    assert set(PAIRING_NAMES) == set(PAIRINGS)
