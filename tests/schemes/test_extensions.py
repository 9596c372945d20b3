import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import SCHEMES, Rotary, Scheme
from rope_mm.schemes.extensions import (
    EXTENSIONS,
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RIFLEx,
    YaRN,
    mscale,
)

AXIAL = SCHEMES["grid"]
VIDEO = SCHEMES["hunyuan-video"]
FACTORS = st.floats(1.0, 16.0)
SOME = {
    "linear": Linear(factor=4.0),
    "ntk": NTK(factor=4.0),
    "dynamic": DynamicNTK(factor=4.0, original_max_positions=64.0),
    "yarn": YaRN(factor=4.0, original_max_positions=64.0),
    "llama3": Llama3(factor=4.0, original_max_positions=64.0),
    "longrope": LongRoPE(short=(1.0,) * 8, long=(4.0,) * 8, original_max_positions=64.0, factor=4.0),
    "riflex": RIFLEx(original_max_positions=64.0, axes=("t",)),
}


def extended(scheme, extension, length=0.0, head_dim=48):
    return scheme.replace(extensions=(extension,)).omega(head_dim, None, length)


@given(factor=FACTORS)
def test_interpolation_is_division_of_the_positions(factor):
    torch.testing.assert_close(extended(AXIAL, Linear(factor=factor)) * factor, AXIAL.omega(48))


@given(factor=FACTORS, theta=st.floats(10, 1e6), pairs=st.integers(2, 64))
def test_ntk_equals_a_scheme_with_a_larger_theta(factor, theta, pairs):
    flat = Scheme(layout="flat", theta=theta)
    larger = flat.replace(theta=theta * factor ** (pairs / (pairs - 1)))
    torch.testing.assert_close(
        extended(flat, NTK(factor=factor), head_dim=2 * pairs), larger.omega(2 * pairs)
    )


@given(factor=FACTORS, length=st.floats(0, 1000))
def test_dynamic_ntk_grows_with_the_length_past_the_original_alone(factor, length):
    dynamic = DynamicNTK(factor=factor, original_max_positions=100.0)
    ntk = NTK(factor=factor * max(length, 100) / 100 - factor + 1)
    torch.testing.assert_close(extended(AXIAL, dynamic, length), extended(AXIAL, ntk))


@given(factor=FACTORS, original=st.floats(8, 1e5))
def test_yarn_and_llama3_keep_high_frequencies_and_interpolate_low_ones(factor, original):
    omega = SCHEMES["flat"].omega(128)[0]
    turns = omega * original / math.tau
    for extension, fast, slow in (
        (YaRN(factor=factor, original_max_positions=original, truncate=False), 32, 1),
        (Llama3(factor=factor, original_max_positions=original), 4, 1),
    ):
        ours = extended(SCHEMES["flat"], extension, head_dim=128)[0]
        torch.testing.assert_close(ours[turns > fast * 1.01], omega[turns > fast * 1.01])
        torch.testing.assert_close(ours[turns < slow / 1.01], omega[turns < slow / 1.01] / factor)
        assert (ours <= omega * (1 + 1e-12)).all() and (ours >= omega / factor * (1 - 1e-12)).all()


def test_yarn_and_longrope_scale_cosine_and_sine():
    positions = torch.arange(5.0, dtype=torch.float64)[:, None]
    for extension in (SOME["yarn"], replace(SOME["yarn"], attention_factor=0.7), SOME["longrope"]):
        scheme = Scheme(layout="flat", extensions=(extension,))
        cos, sin = Rotary(16, scheme).cos_sin(positions, torch.float64)
        torch.testing.assert_close(
            cos.square() + sin.square(), torch.full_like(cos, extension.attention_scaling**2)
        )
    assert mscale(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert (
        YaRN(factor=40, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0).attention_scaling == 1.0
    )
    assert SOME["longrope"].attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_longrope_takes_its_long_factors_past_the_original_length():
    scheme = Scheme(layout="flat", extensions=(SOME["longrope"],))
    assert torch.equal(scheme.omega(16, None, 64), SCHEMES["flat"].omega(16))
    assert torch.equal(scheme.omega(16, None, 65), SCHEMES["flat"].omega(16) / 4)
    with pytest.raises(ValueError, match="8 factors for 16 pairs"):
        scheme.omega(32)


def test_riflex_lowers_one_frequency_and_only_where_the_video_is_longer_than_its_period():
    omega, riflex = VIDEO.omega(128), RIFLEx(original_max_positions=60.0, axes=("t",))
    period = math.tau / omega[0, :8]
    k = (period - 60).abs().argmin().item()
    assert torch.equal(extended(VIDEO, riflex, period[k].item(), head_dim=128), omega)
    long = extended(VIDEO, riflex, 400.0, head_dim=128)
    changed = (long != omega).nonzero().tolist()
    assert changed == [[0, k]]
    assert long[0, k].item() == pytest.approx(0.9 * math.tau / 400)


def test_riflex_refuses_an_axis_along_which_text_is_counted():
    with pytest.raises(ValueError, match=r"is for frames, but text is counted on \['t'\], too"):
        SCHEMES["m-rope"].replace(extensions=(RIFLEx(original_max_positions=60.0, axes=("t",)),))
    with pytest.raises(ValueError, match="is for frames"):
        SCHEMES["rope-tv"].replace(extensions=(RIFLEx(original_max_positions=60.0),))


@pytest.mark.parametrize("kind", [kind for kind in EXTENSIONS if kind != "longrope"])
@pytest.mark.parametrize("axis", ["t", "y", "x"])
def test_an_extension_of_one_axis_leaves_the_others_and_counts_in_its_own_units(kind, axis):
    mine, own = "tyx".index(axis), replace(SOME[kind], axes=(axis,))
    lengths = [500.0 if i == mine else 1.0 for i in range(3)]
    plain, ours = VIDEO.omega(48), extended(VIDEO, own, lengths)
    others = [i for i in range(3) if i != mine]
    assert torch.equal(ours[others], plain[others])
    assert not torch.equal(ours[mine], plain[mine])
    # the same numbers as on a ladder of this axis alone
    pairs = int(plain[mine].count_nonzero())
    alone = Scheme(layout="grid", axis_order=(axis,), ladder="own", theta=VIDEO.theta)
    if kind != "riflex":
        expected = extended(alone, replace(own, axes=()), 500.0, head_dim=2 * pairs)[mine]
        torch.testing.assert_close(ours[mine][plain[mine] != 0], expected)


def test_an_extension_of_one_axis_of_a_dense_omega_is_refused():
    with pytest.raises(ValueError, match="several axes rotate one pair"):
        extended(SCHEMES["mixed"], Linear(factor=2.0, axes=("y",)))
    torch.testing.assert_close(extended(SCHEMES["mixed"], Linear(factor=2.0)) * 2, SCHEMES["mixed"].omega(48))


def test_several_extensions_work_one_after_another():
    both = VIDEO.replace(
        extensions=(RIFLEx(original_max_positions=60.0, axes=("t",)), NTK(factor=2.0, axes=("y", "x")))
    ).omega(48, None, (300.0, 1.0, 1.0))
    assert torch.equal(
        both[0], extended(VIDEO, RIFLEx(original_max_positions=60.0, axes=("t",)), (300.0, 1.0, 1.0))[0]
    )
    assert torch.equal(both[1:], extended(VIDEO, NTK(factor=2.0, axes=("y", "x")))[1:])


def test_the_module_finds_the_length_itself_or_takes_it():
    rope = Rotary(16, Scheme(layout="flat", extensions=(DynamicNTK(factor=2.0, original_max_positions=8.0),)))
    positions, _ = rope.place("text:20")
    q = torch.randn(1, 20, 2, 16, dtype=torch.float64)
    whole = rope(q, q, positions)[0]
    assert torch.equal(rope.angles(positions, q.dtype).rotate_one(q), whole)
    chunk = rope.angles(positions[:9], q.dtype, length=20).rotate_one(q[:, :9])
    torch.testing.assert_close(chunk, whole[:, :9])
    assert not torch.allclose(rope(q[:, :9], q[:, :9], positions[:9])[0], whole[:, :9])


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_scheme_with_extensions_reads_back_from_json(kind):
    base = VIDEO if kind == "riflex" else SCHEMES["flat"]
    scheme = base.replace(extensions=(SOME[kind],))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert hash(scheme) == hash(scheme.replace())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "did you mean 'yarn'"),
        (
            {"rope_type": "yarn", "factor": 2.0},
            r"yarn takes axes, factor, original_max_positions.*not \['factor'\]",
        ),
        ({"rope_type": "linear", "factor": 2.0, "speed": 1}, "linear takes axes, factor"),
        ({"factor": 2.0}, "rope_type '' is unknown"),
        ({"rope_type": "linear", "factor": 2.0, "axes": ["z"]}, r"extends \['z'\], but the axes are"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        SCHEMES["rope-tv"].replace(extensions=[entries])


FLAT = SCHEMES["flat"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(factor=0), "Linear: factor must be a finite number > 0, not 0"),
        (lambda: NTK(factor=-2.0), "NTK: factor must be a finite number > 0, not -2.0"),
        (lambda: DynamicNTK(factor=2.0, original_max_positions=0), "original_max_positions must be a finite"),
        (lambda: YaRN(factor="x", original_max_positions=64), "factor must be a finite number > 0, not 'x'"),
        (
            lambda: YaRN(factor=4, original_max_positions=64, beta_fast=1, beta_slow=32),
            "beta_fast 1 must be >",
        ),
        (
            lambda: YaRN(factor=40, original_max_positions=64, mscale=0.707),
            "mscale=0.707 with mscale_all_dim=None",
        ),
        (lambda: YaRN(factor=40, original_max_positions=64, mscale_all_dim=1.0), "give both of them"),
        (
            lambda: Llama3(factor=4, original_max_positions=64, high_freq_factor=1),
            "high_freq_factor 1 must be >",
        ),
        (
            lambda: LongRoPE(short=(1,), long=(0,), original_max_positions=64, factor=2),
            "long must be a list of",
        ),
        (lambda: LongRoPE(short=(1,), long=(1,), original_max_positions=1, factor=2), "must be > 1"),
        (
            lambda: RIFLEx(original_max_positions=float("inf")),
            "original_max_positions must be a finite number",
        ),
        (lambda: extended(FLAT.replace(theta=1.0), SOME["yarn"]), "theta, which must be > 1, not 1"),
        (
            lambda: extended(VIDEO.replace(axis_shares=(0, 1, 1)), SOME["riflex"]),
            r"extends \['t'\], which rotate no pair",
        ),
        (
            lambda: FLAT.replace(extensions=[{"rope_type": "yarn", "factor": 2, "original": 64}]),
            "yarn: 'original' is called 'original_max_positions'",
        ),
    ],
)
def test_numbers_of_an_extension_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_attention_factor_stands_in_for_one_mscale():
    yarn = YaRN(factor=40, original_max_positions=64, mscale=0.707, attention_factor=1.2608)
    assert yarn.attention_scaling == 1.2608
