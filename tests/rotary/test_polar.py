"""PoPE against its formula in float64, its gradients, and what it must not depend on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention, softplus

from rope_mm import SCHEMES, PoPE

few = settings(max_examples=10, deadline=None)
SEGMENTS = "text:3 image:2x3 text:2"
FITTING = ["flat", "rope-tv", "m-rope-qwen3-vl", "flux2", "gemma4-vision", "golden-gate", "ltx2"]


def make(scheme, head_dim=8, heads=2, dtype=torch.float64):
    """A PoPE with a bias, its positions, and random queries of twice as many heads as the keys have."""
    pope = PoPE(head_dim, scheme, heads=heads).to(dtype)
    torch.nn.init.uniform_(pope.bias, -3, 3)
    positions, _ = pope.rope.place(SEGMENTS)
    q = torch.randn(2, len(positions), 2 * heads, head_dim, dtype=dtype)
    return pope, positions, q, torch.randn(2, len(positions), heads, head_dim, dtype=dtype)


def scores(q, k):
    return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def by_formula(pope, q, k, positions):
    """The article's sum, one head and pair of tokens after another."""
    omega = pope.rope.omega.double().expand(pope.heads, -1, -1)
    group = q.shape[2] // k.shape[2]
    out = torch.zeros(len(q), q.shape[2], q.shape[1], k.shape[1], dtype=torch.float64)
    for head in range(q.shape[2]):
        phase = positions @ omega[head // group]
        for i in range(len(positions)):
            for j in range(len(positions)):
                angle = phase[j] + pope.bias[head // group] - phase[i]
                magnitudes = softplus(q[:, i, head]) * softplus(k[:, j, head // group])
                out[:, head, i, j] = (magnitudes * angle.cos()).sum(-1)
    return out


@pytest.mark.parametrize("scheme", FITTING)
def test_scores_are_those_of_the_formula(scheme):
    pope, positions, q, k = make(scheme)
    torch.testing.assert_close(scores(*pope(q, k, positions)), by_formula(pope, q, k, positions))


def test_float32_is_near_the_formula_at_far_positions():
    pope, positions, q, k = make("rope-tv")
    far = positions + 100_000
    truth = by_formula(pope, q, k, far)
    ours = scores(*pope.float()(q.float(), k.float(), far))
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-5)


def test_frequencies_are_those_of_the_article():
    """theta ** -(c / d) for channel c of all d, not for every second one."""
    omega = PoPE(16, heads=1).rope.omega[0]
    torch.testing.assert_close(omega, 1e4 ** -(torch.arange(16, dtype=torch.float64) / 16))


@few
@given(shift=st.floats(-1000, 1000))
def test_scores_depend_on_differences_of_positions_alone(shift):
    pope, positions, q, k = make("rope-tv")
    here, there = (scores(*pope(q, k, p)) for p in (positions, positions + shift))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


def test_content_moves_no_phase():
    """One channel, one query at 0: over key positions the score is one cosine times the magnitudes."""
    pope = PoPE(1, heads=1, theta=1.0).double()
    positions = torch.arange(50, dtype=torch.float64)[:, None]
    q, k = torch.full((1, 50, 1, 1), -2.0).double(), torch.randn(1, 50, 1, 1).double()
    found = scores(*pope(q, k, positions))[0, 0, 0]
    magnitudes = softplus(q[0, 0, 0]) * softplus(k[0, :, 0, 0])
    torch.testing.assert_close(found, magnitudes * positions[:, 0].cos())


def test_gradients_reach_queries_keys_bias_positions_and_omega():
    pope = PoPE(4, "rope-tv", heads=2, learnable=True).double()
    torch.nn.init.uniform_(pope.bias, -3, 3)
    positions = pope.rope.place("text:1 image:1x2")[0].requires_grad_()
    q, k = (torch.randn(1, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    names = ("bias", "rope.omega_param")
    learned = [pope.get_parameter(name).detach().double().requires_grad_() for name in names]

    def run(q, k, positions, *weights):
        return torch.func.functional_call(pope, dict(zip(names, weights, strict=True)), (q, k, positions))

    assert torch.autograd.gradcheck(run, (q, k, positions, *learned))


def test_bfloat16_stays_bfloat16_and_keys_of_other_tokens_have_their_own_positions():
    pope, positions, q, k = make("flat", dtype=torch.float32)
    q, k = q.bfloat16(), k.bfloat16()
    turned, keys = pope(q, k, positions)
    assert turned.dtype == keys.dtype == torch.bfloat16
    _, later = pope(q, k[:, 4:], positions, positions[4:])
    assert torch.equal(later, keys[:, 4:])


def test_attention_takes_the_doubled_heads_at_the_scale_of_the_original_ones():
    pope, positions, q, k = make("flat")
    v = torch.randn_like(k)
    turned, keys = (x.transpose(1, 2) for x in pope(q, k, positions))
    out = scaled_dot_product_attention(turned, keys, v.transpose(1, 2), scale=8**-0.5, enable_gqa=True)
    weights = (by_formula(pope, q, k, positions) / 8**0.5).softmax(-1)
    values = v.repeat_interleave(2, dim=2).transpose(1, 2)
    torch.testing.assert_close(out, weights @ values)


def test_schemes_of_a_part_of_a_head_and_other_heads_are_refused():
    with pytest.raises(ValueError, match=r"rotates a part of 0\.25; take fraction=1"):
        PoPE(64, "gpt-neox", heads=2)
    pope, positions, q, k = make("flat")
    with pytest.raises(
        ValueError, match=r"for 2 key heads of 8 channels.*make one for 4 heads of 8 channels"
    ):
        pope(q, q, positions)
    with pytest.raises(ValueError, match="make one for 2 heads of 6 channels"):
        pope(q[..., :6], k[..., :6], positions)
    with pytest.raises(ValueError, match="PoPE: heads must be a whole number >= 1, not 0"):
        PoPE(8, heads=0)


def test_the_bias_is_reset_and_stays_out_of_the_schemes_frequencies():
    pope, *_ = make("flat")
    pope.reset_parameters()
    assert not pope.bias.any()
    assert SCHEMES["flat"] == pope.rope.scheme
