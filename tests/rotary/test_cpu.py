"""The CPU's way to rotate against the definition: values and every kind of derivative."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from rope_mm.rotary import cpu
from rope_mm.rotary import definition as rotation
from rope_mm.rotary import dispatch as kernels

FORMS = st.one_of(
    st.tuples(st.sampled_from(["half", "interleaved"]), st.just(()), st.booleans()),
    st.tuples(
        st.just("block"), st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), st.booleans()
    ),
)


def case(form, shared, n, spare, dtype=torch.float64, s=3):
    """Heads (2, s, 4, d), cosine and sine of angles (..., s, n, r)."""
    r = sum(form[1]) or 3
    angle = torch.randn(*(() if shared else (2,)), s, n, r, dtype=torch.promote_types(dtype, torch.float32))
    return torch.randn(2, s, 4, 2 * (r + spare), dtype=dtype), angle.cos(), angle.sin()


@given(
    form=FORMS,
    shared=st.booleans(),
    n=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 2),
    part=st.integers(1, 99),
)
def test_heads_are_turned_as_by_the_definition_in_parts_of_any_size(form, shared, n, spare, part):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        heads = case(form, shared, n, spare, dtype, s=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "PART", part)
            ours = cpu.apply_rotary(*heads, *form)
        theirs = rotation.apply_rotary(*heads, *form)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours, theirs, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps
        )


# torch's forward mode loads its own scripts
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@settings(max_examples=10, deadline=None)
@given(form=FORMS, shared=st.booleans(), n=st.sampled_from([1, 2]), spare=st.integers(0, 1))
def test_gradients_second_gradients_and_tangents_are_right(form, shared, n, spare):
    inputs = [x.requires_grad_() for x in case(form, shared, n, spare, s=2)]

    def turn(*x):
        return cpu.apply_rotary(*x, *form)

    assert torch.autograd.gradcheck(turn, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(turn, inputs)


def test_strided_heads_keep_their_strides_and_their_source():
    qkv = torch.randn(2, 5, 3, 4, 16)
    before = qkv.clone()
    x, angle = qkv[:, :, 1], torch.randn(5, 1, 8)
    ours = cpu.apply_rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(ours, rotation.apply_rotary(x, angle.cos(), angle.sin()))
    assert torch.equal(qkv, before)
    expanded = torch.ones(()).expand(2, 5, 4, 16).requires_grad_()
    (grad,) = torch.autograd.grad(cpu.apply_rotary(expanded, angle.cos(), angle.sin()).sum(), expanded)
    torch.testing.assert_close(
        grad, rotation.apply_rotary(torch.ones(2, 5, 4, 16), angle.cos(), -angle.sin())
    )


def test_maps_over_heads_and_transforms_of_functions_go_through():
    x, angle = torch.randn(3, 2, 5, 4, 16), torch.randn(5, 1, 8)
    turn = torch.vmap(lambda y: cpu.apply_rotary(y, angle.cos(), angle.sin()))
    torch.testing.assert_close(turn(x)[1], rotation.apply_rotary(x[1], angle.cos(), angle.sin()))
    gradient = torch.func.grad(lambda a: cpu.apply_rotary(x[0], a.cos(), a.sin()).pow(3).sum())(angle)
    expected = torch.func.grad(lambda a: rotation.apply_rotary(x[0], a.cos(), a.sin()).pow(3).sum())(angle)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_rotate_is_rotated_to_nothing():
    x, angle = torch.randn(2, 0, 4, 16), torch.randn(0, 1, 8)
    assert cpu.apply_rotary(x, angle.cos(), angle.sin()).shape == x.shape


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "words"),
    [
        ("cpu", torch.float32, True, "in parts that fit the CPU's cache .*: .* CUDA devices, not on cpu$"),
        (
            "meta",
            torch.float32,
            True,
            "a dozen passes .* not on meta; copied to it at every call: positions, Omega$",
        ),
        ("cuda:0", torch.float64, True, "the definition, a dozen passes .* not torch.float64;"),
        ("cuda:0", torch.float16, False, "the definition, a dozen passes .*pip install triton"),
        ("cuda:0", torch.bfloat16, True, "^Triton's kernel: q is torch.bfloat16 on cuda"),
    ],
)
def test_the_door_says_which_way_it_takes_and_why(device, dtype, triton, words, monkeypatch):
    monkeypatch.setattr(kernels, "TRITON", triton)
    with FakeTensorMode():  # of GPUs that are not here
        q, other = (torch.empty(1, s, 4, 24, dtype=dtype, device=device) for s in (3, 2))
        positions, omega = torch.zeros(3, 2, dtype=torch.float64), torch.ones(2, 12)
        monkeypatch.setattr(kernels, "check_positions", lambda *_: None)  # it looks at numbers
        assert re.search(words, said := kernels.explain_dispatch(q, q, positions, omega)), said
        with pytest.raises(ValueError, match="alike but for the heads"):
            kernels.explain_dispatch(q, other, positions, omega)
