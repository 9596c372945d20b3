"""Rotation by given tables against complex multiplication in float64."""

import pytest
import torch
from rope_mm_kernels import rotate_by_table
from torch import Tensor
from truth import Case, agree, angles, channel_pairs, cotangents, truth, wider

CASES = [
    Case(),
    Case(pairing="interleaved", batched=True),
    Case(d=24, r=9, tail=True, batched=True),
    Case(d=32, r=12, pairing="block", blocks=(4, 8)),
    Case(d=20, r=8, pairing="interleaved", tail=True, g=0),
]


def table(positions: Tensor, omega: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1 or b, s, 2r) of every channel, as transformers make them."""
    angle = angles(positions, omega, "exact")[..., 0, :].reshape(-1, case.s, case.r)
    both = torch.empty(len(angle), case.s, 2 * case.r, dtype=torch.float64)
    for channels in channel_pairs(case.r, 2 * case.r, case.pairing, case.blocks, False):
        both[..., channels] = angle.cpu()
    return both.cos().to(positions), both.sin().to(positions)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_complex_multiplication(case: Case, device: str) -> None:
    q, k, positions, omega = case.make(device)
    cos, sin = table(positions.detach(), omega.detach(), case)
    assert len(cos) == (case.b if case.batched else 1)
    how = {"pairing": case.pairing, "blocks": case.blocks, "tail": case.tail}
    fast = rotate_by_table(q, k, cos, sin, **how)
    right = truth(*(inputs := wider((q, k, positions, omega))), **how)
    found = torch.autograd.grad(fast, (q, k), cotangents(fast, torch.float32))
    wanted = torch.autograd.grad(right, inputs[:2], cotangents(right, torch.float32))
    agree((*fast, *found), (*right, *wanted))


def test_tables_may_have_16_bits_and_strides(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    cos, sin = (x.to(torch.float16) for x in table(positions, omega, Case()))
    wanted = rotate_by_table(q, k, cos.float(), sin.float())
    found = rotate_by_table(q, k, cos.mT.contiguous().mT, sin.repeat_interleave(2, 1)[:, ::2])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_the_gradient_has_a_gradient(device: str) -> None:
    case = Case()
    q, k, positions, omega = case.make(device)
    tables = table(positions.detach(), omega.detach(), case)
    score = rotate_by_table(q, k, *tables)[0].square().sum()
    (slope,) = torch.autograd.grad(score, q, create_graph=True)
    # a rotation keeps squares, so the score is |q|^2, its gradient 2 q, and the next of its squares 8 q
    agree(torch.autograd.grad(slope.square().sum(), q), (8 * q.detach().double(),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cos": torch.ones(3, 5, 16), "sin": torch.ones(3, 5, 16)}, "cos and sin must be"),
        ({"cos": torch.ones(1, 5, 8)}, "cos and sin must be"),
        ({"cos": torch.ones(1, 5, 18), "sin": torch.ones(1, 5, 18)}, "of the d channels"),
        ({"cos": torch.ones(1, 5, 16, requires_grad=True)}, "call rotate"),
        ({"pairing": "block"}, "add up to 8"),
        ({"k": torch.ones(2, 4, 2, 16)}, "differ in heads only"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, object], words: str) -> None:
    q, k, _, _ = Case().make("cpu")
    fit = {"q": q, "k": k, "cos": torch.ones(1, 5, 16), "sin": torch.ones(1, 5, 16)}
    with pytest.raises(ValueError, match=words):
        rotate_by_table(**{**fit, **change})
