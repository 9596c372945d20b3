"""The rotary kernel against complex multiplication in float64; interpreted where there is no GPU."""

from dataclasses import replace

import numpy
import pytest
import rope_mm_kernels.plan
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from rope_mm_kernels import rotate, rotate_, rotate_by_angles
from torch import Tensor
from truth import (
    INTERPRETED,
    Case,
    Inputs,
    agree,
    channel_pairs,
    cotangents,
    eager,
    penalty,
    results,
    truth,
    wider,
)

import rope_mm.rotary.dispatch
from rope_mm.rotary import definition as rotation

BOTH = ("half", "interleaved")
CASES = {
    "heads of 16 channels on three axes": Case(),
    "one axis": Case(a=1),
    "two axes and positions of each batch row": Case(a=2, batched=True),
    "64 channels and odd tokens": Case(b=1, s=11, d=64, r=32),
    "72 channels, not a power of two": Case(s=3, d=72, r=36),
    "80 channels and more heads than a block": Case(b=1, s=3, h=20, g=10, d=80, r=40),
    "a part of the channels": Case(d=72, r=11),
    "the last channels, times a factor": Case(d=24, r=9, tail=True, factor=1.25),
    "the angles of transformers": Case(mode="hf", batched=True),
    "one pair of three": Case(d=6, r=1),
    "one Omega per head of k": Case(n=2, batched=True),
    "one Omega per head": Case(h=3, g=3, n=3),
    "one Omega for two heads of k": Case(h=8, g=4, n=2, d=24, r=10),
    "one head": Case(b=1, s=1, h=1, g=1, a=1),
    "no keys": Case(g=0, n=2),
    "no queries": Case(h=0),
    "many short sequences": Case(b=37, s=1, batched=True),
    "sequences packed into one row": Case(b=1, s=19, batched=True),
    "no tokens": Case(s=0),
}


@pytest.mark.parametrize("pairing", BOTH)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_are_those_of_complex_multiplication(
    case: Case, pairing: str, device: str
) -> None:
    inputs, how = case.make(device), replace(case, pairing=pairing).how
    plain, right = (results(turn, inputs, how) for turn in (eager, truth))
    agree(results(rotate, inputs, how), right, plain)


@settings(max_examples=8)
@given(blocks=some.lists(some.sampled_from((1, 2, 3, 8)), min_size=1, max_size=4), tail=some.booleans())
@pytest.mark.parametrize("device", ["cuda" if torch.cuda.is_available() else "cpu"])
def test_each_block_of_any_size_is_rotated_as_a_half_of_its_own(
    blocks: list[int], tail: bool, device: str
) -> None:
    r = sum(blocks)
    case = Case(b=1, s=3, d=2 * r + 3, r=r, a=2, pairing="block", blocks=tuple(blocks), tail=tail)
    inputs = case.make(device)
    agree(*(results(turn, inputs, case.how) for turn in (rotate, truth, eager)))


def test_equal_blocks_give_the_results_of_the_definition(device: str) -> None:
    case = Case(d=48, r=24, pairing="block", blocks=(8, 8, 8), tail=True)
    inputs = case.make(device)
    agree(*(results(turn, inputs, case.how) for turn in (rotate, truth, eager)))


def test_sizes_of_blocks_may_be_numbers_of_numpy(device: str) -> None:
    case = Case(d=24, r=12, pairing="block", blocks=(4, 8))
    inputs = case.make(device)
    given = case.how | {"blocks": tuple(numpy.array(case.blocks))}
    agree(results(rotate, inputs, given), results(rotate, inputs, case.how))


def strided(x: Tensor, layout: str) -> Tensor:
    """x (b, s, h, d) with other strides."""
    x = x.detach()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        return torch.cat((x, x, x), -2)[..., x.shape[2] : 2 * x.shape[2], :]
    if layout == "offset":
        return torch.cat((x[..., :1], x), -1)[..., 1:]
    if layout == "channels first":
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    return x.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize(
    ("layout", "pairing"),
    [
        ("transposed", "half"),
        ("packed", "interleaved"),
        ("offset", "half"),
        ("offset", "interleaved"),
        ("channels first", "half"),
        ("channels first", "interleaved"),
        ("every other token", "half"),
    ],
)
def test_strides_do_not_matter(layout: str, pairing: str, device: str) -> None:
    case = Case(d=24, r=9, pairing=pairing, tail=True)
    q, k, positions, omega = case.make(device)
    turned = positions.detach().T.contiguous().T.requires_grad_()
    other = strided(q, layout), strided(k, layout), turned, omega
    assert torch.equal(other[0], q) and other[0].stride() != q.stride()
    other[0].requires_grad_(), other[1].requires_grad_()
    plain = results(rotate, (q, k, positions, omega), case.how)
    assert all(torch.equal(x, y) for x, y in zip(results(rotate, other, case.how), plain, strict=True))
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(rotate_(*other, **case.how), plain, strict=False))


@pytest.mark.parametrize("pairing", BOTH)
def test_gradients_of_a_sum_have_no_strides_and_are_right(pairing: str, device: str) -> None:
    fast = Case().make(device)
    right = wider(fast)
    for inputs, turn in ((fast, rotate), (right, truth)):
        sum(x.sum() for x in turn(*inputs, pairing=pairing)).backward()
    agree(tuple(x.grad for x in fast), tuple(x.grad for x in right))


def turns(positions: Tensor, omega: Tensor, device: str, **how) -> Tensor:
    """How far the cosines and sines of the kernel are from the truth."""
    q = torch.zeros(1, len(positions), 1, 2 * omega.shape[-1], device=device)
    q[..., channel_pairs(omega.shape[-1], q.shape[-1], how.get("pairing", "half"), (), False)[0]] = 1.0
    turned, _ = rotate(q, q[:, :, :0], positions.to(device), omega.to(device), **how)
    right, _ = truth(q.cpu(), q.cpu(), positions, omega, **how)
    return (turned.cpu() - right).abs().max()


STEPS = torch.linspace(-1.6e7, 1.6e7, 257, dtype=torch.float64).round()
OMEGA = 10_000.0 ** -torch.linspace(0, 1, 32, dtype=torch.float64)[None]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_cosine_and_sine_are_3e_7_from_the_truth_at_position_16_million(
    kind: torch.dtype, device: str
) -> None:
    for omega, pairing in ((OMEGA, "half"), (OMEGA.float(), "interleaved")):
        assert turns(STEPS.to(kind)[:, None], omega, device, pairing=pairing) <= 3e-7


@pytest.mark.parametrize("base", [1e4, 5e6])
def test_cosine_and_sine_of_real_positions_are_3e_7_from_the_truth(base: float, device: str) -> None:
    positions = torch.rand(257, 1, generator=torch.Generator().manual_seed(2)) * 2**23
    assert turns(positions, base ** -torch.linspace(0, 1, 32, dtype=torch.float64)[None], device) <= 3e-7


def test_hf_mode_rounds_angles_to_float32_and_rotates_exactly(device: str) -> None:
    positions = torch.stack((STEPS, STEPS.flip(0) / 3), -1)
    omega = torch.cat((OMEGA, OMEGA.roll(7, -1)))
    assert turns(positions, omega, device, mode="hf") <= 3e-7
    # this is what the rounding of angles costs
    assert turns(positions, omega, device) <= 1e-6 < 1e-1 < (angle_error := hf_error(positions, omega))
    assert angle_error < 3


def hf_error(positions: Tensor, omega: Tensor) -> float:
    """The largest change of an angle by rounding it to float32, in radians."""
    exact = positions @ omega
    rounded = sum(positions.float()[:, i, None] * omega.float()[i] for i in range(len(omega)))
    return (rounded.double() - exact).abs().max().item()


def test_positions_beyond_float32_keep_all_their_digits(device: str) -> None:
    positions = torch.tensor([[2**24 + 1], [-(2**24) - 3]], device=device)
    q, k, _, omega = Case(s=2, a=1).make(device)
    agree(rotate(q, k, positions, omega), truth(q, k, positions, omega))


def test_gradients_at_large_positions_are_right(device: str) -> None:
    inputs = Case(batched=True).make(device, reach=1e5)
    agree(*(results(turn, inputs, {}) for turn in (rotate, truth)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", BOTH)
def test_results_in_16_bits_are_the_truth_rounded_once(pairing: str, dtype: torch.dtype, device: str) -> None:
    case = Case(d=24, r=9, pairing=pairing)
    inputs = case.make(device, dtype)
    given, wanted = results(rotate, inputs, case.how), results(truth, inputs, case.how)
    # the interpreter cuts off where hardware rounds float32 to bfloat16: a whole unit instead of half of one
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
    for x, y in zip(given[:4], wanted[:4], strict=True):
        assert x.dtype == dtype
        assert ((x.double() - y).abs() <= unit * y.abs() + 1e-6 * y.abs().max()).all()
    # the gradient of an angle is y1 dy2 - y2 dy1, and y is the result as it was rounded
    first, second = channel_pairs(9, 24, pairing, (), False)
    products = [
        (y[..., first] * grad[..., second] - y[..., second] * grad[..., first]).sum((0, 2))
        for y, grad in zip(wider(given[:2]), wider(tuple(cotangents(given[:2], dtype))), strict=True)
    ]
    angle, positions, omega = sum(products), inputs[2].double(), inputs[3].double()
    agree(given[4:], (angle @ omega.T, positions.T @ angle))


@pytest.mark.parametrize(
    "case",
    [
        Case(factor=0.5, pairing="interleaved"),
        Case(n=2, batched=True),
        Case(d=24, r=9, a=1, pairing="block", blocks=(4, 5), tail=True),
    ],
    ids=str,
)
def test_gradients_of_a_gradient_penalty_are_right(case: Case, device: str) -> None:
    inputs = case.make(device)
    right = penalty(truth, wider(inputs), case.how)
    # errors of the first gradients, times positions and sums over tokens, are in the second
    agree(penalty(rotate, inputs, case.how), right, penalty(eager, inputs, case.how), units=32)


def test_gradients_are_the_same_bits_every_time(device: str) -> None:
    inputs = Case(s=33).make(device)
    first, again = (results(rotate, inputs, {}) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_an_unused_result_has_no_gradient(device: str) -> None:
    q, k, positions, omega = Case().make(device)
    rotate(q, k, positions, omega)[0].sum().backward()
    assert q.grad.any() and omega.grad.any() and not k.grad.any()


def test_results_are_kept_for_backward_only_where_angles_are_learned(device: str) -> None:
    q, k, positions, omega = Case().make(device)
    assert len(rotate(q, k, positions, omega.detach())[0].grad_fn.saved_tensors) == 4
    assert len(rotate(q, k, positions.detach(), omega.detach())[0].grad_fn.saved_tensors) == 2


@pytest.mark.parametrize("pairing", BOTH)
@pytest.mark.parametrize("n", [1, 2])
def test_given_angles_rotate_as_positions_do_with_gradients(pairing: str, n: int, device: str) -> None:
    case = Case(n=n, batched=True, d=24, r=9, pairing=pairing, tail=True, factor=1.5)
    q, k, positions, omega = case.make(device)
    angles = torch.einsum("bsa,nar->bsnr", positions.double(), omega.double()).detach().float()
    inputs = q, k, angles.requires_grad_()
    how = {name: case.how[name] for name in ("pairing", "tail", "factor")}
    # r axes of which each turns its own pair, of every row of heads
    eye = torch.eye(n * 9, device=device).view(n * 9, n, 9).movedim(0, 1).contiguous()

    def as_positions(q, k, angles, **how):
        return truth(q, k, angles.flatten(-2), eye, **how)

    right = results(as_positions, wider(inputs), how)
    agree(results(rotate_by_angles, inputs, how), right, units=32)
    agree(penalty(rotate_by_angles, inputs, how), penalty(as_positions, wider(inputs), how), units=32)
    shared = q, k, angles.detach()[0, :, 0].requires_grad_()
    assert results(rotate_by_angles, shared, how)[-1].shape == shared[2].shape


def test_inputs_are_not_modified(device: str) -> None:
    inputs = Case().make(device)
    before = [x.detach().clone() for x in inputs]
    results(rotate, inputs, {})
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_in_place_rotation_gives_the_same_result_and_raises_the_version_of_its_inputs(device: str) -> None:
    case = Case(d=24, r=9, tail=True, pairing="interleaved", factor=2.0)
    q, k, positions, omega = (x.detach() for x in case.make(device))
    wanted = rotate(q, k, positions, omega, **case.how)
    version = q._version
    found = rotate_(q, k, positions, omega, **case.how)
    assert found[0] is q and found[1] is k and q._version > version
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", [Case(), Case(n=2, batched=True, d=24, r=9, tail=True, factor=1.5)], ids=str)
def test_in_place_rotation_has_the_gradients_of_rotate(case: Case, device: str) -> None:
    inputs = case.make(device)

    def in_place(q, k, positions, omega, **how):
        return rotate_(q * 1.0, k * 1.0, positions, omega, **how)

    wanted, found = (results(turn, inputs, case.how) for turn in (rotate, in_place))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    agree(penalty(in_place, inputs, case.how), penalty(truth, wider(inputs), case.how), units=32)


def test_in_place_rotation_refuses_inputs_that_it_would_corrupt(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    with pytest.raises(ValueError, match="leaf that requires grad"):
        rotate_(q.clone().requires_grad_(), k, positions, omega)
    with pytest.raises(ValueError, match="one element stands for many"):
        rotate_(q[:, :, :1].expand_as(q), k, positions, omega)


def test_offsets_beyond_2_31_elements_are_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # nobody touches, so nobody has to have, the gigabytes in between
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = Case(b=2, s=2, h=2, g=0, a=1)
    q, k, positions, omega = (x.detach() for x in case.make(device, torch.float16))
    wanted, _ = rotate(q, k, positions, omega)
    for strides in (
        (2**31 + 64, 64, 16, 1),
        (64, 2**31 + 64, 16, 1),
        (64, 16, 2**31 + 64, 1),
        (64, 32, 1, 2**28),
    ):
        reach = 1 + sum((size - 1) * stride for size, stride in zip(q.shape, strides, strict=True))
        far = torch.empty(reach, dtype=torch.float16, device=device).as_strided(q.shape, strides)
        far.copy_(q)
        assert torch.equal(rotate_(far, k, positions, omega)[0], wanted)


def test_launches_with_many_lanes_use_64_bit_counters() -> None:
    q = torch.empty(1, dtype=torch.float16).as_strided((2**20, 2**9, 1, 64), (0, 0, 0, 0))
    spec = rope_mm_kernels.plan.KernelSpec(1, 1, 32, (32,), 0, "exact")
    for whole, wide in ((q, True), (q[: 2**18], False)):
        plan = rope_mm_kernels.plan.plan(whole, whole, (whole, whole), spec, (whole,), whole=False)
        assert plan.constants["WIDE"] == wide and plan.parts * sum(plan.blocks) < 2**31


@pytest.mark.parametrize("chunks", range(1, 129))
def test_lanes_of_a_token_are_cut_into_few_powers_of_two_with_little_waste(chunks: int) -> None:
    cut = rope_mm_kernels.plan.pieces(chunks)
    firsts, sizes = zip(*cut, strict=True)
    assert len(cut) <= 2 and all(size & (size - 1) == 0 for size in sizes)
    assert firsts == (0, *sizes[:-1]) and chunks <= sum(sizes) < 4 / 3 * chunks
    assert len(cut) == 1 or firsts[1] < chunks


# torch loads its own decompositions with a function that it has deprecated
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_refused(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        rotate(torch.autograd.forward_ad.make_dual(q, q), k, positions, omega)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairing": "thirds"}, "pairing 'thirds' is unknown"),
        ({"pairing": "block"}, "sum to the 8 pairs"),
        ({"pairing": "block", "blocks": (4, 5)}, "sum to the 8 pairs"),
        ({"pairing": "block", "blocks": (9, -1)}, "must be positive"),
        ({"blocks": (4, 4)}, "omit them"),
        ({"mode": "fast"}, "mode 'fast' is unknown"),
        ({"omega": torch.ones(3, 9)}, "9 pairs need 18 channels"),
        ({"omega": torch.ones(3, 3, 8)}, "Omega has 3 heads, which must divide"),
        ({"omega": torch.ones(4, 3, 8)}, "Omega has 4 heads, which must divide"),
        ({"omega": torch.ones(3, 0)}, "Omega must be"),
        ({"omega": torch.ones(2, 8)}, "axes of Omega"),
        ({"omega": torch.ones(3, 8, dtype=torch.bfloat16)}, "keep it in float32 or float64"),
        ({"positions": torch.ones(7, 3)}, "one position for each token"),
        ({"positions": torch.ones(4, 3)}, "give q.transpose"),
        ({"positions": torch.ones(3, 5, 3)}, "one position for each token"),
        ({"k": torch.ones(2, 4, 2, 16)}, "alike but for the heads"),
        ({"k": torch.ones(2, 5, 2, 16, dtype=torch.float16)}, "give both in one dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_a_message(change: dict[str, object], words: str) -> None:
    fit = dict(zip(("q", "k", "positions", "omega"), Case().make("cpu"), strict=True))
    with pytest.raises(ValueError, match=words):
        rotate(**{**fit, **change})


@pytest.mark.parametrize("pairing", BOTH)
def test_rotate_calls_the_kernel(pairing: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: Inputs = Case(n=2).make(device)
    q, k, positions, omega = inputs
    tables = rotation.cos_sin(positions, omega)
    defined = tuple(rotation.apply_rotary(x, *tables, pairing) for x in (q, k))
    agree(defined, truth(*wider(inputs), pairing=pairing))
    monkeypatch.setattr(rope_mm.rotary.dispatch, "kernel_supports", lambda device, dtype: True)
    angles = rope_mm.rotary.dispatch.make_angles(positions, omega, pairing)
    for opened in (rope_mm.rotary.dispatch.rotate(q, k, positions, omega, pairing), angles.rotate(q, k)):
        for x, y in zip(opened, rotate(q, k, positions, omega, pairing), strict=True):
            assert torch.equal(x, y)
            assert x.grad_fn.name() == "RotateBackward"
