"""Context extension: Omega for positions beyond those trained, a pure function of the speeds and the length.

Every extension works on the axes it is given, in positions of those axes: `YaRN(factor=4, original=64,
axes=("y", "x"))` serves pictures four times as tall and wide as the 64 rows and columns trained. Without axes
it works on all pairs, as on RoPE-1D's ladder. The names are those of transformers' `rope_type`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rope_mm.registry import Registry
from rope_mm.schemes.frequencies import Ladder


@dataclass(frozen=True, kw_only=True)
class Extension:
    """`speeds(ladder, length)` (r,) replace those of the pairs that turn on `axes`; () is all of them.

    `attention` multiplies cosine and sine. `needs_length` says that Omega depends on the length;
    `moves_words`, that the extension is meant for axes along which words are counted, too.
    """

    axes: tuple[str, ...] = ()
    needs_length: ClassVar[bool] = False
    moves_words: ClassVar[bool] = True

    @property
    def attention(self) -> float:
        """The factor on cosine and sine, 1 for most."""
        return 1.0

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        """New speeds (r,) for positions below `length`."""
        raise NotImplementedError

    def extend(self, ladder: Ladder, lengths: Sequence[float], axes: Sequence[str]) -> Tensor:
        """Speeds with those of this extension where its axes turn the pair; `lengths` of all axes.

        Raises:
            ValueError: pairs that several axes turn.
        """
        if not self.axes:
            return self.speeds(ladder, max(lengths))
        turns = ladder.vectors.ne(0).any(0)  # (a, r)
        if (turns.sum(0) > 1).any():
            raise ValueError(f"{self} extends single axes, but here a pair turns on several; extend all")
        mine = turns[[axes.index(axis) for axis in self.axes]].any(0)
        length = max(lengths[axes.index(axis)] for axis in self.axes)
        speed, rung, rungs = (x[mine] for x in (ladder.speed, ladder.rung, ladder.rungs))
        chosen = Ladder(speed, rung, rungs, ladder.theta, ladder.vectors[..., mine])
        return ladder.speed.masked_scatter(mine, self.speeds(chosen, length))


@dataclass(frozen=True, kw_only=True)
class Linear(Extension):
    """Position interpolation: all speeds divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        return ladder.speed / self.factor


def stretch_theta(ladder: Ladder, factor: float) -> Tensor:
    """theta * factor ** (n / (n-1)): the slowest rung by the whole factor, the fastest not at all."""
    return ladder.speed * factor ** -(ladder.rung / (ladder.rungs - 1).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class NTK(Extension):
    """NTK-aware: the slower a rung, the more it is slowed, the slowest by `factor` (u/bloc97, 2023)."""

    factor: float

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        return stretch_theta(ladder, self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(Extension):
    """NTK-aware with the factor that the length asks for: factor L / original - (factor - 1)."""

    factor: float
    original: float
    needs_length: ClassVar[bool] = True

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        longer = max(length, self.original) / self.original
        return stretch_theta(ladder, self.factor * longer - (self.factor - 1))


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature, on cosine and sine: 0.1 weight ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class YaRN(Extension):
    """Fast rungs stay, slow ones are divided by `factor`, those between are blended (arXiv 2309.00071).

    Fast ones make more than `beta_fast` turns over the `original` length, slow ones less than `beta_slow`;
    `truncate` rounds these ends to whole rungs. `attention_factor` replaces YaRN's own, 0.1 ln(factor) + 1;
    `mscale` and `mscale_all_dim` are DeepSeek's.
    """

    factor: float
    original: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        rungs = ladder.rungs

        def rung_of(turns: float) -> Tensor:
            return rungs * math.log(self.original / (turns * math.tau)) / math.log(ladder.theta)

        low, high = rung_of(self.beta_fast), rung_of(self.beta_slow)
        if self.truncate:
            low, high = low.floor(), high.ceil()
        low, high = low.clamp(min=0), high.minimum(2 * rungs - 1)
        blend = ((ladder.rung - low) / (high - low + 0.001 * (high == low))).clamp(0, 1)
        return ladder.speed * (blend / self.factor + 1 - blend)


@dataclass(frozen=True, kw_only=True)
class Llama3(Extension):
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1).

    Long ones exceed original / low_freq_factor, short ones are below original / high_freq_factor.
    """

    factor: float
    original: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        turns = self.original * ladder.speed / math.tau
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return ladder.speed * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRoPE(Extension):
    """Each pair divided by a searched factor, `short` up to the original length, `long` beyond it.

    `factor` is the longest length over the original, from which the attention factor is
    sqrt(1 + ln factor / ln original) (arXiv 2402.13753).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: float
    factor: float
    attention_factor: float | None = None
    needs_length: ClassVar[bool] = True

    @property
    def attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        factors = self.long if length > self.original else self.short
        if len(factors) != len(ladder.speed):
            raise ValueError(
                f"LongRoPE has {len(factors)} factors for {len(ladder.speed)} pairs; give as many"
            )
        return ladder.speed / torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RIFLEx(Extension):
    """The rung that would repeat itself first is slowed to `share` of a turn over the whole length.

    It is the one whose period is nearest to the trained length, `original` (arXiv 2502.15894).
    """

    original: float
    share: float = 0.9
    needs_length: ClassVar[bool] = True
    moves_words: ClassVar[bool] = False

    def speeds(self, ladder: Ladder, length: float) -> Tensor:
        periods = math.tau / ladder.speed
        rung = (periods - self.original).abs().argmin()
        if length <= periods[rung]:
            return ladder.speed
        return ladder.speed.index_fill(0, rung, self.share * math.tau / length)


EXTENSIONS: Registry[type[Extension]] = Registry(
    "rope_type",
    {
        "linear": Linear,
        "ntk": NTK,
        "dynamic": DynamicNTK,
        "yarn": YaRN,
        "llama3": Llama3,
        "longrope": LongRoPE,
        "riflex": RIFLEx,
    },
)
