"""Scheme: a layout, frequencies and a pairing of channels in one frozen spec."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rope_mm.checks.fields import (
    Flag,
    Names,
    OneOf,
    Positive,
    Real,
    Reals,
    Whole,
    apply_rule,
    check_fields,
    read_value,
)
from rope_mm.positions.cursor import Cursor
from rope_mm.positions.layouts import LAYOUTS
from rope_mm.positions.place import place, read_options
from rope_mm.schemes.extensions import EXTENSIONS, Extension, read_extension
from rope_mm.schemes.frequencies import (
    LADDERS,
    SPACINGS,
    Ladder,
    apportion,
    check_ownership,
    check_shares,
    make_omega,
)
from rope_mm.segments import Segment

PAIRING_NAMES = ("half", "interleaved", "block")
OFFSETS = ("start", "end", "padded")
DEPENDENT = ("theta", "freq_range", "axis_shares", "ladder")  # have an effect only with some other fields
ONE_GROUP = ("golden", "headwise")  # ownerships whose pairs share one ladder, whatever it is called
UNSHARED = ("golden", "simplex")  # ownerships whose directions take no shares
OLD_FIELDS = {
    "still": "unrotated_fraction",
    "slot": "channel_offset",
    "across": "ladder_over_heads",
    "order": "axis_order",
    "shares": "axis_shares",
    "band": "freq_range",
    "scale": "freq_scale",
    "attention": "attention_factor",
}
# what other libraries call a field
FOREIGN_FIELDS = {
    "base": "theta",
    "rope_theta": "theta",
    "rope_base": "theta",
    "rope_scaling": "extensions",
    "scaling": "extensions",
    "extension": "extensions",
    "partial_rotary_factor": "fraction",
    "rotary_percent": "fraction",
    "mrope_section": "axis_shares",
    "interleaved": "pairing",
}


Size = Annotated[int, Whole(at_least=1, at_most=2**16)]  # channels or heads; more would fill the memory
FASTEST = 2.0**40  # radians a step: no position but 0 has an exact angle beyond it


@dataclass(frozen=True, kw_only=True, repr=False)
class Scheme:
    """Where tokens stand and by how much each pair of channels rotates: frozen, hashable, printable, JSON.

    Lists are read as tuples, dicts as options and extensions, and one extension as a tuple of one.

    Attributes:
        layout: key of LAYOUTS.
        options: the layout's own numbers, as a dict or as (name, value) pairs.
        theta: base of the spacing "geometric".
        ladder: "shared" (RoPE-1D's own), "own" (one for each axis) or "dealt", a key of LADDERS.
        spacing: "geometric" in theta, or "log" or "linear" over `freq_range`, a key of SPACINGS.
        freq_range: first and last frequency of the spacings "log" and "linear".
        freq_scale: what Omega is multiplied by, one number or one for each axis of `axis_order`.
        ownership: which axis rotates which pair, a key of OWNERSHIPS or DIRECTIONS.
        axis_order: the axes that own pairs, in the order of ownership; () takes all of the layout.
        axis_shares: the part of the pairs of each axis of `axis_order`, in any unit; None gives equal parts.
        pairing: the two channels of a pair: "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half
            within the channels of each axis).
        fraction: the part of a head's channels that is rotated.
        channel_offset: where they are: at the "start" or the "end" of the head; "padded" rotates the whole
            head, its first pairs by nothing.
        unrotated_fraction: the part of the pairs, those of the lowest frequencies, whose frequency is 0.
        extensions: for longer contexts, from `rope_mm.schemes.extensions`.
        attention_factor: what cosine and sine are multiplied by, before the extensions' own factors.
        learnable: whether Omega is a parameter.
        per_head: whether models give each key head an Omega of its own.
        ladder_over_heads: whether one ladder runs over the pairs of all heads.

    Examples:
        >>> scheme = Scheme(layout="rope-tv", theta=100.0)
        >>> scheme.axes
        ('t', 'y', 'x')
        >>> scheme.omega(8).shape
        torch.Size([3, 4])
    """

    layout: str
    options: tuple[tuple[str, Any], ...] = ()
    theta: Positive = 10_000.0
    ladder: str = "shared"
    spacing: str = "geometric"
    freq_range: Annotated[tuple[float, float], Reals(count=2)] = (1.0, 1.0)
    freq_scale: float | tuple[float, ...] = 1.0
    ownership: str = "round-robin"
    axis_order: Annotated[tuple[str, ...], Names()] = ()
    axis_shares: Annotated[tuple[float, ...], Reals(Real(at_least=0))] | None = None
    pairing: Annotated[str, OneOf(PAIRING_NAMES)] = "half"
    fraction: Annotated[float, Real(above=0, at_most=1)] = 1.0
    channel_offset: Annotated[str, OneOf(OFFSETS)] = "start"
    unrotated_fraction: Annotated[float, Real(at_least=0, below=1)] = 0.0
    extensions: tuple[Extension, ...] = ()
    attention_factor: Positive = 1.0
    learnable: Annotated[bool, Flag()] = False
    per_head: Annotated[bool, Flag()] = False
    ladder_over_heads: Annotated[bool, Flag()] = False

    def __post_init__(self):
        check_fields(self)
        read = {
            "options": tuple(read_options(self.layout, name_options(self.options)).items()),
            "freq_scale": read_scale(self.freq_scale),
            "extensions": read_extensions(self.extensions),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)
        self.check_frequencies()
        self.check_extensions()
        self.check_effects()

    def check_frequencies(self) -> None:
        """Refuse frequencies that do not fit one another or the layout's axes.

        Raises:
            ValueError: what does not fit.
        """
        if unknown := set(self.axis_order) - set(self.axes):
            raise ValueError(
                f"axis_order names {sorted(unknown)}, but layout {self.layout!r} has {self.axes}"
            )
        if len(set(self.axis_order)) < len(self.axis_order):
            raise ValueError(f"axis_order names each axis once, not {self.axis_order}")
        owners = self.axis_order or self.axes
        check_shares(len(owners), self.axis_shares)
        if isinstance(self.freq_scale, tuple) and len(self.freq_scale) != len(owners):
            raise ValueError(f"freq_scale is one number or one for each of {owners}, not {self.freq_scale}")
        check_ownership(self.ownership)
        _ = LADDERS[self.ladder], SPACINGS[self.spacing]
        if self.spacing == "log" and min(self.freq_range) <= 0:
            raise ValueError(f"freq_range of the spacing 'log' must be > 0, not {self.freq_range}")
        # a freq_scale of 0 is meant: it leaves a model as it was
        if self.spacing == "linear" and not any(self.freq_range):
            raise ValueError("all frequencies are 0, so no pair rotates; take a freq_range that is not 0")
        if self.pairing == "block" and self.channel_offset == "padded":
            raise ValueError("pairing 'block' has no padded channels; take channel_offset 'start' or 'end'")

    def check_extensions(self) -> None:
        """Refuse extensions of axes that the layout has not, or that count text where that is not meant.

        Raises:
            ValueError: what does not fit.
        """
        for extension in self.extensions:
            if unknown := set(extension.axes) - set(self.axes):
                raise ValueError(f"{extension} extends {sorted(unknown)}, but the axes are {self.axes}")
            shared = self.text_axes & set(extension.axes or self.axes)
            if shared and not extension.applies_to_text:
                raise ValueError(f"{extension} is for frames, but text is counted on {sorted(shared)}, too")

    def check_effects(self) -> None:
        """Refuse a field that is set and that the other fields leave without effect.

        Raises:
            ValueError: with the field that has an effect.
        """
        for name, why in self.unused.items():
            if name in self.changed:
                raise ValueError(f"{name} has no effect with {why}, not {getattr(self, name)!r}")

    @property
    def unused(self) -> dict[str, str]:
        """The fields that the others leave without effect: with what, and what to do."""
        spacing, ownership = f"spacing {self.spacing!r}; ", f"ownership {self.ownership!r}; "
        free = self.ownership in UNSHARED and self.pairing != "block"
        reasons = {
            "theta": (
                self.spacing != "geometric" and not any(x.reads_theta for x in self.extensions),
                f"{spacing}set freq_range, and leave theta at its default",
            ),
            "freq_range": (self.spacing == "geometric", f"{spacing}set theta, or spacing 'log' or 'linear'"),
            "axis_shares": (free, f"{ownership}leave it at None"),
            "ladder": (self.ownership in ONE_GROUP, f"{ownership}leave it at 'shared'"),
        }
        return {name: why for name, (unused, why) in reasons.items() if unused}

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that its positions have."""
        return LAYOUTS[self.layout].axes

    @property
    def text_line(self) -> tuple[list[float], list[float]]:
        """Origin (a,) and step (a,): text at the cursor's `next` n stands at origin + n * step."""
        with unset_fake_temporarily():  # numbers, also in a forward of fake tensors
            first, second = place("text:2", self.layout, **dict(self.options))[0].tolist()
        return first, [after - before for before, after in zip(first, second, strict=True)]

    @property
    def text_axes(self) -> set[str]:
        """Axes along which text is counted."""
        return {axis for axis, step in zip(self.axes, self.text_line[1], strict=True) if step}

    @property
    def attention_scaling(self) -> float:
        """What cosine and sine are multiplied by, extensions included (transformers' name for it)."""
        return math.prod((self.attention_factor, *(x.attention_scaling for x in self.extensions)))

    @property
    def needs_length(self) -> bool:
        """Whether Omega depends on how long the sequence is."""
        return any(extension.needs_length for extension in self.extensions)

    def place(self, segments: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of segments and the cursor after them: `place` with this scheme's layout."""
        return place(segments, self.layout, cursor, **dict(self.options))

    def pairs(self, head_dim: int) -> int:
        """How many pairs of a head have a frequency.

        Raises:
            ValueError: a head_dim that is odd or leaves no pair to rotate.
        """
        head_dim = read_value("Scheme", "head_dim", head_dim, Size)
        pairs = floor_int(head_dim * self.fraction) // 2
        if head_dim % 2 or not 0 < pairs <= head_dim // 2:
            raise ValueError(
                f"head_dim {head_dim} with fraction {self.fraction} makes no whole pairs; "
                "take an even head_dim and a fraction in (0, 1]"
            )
        return pairs

    def blocks(self, head_dim: int) -> tuple[int, ...]:
        """Pairs in each block of the pairing "block", an axis each; () for other pairings."""
        shares = check_shares(len(self.axis_order or self.axes), self.axis_shares)
        return tuple(apportion(self.pairs(head_dim), shares)) if self.pairing == "block" else ()

    def omega(self, head_dim: int, heads: int | None = None, length: float | Sequence[float] = 0.0) -> Tensor:
        """Omega (a, r) float64, or (heads, a, r), on the CPU.

        Args:
            head_dim: channels of a head.
            heads: rows of Omega; None makes one without that axis.
            length: positions are below it, one number or one per axis; only some extensions read it.

        Raises:
            ValueError: a head_dim that is odd or leaves no pair to rotate, or frequencies that overflow.
        """
        rows = 1 if heads is None else read_value("Scheme", "heads", heads, Size)
        lengths = read_lengths(length, len(self.axes))
        # numbers, also where models are built on the meta device or of fake tensors
        with torch.device("cpu"), unset_fake_temporarily():
            omega = fill_omega(self, head_dim, rows, lengths)
            if not omega.abs().max() <= FASTEST:
                raise ValueError(
                    f"{self} has frequencies that are not finite, or beyond {FASTEST:g} radians a step; take "
                    "other numbers"
                )
            return omega[0] if heads is None else omega

    def unseen_axes(self, omega: Tensor) -> list[str]:
        """Axes that this scheme gives pairs to, but that rotate none of Omega's: heads are too small or few.

        Args:
            omega: (a, r) or (heads, a, r), as from `omega`.
        """
        order = self.axis_order or self.axes
        shares = check_shares(len(order), self.axis_shares)
        scales = self.freq_scale if isinstance(self.freq_scale, tuple) else (self.freq_scale,) * len(order)
        with unset_fake_temporarily():
            rotates = omega.movedim(-2, 0).flatten(1).any(1).tolist()
        meant = zip(order, shares, scales, strict=True)
        return [x for x, share, scale in meant if share and scale and not rotates[self.axes.index(x)]]

    @property
    def changed(self) -> dict[str, Any]:
        """The layout, and every field that is not the default."""
        mine = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in mine.items() if value != default}

    def __repr__(self) -> str:
        return f"Scheme({', '.join(f'{name}={value!r}' for name, value in self.changed.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the default, as JSON can hold them."""
        names = {kind: name for name, kind in EXTENSIONS.items()}
        extensions = [{"rope_type": names[type(x)], **asdict(x)} for x in self.extensions]
        return self.changed | ({"extensions": extensions} if extensions else {})

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Scheme":
        """The scheme that `to_dict` wrote, also after JSON made lists of its tuples.

        Raises:
            ValueError: an unknown field or extension, no layout.
        """
        refuse_unknown(entries)
        if "layout" not in entries:
            raise ValueError("no scheme is named and no layout given; name a scheme, such as 'rope-tv'")
        return cls(**entries)

    def replace(self, **changes: Any) -> "Scheme":
        """This scheme with some fields changed; fields that this leaves without effect get their defaults.

        Raises:
            ValueError: an unknown field or extension, or a value that does not fit or has no effect.
        """
        refuse_unknown(changes)
        carried = [name for name in DEPENDENT if name not in changes]
        bare = replace(self, **{x: Scheme.__dataclass_fields__[x].default for x in carried}, **changes)
        return replace(bare, **{name: getattr(self, name) for name in carried if name not in bare.unused})


def refuse_unknown(entries: Mapping[str, Any]) -> None:
    """Refuse fields that a scheme has not, and name the new name of an old one.

    Raises:
        ValueError: an unknown field.
    """
    known, other = Scheme.__dataclass_fields__, OLD_FIELDS | FOREIGN_FIELDS
    for name in entries:
        if name in other:
            raise ValueError(f"a scheme has no field {name!r}; write {other[name]!r}")
        if name not in known:
            near = [repr(field) for field in get_close_matches(str(name), known, n=3, cutoff=0.4)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"a scheme has no field {name!r}; {hint}`help(rope_mm.Scheme)` lists them")


def name_options(options: Any) -> dict[str, Any]:
    """A layout's numbers by name, from a mapping or from (name, value) pairs.

    Raises:
        ValueError: what is neither.
    """
    try:
        return dict(options)
    except (TypeError, ValueError):
        raise ValueError(
            f"Scheme: options must be a dict of the layout's numbers by name, not {options!r}"
        ) from None


def read_extensions(extensions: Any) -> tuple[Extension, ...]:
    """Extensions as a tuple, from one of them or several, each an Extension or its dict.

    Raises:
        ValueError: what is neither, and as `read_extension`.
    """
    if isinstance(extensions, Extension | Mapping):
        return (read_extension(extensions),)
    try:
        several = None if isinstance(extensions, str) else tuple(extensions)
    except TypeError:  # a tensor () has __iter__, too
        several = None
    if several is None:
        raise ValueError(
            f"Scheme: extensions must be extensions such as YaRN(factor=4, original_max_positions=64), "
            f"not {extensions!r}"
        )
    return tuple(map(read_extension, several))


def read_lengths(length: Any, axes: int) -> Sequence[float]:
    """For each axis the number that positions are below, from one number or one for each axis.

    Raises:
        ValueError: what is neither.
    """
    each = Real(at_least=0)
    try:
        lengths = None if isinstance(length, str) else list(length)
    except TypeError:  # one number, as a tensor () is
        lengths = None
    if lengths is None:
        return [apply_rule("Scheme", "length", length, each)] * axes
    return apply_rule("Scheme", "length", lengths, Reals(each, axes))


def read_scale(scale: Any) -> float | tuple[float, ...]:
    """One number, or a tuple of one per axis.

    Raises:
        ValueError: what is neither.
    """
    rule = Reals() if isinstance(scale, list | tuple) else Real()
    return apply_rule("Scheme", "freq_scale", scale, rule)


def fill_omega(scheme: Scheme, head_dim: int, heads: int, lengths: Sequence[float]) -> Tensor:
    """Omega (heads, a, r) of a scheme; rows of axes that rotate no pair are 0.

    Args:
        scheme: a layout and frequencies.
        head_dim: channels of a head.
        heads: rows of Omega.
        lengths: for each axis, positions are below this number.
    """
    order = scheme.axis_order or scheme.axes
    of_order = [scheme.axes.index(axis) for axis in order]
    # one ladder over the pairs of all heads, or one for each
    rows, columns = (1, heads) if scheme.ladder_over_heads else (heads, 1)
    pairs = width = scheme.pairs(head_dim) * columns
    if scheme.channel_offset == "padded":
        width = head_dim // 2 * columns
        pairs -= pairs % len(order) if scheme.ownership == "round-robin" else 0  # whole rounds only

    def extend(ladder: Ladder) -> Tensor:
        for extension in scheme.extensions:
            reach = [lengths[axis] for axis in of_order]
            ladder = replace(ladder, freq=extension.apply(ladder, reach, order))
        return ladder.freq

    ladder = (
        scheme.theta,
        scheme.ownership,
        scheme.axis_shares,
        scheme.ladder,
        scheme.spacing,
        scheme.freq_range,
    )
    rotating = make_omega(len(order), pairs, *ladder, extend, rows)
    rotating *= torch.tensor(scheme.freq_scale, dtype=torch.float64).expand(len(order))[:, None]
    rotating[..., floor_int((1 - scheme.unrotated_fraction) * pairs) :] = 0
    omega = torch.zeros(rows, len(scheme.axes), width, dtype=torch.float64)
    omega[:, of_order, width - pairs :] = rotating
    return omega.view(len(scheme.axes), heads, -1).transpose(0, 1) if scheme.ladder_over_heads else omega


def floor_int(number: float) -> int:
    """The whole part of a number that rounding may have left just below: n / d * d is n."""
    return int(number + 1e-9)
