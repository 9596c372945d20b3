"""Rotation by given tables, after a norm or without, against complex multiplication in float64."""

import pytest
import torch
from rope_mm_kernels import norm_rotate_by_table, rotate_by_table
from torch import Tensor
from truth import Case, agree, angles, channel_pairs, eager, penalty, results, truth, wider

CASES = [
    Case(),
    Case(pairing="interleaved", batched=True),
    Case(d=24, r=9, tail=True, batched=True),
    Case(d=32, r=12, pairing="block", blocks=(4, 8)),
    Case(d=20, r=8, pairing="interleaved", tail=True, g=0),
    Case(b=3, s=11, h=10, g=5, d=72, r=36, batched=True),
    Case(s=0),
]
BOTH = pytest.mark.parametrize("turn", [rotate_by_table, norm_rotate_by_table])


def table(positions: Tensor, omega: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1 or b, s, 2r) of every channel, as transformers make them."""
    angle = angles(positions, omega, "exact")[..., 0, :].view(case.b if case.batched else 1, case.s, case.r)
    both = torch.empty(len(angle), case.s, 2 * case.r, dtype=torch.float64)
    for channels in channel_pairs(case.r, 2 * case.r, case.pairing, case.blocks, False):
        both[..., channels] = angle.cpu()
    return both.cos().to(positions), both.sin().to(positions)


def made(turn, case: Case, device: str):
    """Heads and the norm's weights, `turn` of them by tables, and the truth and the definition of them."""
    q, k, positions, omega, *weights = case.make(device, normed=turn is norm_rotate_by_table)
    where = positions.detach(), omega.detach()
    cos, sin = table(*where, case)
    assert len(cos) == (case.b if case.batched else 1)
    how = {"pairing": case.pairing, "blocks": case.blocks, "tail": case.tail}
    return (
        (q, k, *weights),
        lambda q, k, *weights: turn(q, k, cos, sin, *weights, **how),
        lambda q, k, *weights: truth(q, k, *where, *weights, **how),
        lambda q, k, *weights: eager(q, k, *where, *weights, **how),
    )


@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_complex_multiplication(case: Case, turn, device: str) -> None:
    inputs, fast, right, plain = made(turn, case, device)
    agree(results(fast, inputs, {}), results(right, wider(inputs), {}), results(plain, inputs, {}))


@BOTH
def test_gradients_of_a_gradient_penalty_are_right(turn, device: str) -> None:
    inputs, fast, right, plain = made(turn, Case(d=20, batched=True, tail=True), device)
    agree(penalty(fast, inputs, {}), penalty(right, wider(inputs), {}), penalty(plain, inputs, {}), units=32)


def test_tables_may_have_16_bits_and_strides(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    cos, sin = (x.to(torch.float16) for x in table(positions, omega, Case()))
    wanted = rotate_by_table(q, k, cos.float(), sin.float())
    found = rotate_by_table(q, k, cos.mT.contiguous().mT, sin.repeat_interleave(2, 1)[:, ::2])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cos": torch.ones(3, 5, 16), "sin": torch.ones(3, 5, 16)}, "cos and sin must be"),
        ({"cos": torch.ones(1, 5, 8)}, "cos and sin must be"),
        ({"cos": torch.ones(1, 5, 18), "sin": torch.ones(1, 5, 18)}, "of the d channels"),
        ({"cos": torch.ones(1, 5, 16, requires_grad=True)}, "call rotate"),
        ({"pairing": "block"}, "sum to the 8 pairs"),
        ({"k": torch.ones(2, 4, 2, 16)}, "alike but for the heads"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_a_message(change: dict[str, object], words: str) -> None:
    q, k, _, _ = Case().make("cpu")
    fit = {"q": q, "k": k, "cos": torch.ones(1, 5, 16), "sin": torch.ones(1, 5, 16)}
    with pytest.raises(ValueError, match=words):
        rotate_by_table(**{**fit, **change})
    weights = {"q_weight": torch.ones(16), "k_weight": torch.ones(16)}
    with pytest.raises(ValueError, match=words):
        norm_rotate_by_table(**{**fit, **weights, **change})
    with pytest.raises(ValueError, match="the weights must be"):
        norm_rotate_by_table(**fit, **{**weights, "k_weight": torch.ones(15)})
