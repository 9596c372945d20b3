import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from rope_mm import SCHEMES, Rotary, parse_segments, place, rotate
from rope_mm.rotary import definition as rotation
from rope_mm.rotary.dispatch import RotaryAngles

SEGMENTS = parse_segments("text:4 image:2x4 text:2 video:2x2x2 unrotated:1 text:1")
TOKENS = 24
# a text alone is rotated as by RoPE-1D of the same theta
COMPATIBLE = [
    name
    for name, s in SCHEMES.items()
    if s.ladder == "shared"
    and s.layout not in ("flux", "flux2", "lumina", "z-image")
    and s
    == s.replace(
        fraction=1.0,
        channel_offset="start",
        unrotated_fraction=0.0,
        spacing="geometric",
        pairing="half",
        freq_scale=1.0,
    )
]


def heads(b=1, s=TOKENS, h=4, g=2, d=24, dtype=torch.float64):
    return torch.randn(b, s, h, d, dtype=dtype), torch.randn(b, s, g, d, dtype=dtype)


def scores(q, k):
    """Attention logits (b, h, s, s) with grouped keys."""
    return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def by_complex(x, positions, omega, pairing="half"):
    """The rotation written as a product of complex numbers, in float64: an independent truth."""
    h, r = x.shape[-2], omega.shape[-1]
    omega = (
        omega.double()
        .reshape(-1, *omega.shape[-2:])
        .repeat_interleave(h // omega.reshape(-1, *omega.shape[-2:]).shape[0], 0)
    )
    angle = (positions.double()[..., None, :, None] * omega).sum(-2)  # (..., s, h, r)
    y = x.double()
    first, second = (
        (y[..., :r], y[..., r : 2 * r]) if pairing == "half" else (y[..., : 2 * r : 2], y[..., 1 : 2 * r : 2])
    )
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    turned = torch.cat((z.real, z.imag), -1) if pairing == "half" else torch.view_as_real(z).flatten(-2)
    return torch.cat((turned, y[..., 2 * r :]), -1)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(shift=st.lists(st.floats(-50, 50), min_size=5, max_size=5))
def test_scores_depend_only_on_relative_position(scheme, shift):
    rope = Rotary(24, scheme, heads=2 if SCHEMES[scheme].per_head else None)
    positions, _ = rope.place(SEGMENTS)
    q, k = heads()
    turns = torch.tensor(shift, dtype=torch.float64)[: positions.shape[-1]]
    fastest = rope.omega.abs().max().clamp(min=1).item()
    moved = positions + turns / fastest
    here, there = (scores(*rope(q, k, p)) for p in (positions, moved))
    within = 1e-11 * max(10, fastest)  # a sum of positions is rounded, and the rounding is turned
    torch.testing.assert_close(here, there, atol=within, rtol=within)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norms_are_kept(scheme):
    rope = Rotary(24, scheme, heads=2 if SCHEMES[scheme].per_head else None)
    q, k = heads()
    for before, after in zip((q, k), rope(q, k, rope.place(SEGMENTS)[0]), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


@pytest.mark.filterwarnings("ignore:no pair rotates along .*; give heads=:UserWarning")  # one row will do
@pytest.mark.parametrize("scheme", COMPATIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_alone_is_rotated_as_by_rope_1d_bit_for_bit(scheme, dtype):
    rope, plain = Rotary(32, scheme, theta=1e4), Rotary(32, "flat")
    q, k = heads(s=300, d=32, dtype=dtype)
    ours, theirs = (r(q, k, r.place("text:300")[0]) for r in (rope, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("shared", [True, False], ids=["positions (s, a)", "positions (b, s, a)"])
@pytest.mark.parametrize("per_head", [1, 2], ids=["omega (a, r)", "omega (n, a, r)"])
def test_rotation_is_a_product_of_complex_numbers(pairing, shared, per_head):
    q, k = heads(b=2, d=20)
    positions = torch.randn(*(() if shared else (2,)), TOKENS, 3, dtype=torch.float64) * 100
    omega = torch.randn(*((per_head,) if per_head > 1 else ()), 3, 8, dtype=torch.float64)
    for x, turned in zip((q, k), rotate(q, k, positions, omega, pairing), strict=True):
        torch.testing.assert_close(turned, by_complex(x, positions, omega, pairing))
        assert torch.equal(turned[..., 16:], x[..., 16:])  # channels past 2r are left alone


@given(
    d=st.integers(5, 12),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda blocks: sum(blocks) <= 5),
    pairing=st.sampled_from(["half", "interleaved", "block"]),
    tail=st.booleans(),
    factor=st.floats(0.5, 2),
)
def test_pairings_slices_and_factors_turn_the_channels_that_they_name(d, blocks, pairing, tail, factor):
    d, r = 2 * d, sum(blocks)
    q, k = heads(b=1, s=3, d=d)
    positions, omega = torch.randn(3, 2).double(), torch.randn(2, r).double()
    pairs = {
        "half": [(i, i + r) for i in range(r)],
        "interleaved": [(2 * i, 2 * i + 1) for i in range(r)],
        "block": [
            (2 * sum(blocks[:b]) + i, 2 * sum(blocks[:b]) + i + n)
            for b, n in enumerate(blocks)
            for i in range(n)
        ],
    }[pairing]
    form = {"blocks": blocks if pairing == "block" else (), "tail": tail, "factor": factor}
    for x, turned in zip((q, k), rotate(q, k, positions, omega, pairing, **form), strict=True):
        expected = x.clone()
        for (i, j), column in zip(pairs, omega.T, strict=True):
            i, j = (c + (d - 2 * r if tail else 0) for c in (i, j))
            z = torch.complex(x[..., i], x[..., j]) * factor * torch.exp(1j * (positions @ column))[:, None]
            expected[..., i], expected[..., j] = z.real, z.imag
        torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("scheme", ["rope-tv", "gemma4-vision", "deepseek-mla", "mh-rope"])
def test_the_inverse_takes_a_turn_back_its_factor_included(scheme):
    rope = Rotary(24, scheme, heads=2 if SCHEMES[scheme].per_head else None, attention_factor=1.3)
    positions, _ = rope.place(SEGMENTS)
    q, k = heads()
    angles = rope.angles(positions, torch.float64)
    for x, back in zip((q, k), angles.inverse.rotate(*angles.rotate(q, k)), strict=True):
        torch.testing.assert_close(back, x)
    torch.testing.assert_close(angles.inverse.inverse.rotate_one(q), angles.rotate_one(q))
    torch.testing.assert_close(rope.rotate_one(q, positions), angles.rotate(q, k)[0])


def test_queries_and_keys_may_stand_at_places_of_their_own():
    rope = Rotary(24)
    q, k = heads(s=5)[0], heads(s=9)[1]
    here, there = rope.place("text:5")[0] + 4, rope.place("text:9")[0]
    turned_q, turned_k = rope(q, k, here, there)
    assert torch.equal(turned_q, rope.rotate_one(q, here))
    assert torch.equal(turned_k, rope.rotate_one(k, there))
    moved = scores(*rope(q, k, here + 100, there + 100))
    torch.testing.assert_close(scores(turned_q, turned_k), moved)


def test_angles_are_as_wide_as_the_device_has_floats():
    assert [rotation.widest_float(device) for device in ("cpu", torch.device("mps", 0), "meta")] == [
        torch.float64,
        torch.float32,
        torch.float64,
    ]


def test_tokens_that_stand_still_are_not_rotated():
    rope = Rotary(24)
    positions, _ = rope.place(SEGMENTS)
    q, k = heads()
    turned, _ = rope(q, k, positions)
    still = (positions == 0).all(-1)
    assert still.nonzero().flatten().tolist() == [0, 22]  # the first word, and the segment unrotated:1
    assert torch.equal(turned[:, still], q[:, still])


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_reach_q_k_omega_and_positions(pairing, per_head):
    q, k = (x.requires_grad_() for x in heads(b=2, s=3, d=8))
    positions = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    omega = torch.randn(*((2,) if per_head else ()), 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, positions, omega)
    assert torch.autograd.gradcheck(lambda *a: rotate(*a, pairing), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: rotate(*a, pairing), inputs)


def exact_turns(positions, omega):
    """e^(i angle) from exact products and sums of the given numbers, whole turns dropped before rounding."""
    with mpmath.workprec(160):
        rows = [
            [
                mpmath.expj(sum(mpmath.mpf(p) * mpmath.mpf(w) for p, w in zip(row, pair, strict=True)))
                for pair in omega.T.tolist()
            ]
            for row in positions.tolist()
        ]
    return torch.tensor([[complex(z) for z in row] for row in rows], dtype=torch.complex128)


@pytest.mark.filterwarnings("ignore:no pair rotates along .*; give heads=:UserWarning")  # one row will do
@pytest.mark.parametrize("scheme", SCHEMES)
def test_angles_are_exact_however_far_the_token_stands(scheme):
    rope = Rotary(16, scheme)
    near, _ = rope.place("text:1 image:2x2")
    positions = torch.cat([near + far for far in (0, 10**4, 10**6, 2**23 - 8)])
    cos, sin = rotation.cos_sin(positions, rope.omega)
    truth = exact_turns(positions, rope.omega)
    error = torch.complex(cos.double(), sin.double())[:, 0] - truth
    # LTX turns by 15,708 radians a unit: there float64 itself ends at 2e-5
    assert error.abs().max() < (3e-7 if rope.omega.abs().max() < 100 else 1e-4)


def test_the_tables_rotate_as_the_module_does():
    for pairing in ("half", "interleaved"):
        rope = Rotary(16, "rope-tv", pairing=pairing)
        q, k = heads(d=16)
        positions, _ = rope.place(SEGMENTS)
        cos, sin = (table[:, None, :] for table in rope.cos_sin(positions, torch.float64))
        swapped = torch.cat((-q[..., 8:], q[..., :8]), -1)
        if pairing == "interleaved":
            swapped = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
        torch.testing.assert_close(q * cos + swapped * sin, rope(q, k, positions)[0])


def test_partial_rotation_turns_the_first_channels_and_leaves_the_rest():
    rope = Rotary(32, "rope-tv", fraction=0.25)
    q, k = heads(d=32)
    turned, _ = rope(q, k, rope.place(SEGMENTS)[0])
    assert rope.omega.shape == (3, 4)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert not torch.equal(turned[..., :8], q[..., :8])


def test_a_turn_made_once_serves_every_layer():
    rope = Rotary(24)
    positions, _ = rope.place(SEGMENTS)
    angles = rope.angles(positions, torch.float64)
    assert isinstance(angles, RotaryAngles)
    for _ in range(2):
        q, k = heads()
        for a, b in zip(rope(q, k, angles), rope(q, k, positions), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_what_is_rotated_and_its_rounding_alone(dtype):
    rope = Rotary(24)
    positions = rope.place(SEGMENTS)[0] + 10_000
    q, k = heads(dtype=dtype)
    for x, turned in zip((q, k), rope(q, k, positions), strict=True):
        truth = by_complex(x, positions, rope.omega)
        assert turned.dtype == dtype
        assert (turned.double() - truth).abs().max() <= torch.finfo(
            dtype
        ).eps * truth.abs().max() + 3e-7 * x.abs().max()


@pytest.mark.parametrize("learnable", [False, True])
def test_casting_the_module_leaves_omega_exact(learnable):
    rope = Rotary(64, "rope-tv", learnable=learnable)
    before = rope.omega.clone()
    for cast in (rope.bfloat16, rope.half, rope.double, rope.float):
        cast()
        assert torch.equal(rope.omega, before)


def test_a_learned_omega_is_a_parameter_that_training_moves():
    rope = Rotary(24, "mixed", heads=2)
    optimizer = torch.optim.SGD(rope.parameters(), 0.1)
    before = rope.omega.detach().clone()
    q, k = heads(dtype=torch.float32)
    scores(*rope(q, k, rope.place(SEGMENTS)[0])).square().mean().backward()
    optimizer.step()
    assert rope.omega.shape == (2, 3, 12)
    assert not torch.equal(rope.omega, before)
    rope.reset_parameters()
    assert torch.equal(rope.omega, before)


def test_autocast_leaves_angles_exact():
    rope = Rotary(24)
    positions = rope.place(SEGMENTS)[0] + 10_000
    q, k = heads(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = (*rope(q, k, positions), *rope.cos_sin(positions))
    for a, b in zip(inside, (*rope(q, k, positions), *rope.cos_sin(positions)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_module_built_on_the_meta_device_has_its_omega_and_gets_its_learned_one_back(scheme):
    heads = 3 if SCHEMES[scheme].per_head else None
    real = Rotary(24, scheme, heads=heads)
    with torch.device("meta"):
        rope = Rotary(24, scheme, heads=heads)
    assert rope.omega.device.type == ("meta" if rope.omega_param is not None else "cpu")
    rope.to_empty(device="cpu")
    rope.reset_parameters()
    assert torch.equal(rope.omega, real.omega)


def test_a_learned_omega_or_positions_in_half_precision_are_refused():
    rope = Rotary(24, learnable=True)
    positions, _ = rope.place(SEGMENTS)
    q, k = heads()
    with pytest.raises(ValueError, match="cannot count past 256"):
        rope(q, k, positions.bfloat16())
    rope.omega_param.data = rope.omega_param.data.bfloat16()  # as FSDP's mixed precision hands it over
    with pytest.raises(ValueError, match="shard this module by itself"):
        rope(q, k, positions)


def test_a_module_without_learned_omega_has_nothing_to_save():
    assert Rotary(24).state_dict() == {}
    assert set(Rotary(24, learnable=True).state_dict()) == {"omega_param"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, p, o: rotate(q, k[:, :-1], p, o), "q and k must be"),
        (lambda q, k, p, o: rotate(q[0], k[0], p, o), "q and k must be"),
        (lambda q, k, p, o: rotate(q, k, p[:-1], o), "positions \\(23, 3\\) do not fit q"),
        (lambda q, k, p, o: rotate(q, k, p[:, :2], o), "a = 3 axes of Omega"),
        (lambda q, k, p, o: rotate(q, k, p.index_fill(0, torch.tensor(2), torch.nan), o), "NaN or infinity"),
        (
            lambda q, k, p, o: rotate(q, k, p, torch.ones(3, 13)),
            "13 pairs need 26 channels, but a head has 24",
        ),
        (lambda q, k, p, o: rotate(q, k, p, torch.ones(3, 3, 4)), "Omega has 3 heads, which must divide"),
        (lambda q, k, p, o: rotate(q, k, p, o, "halves"), "did you mean 'half'"),
        (
            lambda q, k, p, o: rotate(q, k, p, o, "block", blocks=(5, 6)),
            "sum to the 12 pairs",
        ),
        (lambda q, k, p, o: Rotary(24, "rope-vt"), "scheme 'rope-vt' is unknown; did you mean"),
        (lambda q, k, p, o: Rotary(25), "head_dim 25"),
        (lambda q, k, p, o: Rotary(24, pairing="halves"), "did you mean 'half'"),
        (lambda q, k, p, o: Rotary(24)(q[:, :3], k[:, :3], Rotary(24).angles(p)), "made for 24 tokens"),
        (
            lambda q, k, p, o: Rotary(24)(q[:1], k[:1], Rotary(24).angles(p.expand(3, -1, -1))),
            "positions are of 3 rows, but heads of 1",
        ),
        (lambda q, k, p, o: Rotary(24, heads=2).cos_sin(p), "a table is shared by all heads"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    positions, _ = place(SEGMENTS)
    with pytest.raises(ValueError, match=message) as error:
        call(*heads(), positions, torch.ones(3, 12))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width", [8, 32])
def test_a_rotary_refuses_heads_of_another_width_than_its_own(width):
    rope, x = Rotary(16, "rope-tv"), torch.randn(1, 3, 2, width)
    positions, _ = rope.place("text:3")
    for call in (
        lambda: rope(x, x, positions),
        lambda: rope.rotate_one(x, positions),
        lambda: rope(x, None, positions),
    ):
        with pytest.raises(
            ValueError, match=f"heads have {width} channels, but this Rotary is for head_dim 16"
        ):
            call()


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (
            {"head_dim": 4, "scheme": "rope-tv"},
            "along x, .*; take more channels than 4, or leave the axis",
        ),
        ({"head_dim": 64, "scheme": "mh-rope"}, "along t, x, .*; give heads=, the number of key heads"),
        ({"head_dim": 64, "scheme": "mh-rope", "heads": 2}, "along t, .* or more heads"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_warns_of_an_axis_that_its_heads_are_too_small_or_too_few_for(arguments, cure, device):
    with pytest.warns(UserWarning, match=cure), torch.device(device):
        Rotary(**arguments)
    with FakeTensorMode(), pytest.warns(UserWarning, match=cure):
        Rotary(**arguments)
