import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import SCHEMES, Rotary, parse_segments, place, rotate
from rope_mm.kernels import Turn

STORY = parse_segments("text:4 image:2x3 text:2 video:2x2x2 text:1")
TOKENS = 21


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
@given(shift=st.lists(st.floats(-50, 50), min_size=3, max_size=3))
def test_scores_depend_only_on_relative_position(scheme, shift):
    rope = Rotary(24, scheme, heads=2 if scheme == "mixed" else None)
    positions, _ = rope.place(STORY)
    q, k = heads()
    moved = positions + torch.tensor(shift, dtype=torch.float64)[: positions.shape[-1]]
    here, there = (scores(*rope(q, k, p)) for p in (positions, moved))
    torch.testing.assert_close(here, there, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norms_are_kept(scheme):
    rope = Rotary(24, scheme)
    q, k = heads()
    for before, after in zip((q, k), rope(q, k, rope.place(STORY)[0]), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


@pytest.mark.parametrize("scheme", [name for name, s in SCHEMES.items() if s.ladder == "shared"])
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


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_reach_q_k_omega_and_positions(pairing, per_head):
    q, k = (x.requires_grad_() for x in heads(b=2, s=3, d=8))
    positions = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    omega = torch.randn(*((2,) if per_head else ()), 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, positions, omega)
    assert torch.autograd.gradcheck(lambda *a: rotate(*a, pairing), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: rotate(*a, pairing), inputs)


@pytest.mark.parametrize("scheme", ["rope-tv", "m-rope-qwen2-vl", "grid"])
@pytest.mark.parametrize("far", [0, 10**4, 10**6, 2**23 - 1])
def test_angles_are_exact_however_far_the_token_stands(scheme, far):
    rope = Rotary(128, scheme)
    positions = rope.place(STORY)[0] + far
    cos, sin = rope.cos_sin(positions)
    angle = positions @ rope.omega
    truth = torch.polar(torch.ones_like(angle), angle)
    error = torch.complex(cos[:, :64].double(), sin[:, :64].double()) - truth
    assert error.abs().max() < 3e-7


def test_the_tables_rotate_as_the_module_does():
    for pairing in ("half", "interleaved"):
        rope = Rotary(16, "rope-tv", pairing=pairing)
        q, k = heads(d=16)
        positions, _ = rope.place(STORY)
        cos, sin = (table[:, None, :] for table in rope.cos_sin(positions, torch.float64))
        swapped = torch.cat((-q[..., 8:], q[..., :8]), -1)
        if pairing == "interleaved":
            swapped = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
        torch.testing.assert_close(q * cos + swapped * sin, rope(q, k, positions)[0])


def test_partial_rotation_turns_the_first_channels_and_leaves_the_rest():
    rope = Rotary(32, "rope-tv", fraction=0.25)
    q, k = heads(d=32)
    turned, _ = rope(q, k, rope.place(STORY)[0])
    assert rope.omega.shape == (3, 4)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert not torch.equal(turned[..., :8], q[..., :8])


def test_a_turn_made_once_serves_every_layer():
    rope = Rotary(24)
    positions, _ = rope.place(STORY)
    turn = rope.turn(positions, torch.float64)
    assert isinstance(turn, Turn)
    for _ in range(2):
        q, k = heads()
        for a, b in zip(rope(q, k, turn), rope(q, k, positions), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_what_is_rotated_and_its_rounding_alone(dtype):
    rope = Rotary(24)
    positions = rope.place(STORY)[0] + 10_000
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
    scores(*rope(q, k, rope.place(STORY)[0])).square().mean().backward()
    optimizer.step()
    assert rope.omega.shape == (2, 3, 12)
    assert not torch.equal(rope.omega, before)
    rope.reset_parameters()
    assert torch.equal(rope.omega, before)


def test_a_module_without_learned_omega_has_nothing_to_save():
    assert Rotary(24).state_dict() == {}
    assert set(Rotary(24, learnable=True).state_dict()) == {"learned"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, p, o: rotate(q, k[:, :-1], p, o), "q and k must be"),
        (lambda q, k, p, o: rotate(q[0], k[0], p, o), "q and k must be"),
        (lambda q, k, p, o: rotate(q, k, p[:-1], o), "positions \\(20, 3\\) do not fit q"),
        (lambda q, k, p, o: rotate(q, k, p[:, :2], o), "a = 3 axes of Omega"),
        (lambda q, k, p, o: rotate(q, k, p.index_fill(0, torch.tensor(2), torch.nan), o), "NaN or infinity"),
        (
            lambda q, k, p, o: rotate(q, k, p, torch.ones(3, 13)),
            "13 pairs need 26 channels, but a head has 24",
        ),
        (lambda q, k, p, o: rotate(q, k, p, torch.ones(3, 3, 4)), "Omega has 3 heads, which must divide"),
        (lambda q, k, p, o: rotate(q, k, p, o, "halves"), "did you mean 'half'"),
        (lambda q, k, p, o: Rotary(24, "rope-vt"), "scheme 'rope-vt' is unknown; did you mean"),
        (lambda q, k, p, o: Rotary(25), "head_dim 25"),
        (lambda q, k, p, o: Rotary(24, pairing="halves"), "did you mean 'half'"),
        (lambda q, k, p, o: Rotary(24)(q[:, :3], k[:, :3], Rotary(24).turn(p)), "made for 21 tokens"),
        (lambda q, k, p, o: Rotary(24, heads=2).cos_sin(p), "a table is shared by all heads"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    positions, _ = place(STORY)
    with pytest.raises(ValueError, match=message) as error:
        call(*heads(), positions, torch.ones(3, 12))
    assert "\n" not in str(error.value)
