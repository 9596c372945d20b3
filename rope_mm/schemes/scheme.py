"""Scheme: a layout, frequencies and a pairing of channels in one frozen spec."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rope_mm.positions.grids import Cursor
from rope_mm.positions.layouts import LAYOUTS
from rope_mm.positions.place import place, read_options
from rope_mm.schemes.extensions import EXTENSIONS, Extension
from rope_mm.schemes.frequencies import Ladder, apportion, make_omega
from rope_mm.segments import Segment


@dataclass(frozen=True, kw_only=True, repr=False)
class Scheme:
    """Where tokens stand and how fast each pair of channels turns; frozen, hashable, printable, JSON.

    Attributes:
        layout: key of LAYOUTS; `options` are its own numbers, as (name, value) pairs.
        theta: the base of the geometric ladder; `scale` multiplies Omega, one number or one for each axis.
        ladder: "shared" (RoPE-1D's own), "own" (one for each axis) or "dealt"; `spacing` of its rungs is
            "geometric", or "log" or "linear" from the first to the last number of `band`.
        ownership: which axis turns which pair, a key of OWNERSHIPS or DIRECTIONS; `order` names the axes in
            their order, all of the layout's if empty; `shares` are their parts.
        pairing: channels that turn together, "half" (i, i + r), "interleaved" (2i, 2i + 1) or "block" (half
            within each axis' own channels).
        fraction: part of the head's channels that is rotated. `slot` says which: the "front" or the "tail" of
            them; "padded" rotates the whole head, the first pairs by nothing. `still` of the slowest pairs
            stand still.
        extensions: for longer contexts, from `rope_mm.schemes.extensions`; `attention` multiplies cosine
            and sine.
        learnable: whether Omega is a parameter; `per_head`: whether models give each key head its own;
            `across`: whether one ladder runs over the pairs of all heads.
    """

    layout: str
    options: tuple[tuple[str, Any], ...] = ()
    theta: float = 10_000.0
    ladder: str = "shared"
    spacing: str = "geometric"
    band: tuple[float, float] = (1.0, 1.0)
    scale: float | tuple[float, ...] = 1.0
    ownership: str = "round-robin"
    order: tuple[str, ...] = ()
    shares: tuple[float, ...] | None = None
    pairing: str = "half"
    fraction: float = 1.0
    slot: str = "front"
    still: float = 0.0
    extensions: tuple[Extension, ...] = ()
    attention: float = 1.0
    learnable: bool = False
    per_head: bool = False
    across: bool = False

    def __post_init__(self):
        read_options(self.layout, dict(self.options))
        if unknown := set(self.order) - set(self.axes):
            raise ValueError(f"order names {sorted(unknown)}, but layout {self.layout!r} has {self.axes}")
        if self.slot not in ("front", "tail", "padded"):
            raise ValueError(f"slot must be 'front', 'tail' or 'padded', not {self.slot!r}")
        for extension in self.extensions:
            if unknown := set(extension.axes) - set(self.axes):
                raise ValueError(f"{extension} extends {sorted(unknown)}, but the axes are {self.axes}")
            walked = self.word_axes & set(extension.axes or self.axes)
            if walked and not extension.moves_words:
                raise ValueError(f"{extension} is for frames, but words walk along {sorted(walked)} too")

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that its positions have."""
        return LAYOUTS[self.layout].axes

    @property
    def word_line(self) -> tuple[list[float], list[float]]:
        """Origin and step on each axis: a word at the cursor's `next` n stands at origin + n * step."""
        with torch.device("cpu"):  # data, also where models are built on the meta device
            words, _ = LAYOUTS[self.layout].words(Cursor(), 2, len(self.axes))
        return words[0].tolist(), (words[1] - words[0]).tolist()

    @property
    def word_axes(self) -> set[str]:
        """Axes along which words are counted."""
        return {axis for axis, step in zip(self.axes, self.word_line[1], strict=True) if step}

    @property
    def factor(self) -> float:
        """What cosine and sine are multiplied by, extensions included."""
        return math.prod((self.attention, *(extension.attention for extension in self.extensions)))

    @property
    def needs_length(self) -> bool:
        """Whether Omega depends on how long the sequence is."""
        return any(extension.needs_length for extension in self.extensions)

    def place(self, story: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of a story and the cursor after it: `place` with this scheme's layout."""
        return place(story, self.layout, cursor, **dict(self.options))

    def pairs(self, head_dim: int) -> int:
        """How many pairs of a head have a frequency.

        Raises:
            ValueError: a head_dim that is odd or leaves no pair to rotate.
        """
        pairs = floor_int(head_dim * self.fraction) // 2
        if head_dim % 2 or not 0 < pairs <= head_dim // 2:
            raise ValueError(
                f"head_dim {head_dim} with fraction {self.fraction} makes no whole pairs; "
                "take an even head_dim and a fraction in (0, 1]"
            )
        return pairs

    def blocks(self, head_dim: int) -> tuple[int, ...]:
        """Pairs in each block of the pairing "block", an axis each; () for other pairings."""
        shares = self.shares or (1,) * len(self.order or self.axes)
        return tuple(apportion(self.pairs(head_dim), shares)) if self.pairing == "block" else ()

    def omega(self, head_dim: int, heads: int | None = None, length: float | Sequence[float] = 0.0) -> Tensor:
        """Omega (a, r) float64, or (heads, a, r), for positions below `length`, one number or one per axis.

        Raises:
            ValueError: a head_dim that is odd or leaves no pair to rotate.
        """
        lengths = [length] * len(self.axes) if isinstance(length, int | float) else length
        with torch.device("cpu"):
            omega = fill_omega(self, head_dim, heads or 1, lengths)
        return omega if heads else omega[0]

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
    def from_dict(cls, entries: dict[str, Any]) -> "Scheme":
        """The scheme that `to_dict` wrote, JSON's lists for tuples.

        Raises:
            ValueError: an unknown field or extension.
        """
        return cls(layout=entries["layout"]).change(**entries)

    def change(self, **changes: Any) -> "Scheme":
        """This scheme with some fields changed; lists become tuples, dicts extensions.

        Raises:
            ValueError: an unknown field or extension.
        """
        changes = {field: to_tuple(value) for field, value in changes.items()}
        if unknown := set(changes) - set(Scheme.__dataclass_fields__):
            known = ", ".join(Scheme.__dataclass_fields__)
            raise ValueError(f"a scheme has no {sorted(unknown)}; it has {known}")
        if "extensions" in changes:
            changes["extensions"] = tuple(map(read_extension, changes["extensions"]))
        return replace(self, **changes)


def fill_omega(scheme: Scheme, head_dim: int, heads: int, lengths: Sequence[float]) -> Tensor:
    """Omega (heads, a, r) of a scheme; rows of axes that turn no pair are 0."""
    order = scheme.order or scheme.axes
    of_order = [scheme.axes.index(axis) for axis in order]
    # one ladder over the pairs of all heads, or one for each
    rows, columns = (1, heads) if scheme.across else (heads, 1)
    pairs = width = scheme.pairs(head_dim) * columns
    if scheme.slot == "padded":
        width = head_dim // 2 * columns
        pairs -= pairs % len(order) if scheme.ownership == "round-robin" else 0  # whole rounds only

    def extend(ladder: Ladder) -> Tensor:
        for extension in scheme.extensions:
            reach = [lengths[axis] for axis in of_order]
            ladder = ladder._replace(speed=extension.extend(ladder, reach, order))
        return ladder.speed

    ladder = scheme.theta, scheme.ownership, scheme.shares, scheme.ladder, scheme.spacing, scheme.band
    turning = make_omega(len(order), pairs, *ladder, extend, rows)
    turning *= torch.tensor(scheme.scale, dtype=torch.float64).expand(len(order))[:, None]
    turning[..., floor_int((1 - scheme.still) * pairs) :] = 0
    omega = torch.zeros(rows, len(scheme.axes), width, dtype=torch.float64)
    omega[:, of_order, width - pairs :] = turning
    return omega.view(len(scheme.axes), heads, -1).transpose(0, 1) if scheme.across else omega


def read_extension(entries: Extension | dict[str, Any]) -> Extension:
    """An extension from its dict, such as {"rope_type": "yarn", "factor": 4, "original": 4096}.

    Raises:
        ValueError: an unknown rope_type or number, or one that is missing.
    """
    if isinstance(entries, Extension):
        return entries
    numbers = {key: to_tuple(value) for key, value in entries.items() if key != "rope_type"}
    kind = EXTENSIONS[entries.get("rope_type", "")]
    try:
        return kind(**numbers)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{entries['rope_type']} takes {known}, not {sorted(numbers)} ({error})") from error


def floor_int(number: float) -> int:
    """The whole part of a number that rounding may have left just below: n / d * d is n."""
    return int(number + 1e-9)


def to_tuple(value: Any) -> Any:
    """Lists, as JSON brings them, as tuples."""
    return tuple(map(to_tuple, value)) if isinstance(value, list | tuple) else value
