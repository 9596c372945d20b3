"""The other ways in: given angles, given tables, angles of transformers, queries alone, in place."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rope_mm import Rotary, rotate
from rope_mm.rotary import cpu, definition
from rope_mm.rotary.dispatch import rotate_, rotate_by_angles, rotate_by_table


def heads(d=24, dtype=torch.float64):
    return torch.randn(2, 7, 4, d, dtype=dtype), torch.randn(2, 7, 2, d, dtype=dtype)


@pytest.fixture(params=["few heads", "parts"])
def way(request, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", 0 if request.param == "parts" else cpu.FEW)


def values_and_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return *out, *torch.autograd.grad(sum(x.sin().sum() for x in out), inputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_given_angles_rotate_as_the_positions_they_come_from(pairing):
    positions, omega = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    how = {"pairing": pairing, "tail": True, "factor": 1.25}

    def by_positions(q, k, positions):
        return rotate(q, k, positions, omega, **how)

    def by_angles(q, k, positions):
        return rotate_by_angles(q, k, positions @ omega, **how)

    inputs = *heads(), positions
    torch.testing.assert_close(
        values_and_gradients(by_angles, *inputs), values_and_gradients(by_positions, *inputs)
    )


@pytest.mark.usefixtures("way")
def test_angles_made_of_the_tokens_get_gradients():
    # Selective RoPE, arXiv 2511.17388: angles are running sums of a projection of the content
    def by_content(q, k, steps):
        return rotate_by_angles(q, k, steps.cumsum(1))

    inputs = [x.requires_grad_() for x in (*heads(8), torch.randn(2, 7, 2, 4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(by_content, inputs, fast_mode=True)
    rotated = by_content(*inputs)[0]
    for head in range(4):
        alone, _ = rotate_by_angles(inputs[0][:, :, [head]], None, inputs[2].cumsum(1)[:, :, head // 2])
        torch.testing.assert_close(alone, rotated[:, :, [head]])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_given_tables_rotate_as_the_positions_they_come_from(pairing):
    rope = Rotary(24, "rope-tv", pairing=pairing, fraction=0.75)
    positions, _ = rope.place("text:3 image:2x2")
    cos, sin = (x[None] for x in rope.cos_sin(positions, torch.float64))

    def by_table(q, k):
        return rotate_by_table(q, k, cos, sin, pairing)

    def by_positions(q, k):
        return rope(q, k, positions)

    q, k = heads()
    torch.testing.assert_close(values_and_gradients(by_table, q, k), values_and_gradients(by_positions, q, k))
    assert torch.equal(rotate_by_table(q, None, cos, sin, pairing)[0], by_table(q, k)[0])


@pytest.mark.usefixtures("way")
def test_tables_get_gradients_of_their_own():
    q, k = heads(8)
    inputs = [q, k, *torch.randn(2, 1, 7, 8, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(rotate_by_table, inputs, fast_mode=True)


@pytest.mark.usefixtures("way")
def test_the_angles_of_transformers_are_theirs_bit_for_bit():
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
    positions = torch.arange(0, 7_000_000, 1_000_003)
    q, k = heads(64, torch.float32)
    llama = LlamaRotaryEmbedding(config)
    cos, sin = llama(q, positions[None])
    ours = definition.cos_sin(positions[:, None], llama.inv_freq[None], mode="hf")
    assert all(torch.equal(x.squeeze(-2), y[0, :, :32]) for x, y in zip(ours, (cos, sin), strict=True))
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for ours in (
        rotate(q, k, positions[:, None], llama.inv_freq[None], mode="hf"),
        rotate_by_table(q, k, cos, sin),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    exact, rounded = (Rotary(64, "flat", mode=mode) for mode in ("exact", "hf"))
    inputs = q, k, positions[:, None]
    rounded_omega = exact.omega.float()
    assert torch.equal(rounded(*inputs)[0], rotate(*inputs, rounded_omega, mode="hf")[0])
    assert torch.equal(rounded.angles(positions[:, None]).rotate(q, k)[0], rounded(*inputs)[0])
    assert (exact(*inputs)[0] - rounded(*inputs)[0]).abs().max() > 1e-2


@pytest.mark.usefixtures("way")
def test_queries_may_come_alone():
    rope = Rotary(24)
    positions, _ = rope.place("text:3 image:2x2")
    q, k = heads()
    both = rope(q, k, positions)
    for alone in (
        rope(q, None, positions),
        rope(q, None, rope.angles(positions, q.dtype)),
        rotate(q, None, positions, rope.omega),
    ):
        assert torch.equal(alone[0], both[0]) and alone[1] is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("per_head", [False, True])
def test_in_place_has_the_values_and_gradients_of_rotate(per_head):
    omega = torch.randn(*((2,) if per_head else ()), 3, 9, dtype=torch.float64)
    positions = torch.randn(7, 3, dtype=torch.float64)

    def in_place(q, k, positions, omega):
        q, k = q * 2, k * 2
        rotated = rotate_(q, k, positions, omega, "interleaved", tail=True, factor=1.5)
        assert rotated[0] is q and rotated[1] is k
        return rotated

    def out_of_place(q, k, positions, omega):
        return rotate(q * 2, k * 2, positions, omega, "interleaved", tail=True, factor=1.5)

    inputs = *heads(), positions, omega
    torch.testing.assert_close(
        values_and_gradients(in_place, *inputs), values_and_gradients(out_of_place, *inputs)
    )
    q, k = heads(dtype=torch.bfloat16)
    wanted = rotate(q, k, positions, omega)
    rotate_(q, k, positions, omega)
    torch.testing.assert_close((q, k), wanted)


def test_in_place_tells_autograd_that_heads_were_overwritten():
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    q, k = x * 2, x * 3
    kept = q.square()  # needs q as it was
    rotate_(q, k, torch.arange(3)[:, None], torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept.sum() + q.sum()).backward()
