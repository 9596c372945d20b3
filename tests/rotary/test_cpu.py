"""The CPU's ways to rotate against the definition: values and every kind of derivative."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from rope_mm import Rotary, rotate
from rope_mm.rotary import cpu, definition, dispatch

FORMS = st.one_of(
    st.tuples(st.sampled_from(["half", "interleaved"]), st.just(()), st.booleans()),
    st.tuples(
        st.just("block"), st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), st.booleans()
    ),
)
CASES = {
    "form": FORMS,
    "shared": st.booleans(),
    "n": st.sampled_from([1, 2, 4]),
    "spare": st.integers(0, 2),
}


def case(form, shared, n, spare, dtype=torch.float64, s=3):
    """Heads (2, s, 4, d), and angles (..., s, n, r)."""
    r = sum(form[1]) or 3
    angle = torch.randn(*(() if shared else (2,)), s, n, r, dtype=torch.promote_types(dtype, torch.float32))
    return torch.randn(2, s, 4, 2 * (r + spare), dtype=dtype), angle


def rotate_by(x, angle, *form):
    """Heads x rotated by angles through the door."""
    spec = dispatch.RotarySpec(form[0], form[1], form[2])
    return dispatch.tables_of(angle, spec, x.dtype, None, None).rotate_one(x)


@given(**CASES, part=st.integers(1, 99))
def test_both_ways_rotate_as_the_definition(form, shared, n, spare, part):
    slot = cpu.Slot(*form)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, angle = case(form, shared, n, spare, dtype, s=5)
        expected = definition.apply_rotary(x, angle.cos(), angle.sin(), *form)
        tables = cpu.widen(angle.cos(), angle.sin(), slot)
        back = cpu.WideTables(tables.cos, -tables.sin)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "PART", part)
            ways = [
                cpu.rotate_plain(x, tables, slot),
                cpu.rotate_in_parts(x, tables, slot),
                cpu.rotate_in_parts(x, back, slot, inverse=True),
                cpu.rotate_in_parts(overwritten := x.clone(), tables, slot, out=overwritten),
            ]
        eps = 2 * torch.finfo(dtype).eps
        for rotated in ways:
            assert rotated.dtype == dtype
            torch.testing.assert_close(rotated, expected, atol=eps, rtol=eps)


def test_parts_grow_with_the_threads(monkeypatch):
    x = torch.empty(2, 512, 8, 64)
    one = cpu.part_length(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert cpu.part_length(x) == 3 * one == 3 * cpu.PART // 1024


@given(**CASES, part=st.integers(1, 400))
def test_gradients_in_parts_are_those_of_all_at_once(form, shared, n, spare, part):
    slot = cpu.Slot(*form)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y, angle = case(form, shared, n, spare, dtype, s=5)
        grad, eps = torch.randn_like(y), 2 * torch.finfo(dtype).eps
        tables = cpu.widen(*definition.cos_sin_of(angle, torch.promote_types(dtype, torch.float32)), slot)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "PART", part)
            back, total = cpu.rotate_back(y, grad, tables, slot)
        torch.testing.assert_close(total, cpu.angle_cross(y, grad, angle, slot), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back, cpu.rotate_plain(grad, tables.inverse(), slot), atol=eps, rtol=eps)


# torch's forward mode loads its own scripts
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@settings(max_examples=6, deadline=None)
@given(
    form=FORMS,
    shared=st.booleans(),
    n=st.sampled_from([1, 2]),
    spare=st.integers(0, 1),
    few=st.sampled_from([0, cpu.FEW]),
)
def test_gradients_second_gradients_and_tangents_are_right(form, shared, n, spare, few):
    inputs = [x.requires_grad_() for x in case(form, shared, n, spare, s=2)]

    def rotated(*x):
        return rotate_by(*x, *form)

    def overwritten(x, angle):
        spec = dispatch.RotarySpec(form[0], form[1], form[2])
        angles = dispatch.tables_of(angle, spec, x.dtype, None, None)
        return angles.rotate_(x * 1.0, x[:, :, :0] * 1.0)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FEW", few)
        assert torch.autograd.gradcheck(rotated, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(rotated, inputs, check_batched_grad=True)
        assert torch.autograd.gradcheck(overwritten, inputs)
        assert torch.autograd.gradgradcheck(overwritten, inputs)


def test_strided_heads_keep_their_source(monkeypatch):
    monkeypatch.setattr(cpu, "FEW", 0)
    qkv = torch.randn(2, 5, 3, 4, 16)
    before = qkv.clone()
    x, angle = qkv[:, :, 1], torch.randn(5, 1, 8)
    expected = definition.apply_rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(rotate_by(x, angle, "half", (), False), expected)
    assert torch.equal(qkv, before)
    expanded = torch.ones(()).expand(2, 5, 4, 16).requires_grad_()
    (grad,) = torch.autograd.grad(rotate_by(expanded, angle, "half", (), False).sum(), expanded)
    torch.testing.assert_close(
        grad, definition.apply_rotary(torch.ones(2, 5, 4, 16), angle.cos(), -angle.sin())
    )


@pytest.mark.parametrize("few", [0, cpu.FEW])
def test_torch_func_goes_through(few, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", few)
    q, omega = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    positions = torch.randn(5, 3, 2, dtype=torch.float64)

    def score(q, p, omega):
        return rotate(q, None, p, omega)[0].pow(3).sum()

    mapped = torch.vmap(lambda p: rotate(q, None, p, omega)[0])(positions)
    for ours, p in zip(mapped, positions, strict=True):
        torch.testing.assert_close(ours, rotate(q, None, p, omega)[0])
    gradients = torch.vmap(torch.func.grad(score, argnums=(1, 2)), (None, 0, None))(q, positions, omega)
    for i, p in enumerate(positions):
        expected = torch.func.grad(score, argnums=(1, 2))(q, p, omega)
        torch.testing.assert_close([g[i] for g in gradients], list(expected))
    hessian = torch.func.hessian(score, argnums=1)(q, positions[0], omega)
    plain = torch.autograd.functional.hessian(lambda p: score(q, p, omega), positions[0])
    torch.testing.assert_close(hessian, plain)


@pytest.mark.parametrize("few", [0, cpu.FEW])
def test_batched_gradients_are_those_one_by_one(few, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", few)
    q = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    omega = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(3, 2, dtype=torch.float64)

    def rotated(q, omega):
        return rotate(q, None, positions, omega)[0].sum(-1)

    jacobians = [
        torch.autograd.functional.jacobian(rotated, (q, omega), vectorize=fast) for fast in (True, False)
    ]
    torch.testing.assert_close(*jacobians)
    directions = torch.randn(4, 1, 3, 2, dtype=torch.float64)
    batched = torch.autograd.grad(
        rotated(q, omega), (q, omega), directions, is_grads_batched=True, retain_graph=True
    )
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(rotated(q, omega), (q, omega), direction)
        torch.testing.assert_close([g[i] for g in batched], list(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 0, 4, 24), (0, 3, 4, 24), (2, 3, 0, 24)])
@pytest.mark.parametrize("few", [-1, cpu.FEW])
def test_nothing_to_rotate_is_rotated_to_nothing(shape, dtype, few, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", few)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    omega = torch.ones(3, 12, requires_grad=True)
    rotated, _ = rotate(x, None, torch.zeros(shape[1], 3), omega)
    rotated.sum().backward()
    assert rotated.shape == x.grad.shape == shape and not omega.grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("few", [0, cpu.FEW])
def test_a_rotary_can_be_traced_and_the_trace_is_checked(learnable, few, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", few)
    rope = Rotary(24, learnable=learnable)
    positions, _ = rope.place("text:3 image:2x2")
    q = torch.randn(2, 7, 4, 24)
    traced = torch.jit.trace(rope, (q, q, positions))
    for x, y in zip(traced(q + 1, q, positions + 2), rope(q + 1, q, positions + 2), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("learnable", [False, True])
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(learnable):
    shape = (2, 7, 4, 24)
    with torch.device("meta"):
        rope = Rotary(24, learnable=learnable)
        q = torch.empty(shape, dtype=torch.bfloat16)
        for positions in (torch.empty(7, 3), torch.empty(2, 7, 3, dtype=torch.float64)):
            assert [(x.shape, x.dtype) for x in rope(q, q, positions)] == [(shape, torch.bfloat16)] * 2
    outside = Rotary(24, learnable=learnable)
    for allowed in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=allowed):
            inside = Rotary(24, learnable=learnable)
            for rope in (outside, inside):
                q = torch.empty(shape, dtype=torch.bfloat16)
                assert [x.shape for x in rope(q, q, torch.zeros(7, 3))] == [shape] * 2
    assert torch.equal(inside.static_omega, outside.static_omega)


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "words"),
    [
        ("cpu", torch.float32, True, "in three passes .* CUDA devices, not on cpu; few heads, 288 numbers$"),
        (
            "meta",
            torch.float32,
            True,
            "in three passes .* not on meta; copied to it at every call: positions, Omega$",
        ),
        ("cuda:0", torch.float64, True, "the definition in three passes .* not torch.float64;"),
        ("cuda:0", torch.float16, False, "the definition in three passes .*pip install triton"),
        ("cuda:0", torch.bfloat16, True, "^Triton's kernel: q is torch.bfloat16 on cuda"),
    ],
)
def test_explain_dispatch_says_which_way_is_taken_and_why(device, dtype, triton, words, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON", triton)
    with FakeTensorMode():  # of GPUs that are not here
        q, other = (torch.empty(1, s, 4, 24, dtype=dtype, device=device) for s in (3, 2))
        positions, omega = torch.zeros(3, 2, dtype=torch.float64), torch.ones(2, 12)
        assert re.search(words, said := dispatch.explain_dispatch(q, q, positions, omega)), said
        with pytest.raises(ValueError, match="alike but for the heads"):
            dispatch.explain_dispatch(q, other, positions, omega)


def test_many_heads_are_rotated_in_parts():
    q, positions = torch.zeros(1, 99, 64, 24), torch.zeros(99, 2)
    assert q.numel() > cpu.FEW
    said = dispatch.explain_dispatch(q, None, positions, torch.ones(2, 12))
    assert "in parts that fit the CPU's cache" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_autograd_function_runs_where_nothing_needs_a_gradient(dtype, monkeypatch):
    monkeypatch.setattr(cpu.RotateInParts, "apply", lambda *_: pytest.fail("a Function was called"))
    rope = Rotary(64)
    positions, _ = rope.place("text:99")
    q = torch.randn(1, 99, 32, 64, dtype=dtype)
    assert rope(q, q, positions)[0].grad_fn is None
