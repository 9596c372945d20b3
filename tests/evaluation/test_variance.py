"""Shares of variance against sums of squares that are computed by hand."""

import itertools

import pytest
import torch

from rope_mm.evaluation.variance import share_variance

A, B, SEEDS = ["flat", "grid", "m-rope"], ["chunk", "own"], [1, 2]


def rows_of(scores):
    """Rows of a design (a, b, seeds)."""
    return [
        {"layout": a, "allocation": b, "seed": s, "score": scores[i, j, k].item()}
        for (i, a), (j, b), (k, s) in itertools.product(enumerate(A), enumerate(B), enumerate(SEEDS))
    ]


def test_shares_of_a_balanced_design_of_two_factors_equal_those_computed_by_hand():
    scores = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, a, b, cell = scores.mean(), scores.mean((1, 2)), scores.mean((0, 2)), scores.mean(2)
    squares = {
        "layout": 4 * (a - mean).square().sum(),
        "allocation": 6 * (b - mean).square().sum(),
        "layout x allocation": 2 * (cell - a[:, None] - b + mean).square().sum(),
        "residual": (scores - cell[..., None]).square().sum(),
    }
    total = (scores - mean).square().sum()
    table = share_variance(rows_of(scores), ["layout", "allocation"], resamples=50)
    assert [line.term for line in table] == list(squares)
    assert [line.freedom for line in table] == [2, 1, 2, 6]
    for line in table:
        assert line.share == pytest.approx((squares[line.term] / total).item())
    f = (squares["layout"] / 2) / (squares["residual"] / 6)
    assert table[0].f == pytest.approx(f.item())
    assert table[-1].p is None


def test_a_factor_that_explains_everything_has_all_of_the_variance_and_a_narrow_interval():
    noise = 1e-3 * torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None, None] + noise
    layout, *others = share_variance(rows_of(scores), ["layout", "allocation"], ["seed"], resamples=200)
    assert layout.share > 0.999 and layout.p < 1e-6
    assert layout.low is not None and layout.high - layout.low < 1e-3
    assert [line.term for line in others] == ["allocation", "seed", "layout x allocation", "residual"]


def test_the_interval_of_a_share_holds_the_true_one_in_most_experiments():
    true = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    sigma, held = 0.3, 0
    expected = true.var(unbiased=False) / (true.var(unbiased=False) + sigma**2)
    for seed in range(20):
        noise = sigma * torch.randn(
            3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        line = share_variance(rows_of(true + noise), ["layout", "allocation"], resamples=300)[0]
        held += line.low <= expected <= line.high
    assert held >= 14


def test_an_experiment_with_a_missing_run_is_refused():
    rows = rows_of(torch.rand(3, 2, 2))
    with pytest.raises(ValueError, match=r"not balanced.*'m-rope'.*'own'"):
        share_variance(rows[:-1], ["layout", "allocation"])


def test_scores_without_a_residual_are_refused():
    rows = [row for row in rows_of(torch.rand(3, 2, 2)) if row["seed"] == 1]
    with pytest.raises(ValueError, match="leave no residual"):
        share_variance(rows, ["layout", "allocation"])
