"""Which values a field or an option may hold, declared in its annotation: `theta: Positive = 1e4`.

`check_fields` reads the annotations of a dataclass, `read_value` one annotation. What fits is returned as a
plain Python number, also where it came from numpy or a tensor; what does not fit is refused in one sentence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from operator import index
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Real:
    """A finite number.

    Attributes:
        above: it is greater than this.
        at_least: it is this or greater.
        below: it is less than this.
        at_most: it is this or less.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def read(self, value: Any) -> float:
        """The number, an int where it is one, else a float; ValueError where it does not fit."""
        if isinstance(value, str | bytes | bool):
            raise ValueError
        number = float(value)
        self.check_range(number)
        # an int that no float64 counts to is too large for most of torch
        number = int(value) if isinstance(value, Integral) and abs(number) < 2.0**53 else number
        return number

    def check_range(self, number: float) -> None:
        """ValueError for a number that is not finite or out of range."""
        ends = (
            self.above is None or number > self.above,
            self.at_least is None or number >= self.at_least,
            self.below is None or number < self.below,
            self.at_most is None or number <= self.at_most,
        )
        if not (math.isfinite(number) and all(ends)):
            raise ValueError

    def __str__(self) -> str:
        return "a finite number" + self.range_text()

    def range_text(self) -> str:
        """The range in signs, such as " > 0 and <= 1"."""
        ends = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        text = " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)
        return f" {text}" if text else ""


@dataclass(frozen=True)
class Whole(Real):
    """A whole number."""

    def read(self, value: Any) -> int:
        if isinstance(value, bool):
            raise ValueError
        number = index(value)
        self.check_range(number)
        return number

    def __str__(self) -> str:
        return "a whole number" + self.range_text()


@dataclass(frozen=True)
class Reals:
    """A sequence of numbers, read as a tuple.

    Attributes:
        each: what every one of them is.
        count: how many there are; any number if None.
    """

    each: Real = Real()
    count: int | None = None

    def read(self, values: Any) -> tuple[float, ...]:
        """The numbers as a tuple; ValueError where they do not fit."""
        if isinstance(values, str | bytes) or (self.count is not None and len(values) != self.count):
            raise ValueError
        return tuple(self.each.read(value) for value in values)

    def __str__(self) -> str:
        return f"{self.count or 'a list of'} number{'s' * (self.count != 1)}, each {self.each}"


@dataclass(frozen=True)
class OneOf:
    """One of a few names."""

    names: tuple[str, ...]

    def read(self, value: Any) -> str:
        """The name; ValueError where it is none of them."""
        if value not in self.names:
            raise ValueError
        return value

    def __str__(self) -> str:
        *first, last = map(repr, self.names)
        return f"{', '.join(first)} or {last}"

    def hint(self, value: Any) -> str:
        """The nearest name."""
        near = get_close_matches(str(value), self.names, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Names:
    """A sequence of names, read as a tuple.

    Attributes:
        alone: whether one name stands for a sequence of one.
    """

    alone: bool = True

    def read(self, values: Any) -> tuple[str, ...]:
        """The names as a tuple; ValueError where there are others than names."""
        single = isinstance(values, str)
        names = (values,) if single else tuple(values)
        if (single and not self.alone) or not all(isinstance(name, str) for name in names):
            raise ValueError
        return names

    def __str__(self) -> str:
        return "a list of names"


@dataclass(frozen=True)
class String:
    """A string."""

    def read(self, value: Any) -> str:
        """The string; ValueError where it is none."""
        if not isinstance(value, str):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "a string"


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def read(self, value: Any) -> bool:
        """The truth value; ValueError where it is none."""
        if not isinstance(value, bool):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "True or False"


Rule = Real | Reals | OneOf | Names | String | Flag

Number = Annotated[float, Real()]
Positive = Annotated[float, Real(above=0)]
NotNegative = Annotated[float, Real(at_least=0)]
COUNTABLE = Real(at_least=-(2.0**53), at_most=2.0**53)  # beyond it float64 cannot count by one
Position = Annotated[float, COUNTABLE]
Count = Annotated[int, Whole(at_least=1)]
WholeNumber = Annotated[int, Whole(at_least=0)]
Switch = Annotated[bool, Flag()]


def find_rule(annotation: Any) -> tuple[Rule | None, bool]:
    """The rule in an annotation, if it has one, and whether None fits as well."""
    for part in (annotation, *get_args(annotation)):
        for entry in getattr(part, "__metadata__", ()):
            if isinstance(entry, Rule):
                return entry, NoneType in (*get_args(annotation), *get_args(get_args(part)[0]))
    return None, True


def read_value(owner: str, name: str, value: Any, annotation: Any) -> Any:
    """The value that an annotation's rule reads; the value itself where it has no rule.

    Args:
        owner: what the message calls the object or function, such as "Scheme".
        name: of the field or option.
        value: what was given.
        annotation: of the field or option.

    Raises:
        ValueError: a value that does not fit.
    """
    rule, optional = find_rule(annotation)
    return value if rule is None or (value is None and optional) else apply_rule(owner, name, value, rule)


def apply_rule(owner: str, name: str, value: Any, rule: Rule) -> Any:
    """The value as the rule reads it.

    Args:
        owner: what the message calls the object or function.
        name: of the field or option.
        value: what was given.
        rule: what fits.

    Raises:
        ValueError: a value that does not fit, with the owner and the name.
    """
    try:
        return rule.read(value)
    except (TypeError, ValueError, OverflowError):
        hint = rule.hint(value) if isinstance(rule, OneOf) else ""
        raise ValueError(f"{owner}: {name} must be {rule}, not {value!r}{hint}") from None


@cache  # of classes alone
def field_rules(kind: type) -> Sequence[tuple[str, Rule, bool]]:
    """Name, rule and whether None fits, of every annotated field that has a rule."""
    hints = get_type_hints(kind, include_extras=True)
    found = ((name, *find_rule(hint)) for name, hint in hints.items())
    return [(name, rule, optional) for name, rule, optional in found if rule is not None]


def check_fields(instance: Any) -> None:
    """Read every annotated field of a frozen dataclass; call it in `__post_init__`.

    Raises:
        ValueError: a value that does not fit.
    """
    kind = type(instance)
    for name, rule, optional in field_rules(kind):
        value = getattr(instance, name)
        if value is not None or not optional:
            object.__setattr__(instance, name, apply_rule(kind.__name__, name, value, rule))
