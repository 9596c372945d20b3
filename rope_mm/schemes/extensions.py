"""Context extension: Omega for positions beyond those trained, from the frequencies and the length alone.

Every extension works on the axes that it is given, in positions of those axes:
`YaRN(factor=4, original_max_positions=64, axes=("y", "x"))` serves images four times as tall and wide as the
64 rows and columns trained. Without axes it works on all pairs, as on RoPE-1D's ladder. The registry's names
are those of transformers' `rope_type`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from rope_mm.checks.fields import Names, Positive, Real, Reals, Switch, check_fields
from rope_mm.registry import Registry
from rope_mm.schemes.frequencies import Ladder

Factors = Annotated[tuple[float, ...], Reals(Real(above=0))]


@dataclass(frozen=True, kw_only=True)
class Extension:
    """The base of all extensions: new frequencies for the pairs that rotate by some axes.

    Attributes:
        axes: names of the axes whose pairs are extended; () extends all pairs.
        needs_length: whether Omega depends on the length of the sequence (of the class).
        applies_to_text: whether it is meant for axes along which text is counted, too (of the class).
        reads_theta: whether it depends on theta besides the frequencies (of the class).
    """

    axes: Annotated[tuple[str, ...], Names()] = ()
    needs_length: ClassVar[bool] = False
    applies_to_text: ClassVar[bool] = True
    reads_theta: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(f"{type(self).__name__}: axes names each axis once, not {self.axes}")

    @property
    def attention_scaling(self) -> float:
        """The factor on cosine and sine, 1 for most."""
        return 1.0

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        """New frequencies (r,) for positions below `length`."""
        raise NotImplementedError

    def apply(self, ladder: Ladder, lengths: Sequence[float], axes: Sequence[str]) -> Tensor:
        """Frequencies (r,) of all pairs, extended where an axis of this extension rotates the pair.

        Args:
            ladder: frequencies, places on the ladder and directions of all r pairs.
            lengths: for each axis, positions are below this number.
            axes: the names of the axes, in the order of `lengths`.

        Raises:
            ValueError: pairs that several axes rotate, or axes that rotate no pair.
        """
        if not self.axes:
            return self.freqs(ladder, max(lengths))
        rotates = ladder.directions.ne(0).any(0)  # (a, r)
        if (rotates.sum(0) > 1).any():
            raise ValueError(
                f"{self} extends single axes, but here several axes rotate one pair; extend all axes"
            )
        mine = rotates[[axes.index(axis) for axis in self.axes]].any(0)
        if not mine.any():
            raise ValueError(
                f"{self} extends {list(self.axes)}, which rotate no pair; give them axis_shares > 0"
            )
        length = max(lengths[axes.index(axis)] for axis in self.axes)
        freq, index, count = (x[mine] for x in (ladder.freq, ladder.index, ladder.count))
        chosen = Ladder(freq, index, count, ladder.theta, ladder.directions[..., mine])
        return ladder.freq.masked_scatter(mine, self.freqs(chosen, length))


@dataclass(frozen=True, kw_only=True)
class Linear(Extension):
    """Position interpolation: all frequencies are divided by a factor (arXiv 2306.15595).

    Attributes:
        factor: how many times longer the sequence may be.
    """

    factor: Positive

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        return ladder.freq / self.factor


def stretch_theta(ladder: Ladder, factor: float) -> Tensor:
    """theta * factor ** (n / (n-1)): the lowest frequency is divided by the factor, the highest by 1."""
    return ladder.freq * factor ** -(ladder.index / (ladder.count - 1).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class NTK(Extension):
    """NTK-aware scaling: the lower a frequency, the more it is divided (u/bloc97, 2023).

    Attributes:
        factor: what the lowest frequency is divided by.
    """

    factor: Positive

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        return stretch_theta(ladder, self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(Extension):
    """NTK-aware scaling by the factor that the length L asks for: factor L / original - (factor - 1).

    Attributes:
        factor: the speed at which the factor grows with the length.
        original_max_positions: the length trained, in positions; up to it nothing changes.
    """

    factor: Positive
    original_max_positions: Positive
    needs_length: ClassVar[bool] = True

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        longer = max(length, self.original_max_positions) / self.original_max_positions
        return stretch_theta(ladder, self.factor * longer - (self.factor - 1))


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature, on cosine and sine: 0.1 weight ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class YaRN(Extension):
    """High frequencies stay, low ones are divided by a factor, those between are blended (arXiv 2309.00071).

    Attributes:
        factor: how many times longer the sequence may be.
        original_max_positions: the length trained, in positions.
        beta_fast: frequencies that make more turns than this over the original length stay.
        beta_slow: frequencies that make fewer turns than this are divided by the whole factor.
        truncate: whether the two ends of the blend are rounded to whole places on the ladder.
        attention_factor: the factor on cosine and sine; None takes YaRN's own, 0.1 ln(factor) + 1.
        mscale: DeepSeek's weight of ln(factor); only together with `mscale_all_dim`.
        mscale_all_dim: DeepSeek's weight in the divisor.
    """

    factor: Positive
    original_max_positions: Positive
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: Switch = True
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    reads_theta: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"YaRN: beta_fast {self.beta_fast:g} must be > beta_slow {self.beta_slow:g}")
        if self.attention_factor is None and (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"YaRN: mscale={self.mscale} with mscale_all_dim={self.mscale_all_dim} is one number in "
                "DeepSeek's code and another in transformers; give both of them, or attention_factor"
            )

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        if ladder.theta <= 1:
            raise ValueError(
                f"YaRN finds frequencies by the ladder's theta, which must be > 1, not {ladder.theta:g}"
            )
        count = ladder.count

        def index_of(turns: float) -> Tensor:
            """Where on the ladder a frequency makes the given number of turns over the original length."""
            return count * math.log(self.original_max_positions / (turns * math.tau)) / math.log(ladder.theta)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = low.floor(), high.ceil()
        low, high = low.clamp(min=0), high.minimum(2 * count - 1)
        blend = ((ladder.index - low) / (high - low + 0.001 * (high == low))).clamp(0, 1)
        return ladder.freq * (blend / self.factor + 1 - blend)


@dataclass(frozen=True, kw_only=True)
class Llama3(Extension):
    """Long waves are stretched by a factor, short ones kept, those between blended (Llama 3.1).

    Attributes:
        factor: how many times longer the sequence may be.
        original_max_positions: the length trained, in positions.
        low_freq_factor: waves longer than original / low_freq_factor are stretched by the whole factor.
        high_freq_factor: waves shorter than original / high_freq_factor stay.
    """

    factor: Positive
    original_max_positions: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    def __post_init__(self):
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"Llama3: high_freq_factor {self.high_freq_factor:g} must be > "
                f"low_freq_factor {self.low_freq_factor:g}"
            )

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        turns = self.original_max_positions * ladder.freq / math.tau
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return ladder.freq * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRoPE(Extension):
    """Each frequency is divided by a searched factor of its own (arXiv 2402.13753).

    Attributes:
        short: factors (r,) up to the original length.
        long: factors (r,) beyond it.
        original_max_positions: the length trained, in positions.
        factor: the longest length over the original one.
        attention_factor: the factor on cosine and sine; None takes sqrt(1 + ln factor / ln original).
    """

    short: Factors
    long: Factors
    original_max_positions: Positive
    factor: Positive
    attention_factor: Positive | None = None
    needs_length: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.attention_factor is None and self.factor > 1 and self.original_max_positions <= 1:
            raise ValueError(
                "LongRoPE: original_max_positions must be > 1 where attention_factor is not given, "
                f"not {self.original_max_positions:g}"
            )

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions))

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        factors = self.long if length > self.original_max_positions else self.short
        if len(factors) != len(ladder.freq):
            raise ValueError(
                f"LongRoPE has {len(factors)} factors for {len(ladder.freq)} pairs; give as many"
            )
        return ladder.freq / torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RIFLEx(Extension):
    """The frequency that would repeat itself first is lowered to less than one turn (arXiv 2502.15894).

    It is the one whose period is nearest to the length trained.

    Attributes:
        original_max_positions: the length trained, in positions.
        max_turns: how many turns it makes over the whole length.
    """

    original_max_positions: Positive
    max_turns: Positive = 0.9
    needs_length: ClassVar[bool] = True
    applies_to_text: ClassVar[bool] = False

    def freqs(self, ladder: Ladder, length: float) -> Tensor:
        periods = math.tau / ladder.freq
        nearest = (periods - self.original_max_positions).abs().argmin()
        if length <= periods[nearest]:
            return ladder.freq
        return ladder.freq.index_fill(0, nearest, self.max_turns * math.tau / length)


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
OLD_NUMBERS = {"original": "original_max_positions", "share": "max_turns"}


def read_extension(entries: Extension | Mapping[str, Any]) -> Extension:
    """An extension from its dict, such as {"rope_type": "yarn", "factor": 4, "original_max_positions": 4096}.

    Raises:
        ValueError: an unknown rope_type or number, or one that is missing.
    """
    if isinstance(entries, Extension):
        return entries
    if not isinstance(entries, Mapping):
        raise ValueError(f"extensions holds extensions or their dicts, not {entries!r}")
    numbers = {key: value for key, value in entries.items() if key != "rope_type"}
    kind = EXTENSIONS[entries.get("rope_type", "")]
    for old in set(numbers) & set(OLD_NUMBERS):
        raise ValueError(f"{entries['rope_type']}: {old!r} is called {OLD_NUMBERS[old]!r}")
    try:
        return kind(**numbers)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{entries['rope_type']} takes {known}, not {sorted(numbers)} ({error})") from error
