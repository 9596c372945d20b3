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
    "dynamic": DynamicNTK(factor=4.0, original=64.0),
    "yarn": YaRN(factor=4.0, original=64.0),
    "llama3": Llama3(factor=4.0, original=64.0),
    "longrope": LongRoPE(short=(1.0,) * 8, long=(4.0,) * 8, original=64.0, factor=4.0),
    "riflex": RIFLEx(original=64.0, axes=("t",)),
}


def extended(scheme, extension, length=0.0, head_dim=48):
    return scheme.change(extensions=(extension,)).omega(head_dim, None, length)


@given(factor=FACTORS)
def test_interpolation_is_division_of_the_positions(factor):
    torch.testing.assert_close(extended(AXIAL, Linear(factor=factor)) * factor, AXIAL.omega(48))


@given(factor=FACTORS, theta=st.floats(10, 1e6), pairs=st.integers(2, 64))
def test_ntk_is_a_larger_theta(factor, theta, pairs):
    flat = Scheme(layout="flat", theta=theta)
    larger = flat.change(theta=theta * factor ** (pairs / (pairs - 1)))
    torch.testing.assert_close(
        extended(flat, NTK(factor=factor), head_dim=2 * pairs), larger.omega(2 * pairs)
    )


@given(factor=FACTORS, length=st.floats(0, 1000))
def test_dynamic_ntk_grows_with_the_length_past_the_original_alone(factor, length):
    dynamic = DynamicNTK(factor=factor, original=100.0)
    ntk = NTK(factor=factor * max(length, 100) / 100 - factor + 1)
    torch.testing.assert_close(extended(AXIAL, dynamic, length), extended(AXIAL, ntk))


@given(factor=FACTORS, original=st.floats(8, 1e5))
def test_yarn_and_llama3_keep_fast_pairs_and_interpolate_slow_ones(factor, original):
    omega = SCHEMES["flat"].omega(128)[0]
    turns = omega * original / math.tau
    for extension, fast, slow in (
        (YaRN(factor=factor, original=original, truncate=False), 32, 1),
        (Llama3(factor=factor, original=original), 4, 1),
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
        torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, extension.attention**2))
    assert mscale(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert YaRN(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0).attention == 1.0
    assert SOME["longrope"].attention == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_longrope_takes_its_long_factors_past_the_original_length():
    scheme = Scheme(layout="flat", extensions=(SOME["longrope"],))
    assert torch.equal(scheme.omega(16, None, 64), SCHEMES["flat"].omega(16))
    assert torch.equal(scheme.omega(16, None, 65), SCHEMES["flat"].omega(16) / 4)
    with pytest.raises(ValueError, match="8 factors for 16 pairs"):
        scheme.omega(32)


def test_riflex_slows_one_pair_of_time_and_only_where_the_video_is_longer_than_its_period():
    omega, riflex = VIDEO.omega(128), RIFLEx(original=60.0, axes=("t",))
    period = math.tau / omega[0, :8]
    k = (period - 60).abs().argmin().item()
    assert torch.equal(extended(VIDEO, riflex, period[k].item(), head_dim=128), omega)
    long = extended(VIDEO, riflex, 400.0, head_dim=128)
    changed = (long != omega).nonzero().tolist()
    assert changed == [[0, k]]
    assert long[0, k].item() == pytest.approx(0.9 * math.tau / 400)


def test_riflex_refuses_an_axis_along_which_words_are_counted():
    with pytest.raises(ValueError, match=r"is for frames, but words walk along \['t'\]"):
        SCHEMES["m-rope"].change(extensions=(RIFLEx(original=60.0, axes=("t",)),))
    with pytest.raises(ValueError, match="is for frames"):
        SCHEMES["rope-tv"].change(extensions=(RIFLEx(original=60.0),))


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
    alone = Scheme(layout="grid", order=(axis,), ladder="own", theta=VIDEO.theta)
    if kind != "riflex":
        expected = extended(alone, replace(own, axes=()), 500.0, head_dim=2 * pairs)[mine]
        torch.testing.assert_close(ours[mine][plain[mine] != 0], expected)


def test_an_extension_of_one_axis_of_a_dense_omega_is_refused():
    with pytest.raises(ValueError, match="a pair turns on several"):
        extended(SCHEMES["mixed"], Linear(factor=2.0, axes=("y",)))
    torch.testing.assert_close(extended(SCHEMES["mixed"], Linear(factor=2.0)) * 2, SCHEMES["mixed"].omega(48))


def test_several_extensions_work_one_after_another():
    both = VIDEO.change(
        extensions=(RIFLEx(original=60.0, axes=("t",)), NTK(factor=2.0, axes=("y", "x")))
    ).omega(48, None, (300.0, 1.0, 1.0))
    assert torch.equal(both[0], extended(VIDEO, RIFLEx(original=60.0, axes=("t",)), (300.0, 1.0, 1.0))[0])
    assert torch.equal(both[1:], extended(VIDEO, NTK(factor=2.0, axes=("y", "x")))[1:])


def test_the_module_measures_the_length_itself_or_is_told():
    rope = Rotary(16, Scheme(layout="flat", extensions=(DynamicNTK(factor=2.0, original=8.0),)))
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
    scheme = base.change(extensions=(SOME[kind],))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert hash(scheme) == hash(scheme.change())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "did you mean 'yarn'"),
        ({"rope_type": "yarn", "factor": 2.0}, r"yarn takes axes, factor, original.*not \['factor'\]"),
        ({"rope_type": "linear", "factor": 2.0, "speed": 1}, "linear takes axes, factor"),
        ({"factor": 2.0}, "rope_type '' is unknown"),
        ({"rope_type": "linear", "factor": 2.0, "axes": ["z"]}, r"extends \['z'\], but the axes are"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        SCHEMES["rope-tv"].change(extensions=[entries])
