"""RMSNorm and rotation in one launch against float64."""

import pytest
import torch
from rope_mm_kernels import norm_rotate
from truth import Case, agree, eager, penalty, results, truth

CASES = {
    "heads of 16 channels on three axes": Case(),
    "72 channels, not a power of two": Case(s=3, d=72, r=36, pairing="interleaved"),
    "more heads than a block": Case(b=1, s=3, h=10, g=5, d=24, r=12, a=1),
    "a part of the channels": Case(d=72, r=10, pairing="interleaved"),
    "the tail, in blocks, times a factor": Case(
        d=20, r=8, pairing="block", blocks=(2, 6), tail=True, factor=1.25, batched=True
    ),
    "one Omega per head of k": Case(n=2, batched=True),
    "one head, the angles of transformers": Case(b=1, s=1, h=1, g=1, a=1, mode="hf"),
    "no keys": Case(g=0),
    "no tokens": Case(s=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_are_those_of_two_steps_in_float64(case: Case, device: str) -> None:
    inputs = case.make(device, normed=True)
    plain, right = (results(turn, inputs, case.how) for turn in (eager, truth))
    agree(results(norm_rotate, inputs, case.how), right, plain)


def test_the_norm_equals_that_of_torch(device: str) -> None:
    q, k, positions, omega, *weights = Case().make(device, normed=True)
    right = (torch.nn.functional.rms_norm(x, (16,), w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    agree(norm_rotate(q, k, positions * 0, omega, *weights), tuple(x.double() for x in right))


def test_results_in_16_bits_are_the_truth_rounded_once(device: str) -> None:
    inputs = Case(d=24, r=9).make(device, torch.float16, normed=True)
    given, wanted = results(norm_rotate, inputs, {}), results(truth, inputs, {})
    for x, y in zip(given[:4], wanted[:4], strict=True):
        assert x.dtype == torch.float16
        assert ((x.double() - y).abs() <= 2**-11 * y.abs() + 1e-6 * y.abs().max()).all()


@pytest.mark.parametrize("case", [Case(d=18, factor=0.5), Case(n=2, batched=True)], ids=str)
def test_gradients_of_a_gradient_penalty_are_right(case: Case, device: str) -> None:
    inputs = case.make(device, normed=True)
    right = penalty(truth, tuple(x.detach().double().requires_grad_() for x in inputs), case.how)
    agree(penalty(norm_rotate, inputs, case.how), right, penalty(eager, inputs, case.how), units=32)


def test_gradients_are_the_same_bits_every_time(device: str) -> None:
    inputs = Case(s=33).make(device, normed=True)
    first, again = (results(norm_rotate, inputs, {}) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_weight": torch.ones(15)}, "weights must be"),
        ({"k_weight": torch.ones(16).double()}, "of one dtype"),
        ({"eps": 0.0}, "positive"),
        ({"eps": "1"}, "positive finite number"),
        ({"omega": torch.ones(3, 9)}, "9 pairs need"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_a_message(change: dict[str, object], words: str) -> None:
    names = ("q", "k", "positions", "omega", "q_weight", "k_weight")
    fit = dict(zip(names, Case().make("cpu", normed=True), strict=True))
    with pytest.raises(ValueError, match=words):
        norm_rotate(**{**fit, **change})
