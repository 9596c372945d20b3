"""How much of what varies each factor of an experiment explains."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rope_mm.checks.extras import extra


class Share(NamedTuple):
    """A line of a variance table.

    Attributes:
        term: a factor, an interaction as "a x b", or "residual".
        share: its sum of squares over the sum of all (eta squared).
        low: lower end of the 95 % interval of the share; None where there is no noise to resample.
        high: upper end.
        freedom: degrees of freedom.
        f: F, its mean square over the residual one; None for the residual.
        p: how often noise alone gives such an F; None for the residual.
    """

    term: str
    share: float
    low: float | None
    high: float | None
    freedom: int
    f: float | None
    p: float | None


def share_variance(
    rows: Sequence[Mapping[str, Any]],
    factors: Sequence[str],
    blocks: Sequence[str] = (),
    resamples: int = 2000,
) -> list[Share]:
    """The analysis of variance of a balanced experiment: factors, interactions of two, blocks, the residual.

    The interval is the basic bootstrap one: scores are made again from the fitted ones and residuals drawn at
    random, and the share is moved by as much as those of the new scores miss it. Shares stay within 0 and 1.

    Args:
        rows: each has a "score" and a level of every factor and block.
        factors: whose interactions of two are terms as well.
        blocks: such as seeds, whose interactions belong to the residual.
        resamples: how many.

    Raises:
        ValueError: an experiment that is not balanced, or scores that leave no residual.
    """
    with extra("train"):
        from pandas import DataFrame
        from statsmodels.formula.api import ols
        from statsmodels.stats.anova import anova_lm
    check_balance(rows, [*factors, *blocks])
    crossed = " + ".join(f"C({name})" for name in factors)
    formula = " + ".join([f"score ~ ({crossed})**2", *(f"C({name})" for name in blocks)])
    fit = ols(formula, DataFrame([dict(row) for row in rows])).fit()
    if fit.df_resid < 1:
        raise ValueError(
            f"{len(rows)} scores leave no residual beside {factors} and {blocks}; give more seeds"
        )
    table = anova_lm(fit)
    squares = torch.tensor(table["sum_sq"].to_numpy(copy=True))
    shares = squares / squares.sum().clamp(min=1e-300)
    freedom = [round(df) for df in table["df"]]
    fitted, residuals = (torch.tensor(column.to_numpy(copy=True)) for column in (fit.fittedvalues, fit.resid))
    inflated = residuals * (len(rows) / fit.df_resid) ** 0.5
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(rows), (len(rows), resamples), generator=generator)
    again = split_squares(torch.tensor(fit.model.exog), freedom[:-1], fitted[:, None] + inflated[draw])
    low, high = (
        2 * shares - (again / again.sum(0)).quantile(torch.tensor([0.975, 0.025]).double(), dim=1)
    ).clamp(0, 1)
    terms, f, p = list(table.index), table["F"].tolist(), table["PR(>F)"].tolist()
    columns = (map(name_term, terms), shares.tolist(), low.tolist(), high.tolist(), freedom)
    tested = [(None, None) if term == "Residual" else pair for term, *pair in zip(terms, f, p, strict=True)]
    return [Share(*line, *test) for *line, test in zip(*columns, tested, strict=True)]


def split_squares(design: Tensor, freedom: Sequence[int], scores: Tensor) -> Tensor:
    """Sums of squares (terms + 1, b) of each term in order, the last one the residual's.

    Args:
        design: (n, c), the column of the mean, then those of each term.
        freedom: columns of each term.
        scores: (n, b).
    """
    effects = torch.linalg.qr(design).Q.T @ scores
    terms = [part.square().sum(0) for part in effects[1:].split(list(freedom))]
    rest = scores.square().sum(0) - effects.square().sum(0)
    return torch.stack([*terms, rest.clamp(min=0)])


def check_balance(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse rows that do not have every combination of levels equally often.

    Raises:
        ValueError: with a combination that is too rare.
    """
    found = Counter(tuple(row[name] for name in names) for row in rows)
    levels = [dict.fromkeys(row[name] for row in rows) for name in names]
    most = max(found.values(), default=0)
    for combination in product(*levels):
        if found[combination] < most:
            raise ValueError(
                f"the experiment is not balanced: {dict(zip(names, combination, strict=True))} has "
                f"{found[combination]} scores, another combination {most}; finish its runs"
            )


def name_term(term: str) -> str:
    """A term of a formula in words: "C(a):C(b)" is "a x b"."""
    return " x ".join(part.removeprefix("C(").removesuffix(")") for part in term.split(":")).replace(
        "Residual", "residual"
    )
