"""Scheme: a layout, frequencies and a pairing of channels in one frozen spec."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rope_mm.extension import EXTENSIONS, Extension
from rope_mm.frequencies import Rungs, apportion, make_omega
from rope_mm.lattice import Cursor
from rope_mm.layouts import LAYOUTS
from rope_mm.positions import place, read_options
from rope_mm.segments import Segment


@dataclass(frozen=True, kw_only=True)
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
        extensions: for longer contexts, from `rope_mm.extension`; `attention` multiplies cosine and sine.
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
    def word_axes(self) -> set[str]:
        """Axes along which words are counted."""
        words, _ = LAYOUTS[self.layout].words(Cursor(), 2, len(self.axes))
        return {
            axis for axis, (first, second) in zip(self.axes, words.T.tolist(), strict=True) if first != second
        }

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
        pairs = int(head_dim * self.fraction) // 2
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
        order, rows = self.order or self.axes, heads or 1
        lengths = [length] * len(self.axes) if isinstance(length, int | float) else length
        pairs, ladders = self.pairs(head_dim) * (rows if self.across else 1), 1 if self.across else rows
        padded = head_dim // 2 * (rows if self.across else 1) if self.slot == "padded" else pairs
        if self.slot == "padded" and self.ownership == "round-robin":
            pairs -= pairs % len(order)  # whole rounds only

        def extend(ladder: Rungs) -> Tensor:
            for extension in self.extensions:
                of_order = [lengths[self.axes.index(axis)] for axis in order]
                ladder = ladder._replace(speed=extension.extend(ladder, of_order, order))
            return ladder.speed

        omega = make_omega(
            len(order), pairs, self.theta, self.ownership, self.shares, self.ladder, self.spacing, self.band,
            extend, ladders,
        )  # fmt: skip
        scale = torch.tensor(self.scale, dtype=torch.float64).expand(len(order))
        turning = pairs - math.ceil(self.still * pairs)
        full = torch.zeros(ladders, len(self.axes), padded, dtype=torch.float64)
        full[:, [self.axes.index(axis) for axis in order], padded - pairs : padded - pairs + turning] = (
            omega * scale[:, None]
        )[..., :turning]
        if self.across:
            full = full.view(len(self.axes), rows, -1).transpose(0, 1)
        return full if heads else full[0]

    def to_dict(self) -> dict[str, Any]:
        """Every field that is not the default, as JSON can hold it."""
        fresh = Scheme(layout=self.layout)
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {
            name: value for name, value in mine.items() if name == "layout" or value != getattr(fresh, name)
        }
        names = {cls: name for name, cls in EXTENSIONS.items()}
        if self.extensions:
            kept["extensions"] = [{"rope_type": names[type(x)], **asdict(x)} for x in self.extensions]
        return kept

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
        changes = {field: frozen(value) for field, value in changes.items()}
        if unknown := set(changes) - set(Scheme.__dataclass_fields__):
            known = ", ".join(Scheme.__dataclass_fields__)
            raise ValueError(f"a scheme has no {sorted(unknown)}; it has {known}")
        if "extensions" in changes:
            changes["extensions"] = tuple(map(read_extension, changes["extensions"]))
        return replace(self, **changes)


def read_extension(entries: Extension | dict[str, Any]) -> Extension:
    """An extension from its dict, such as {"rope_type": "yarn", "factor": 4, "original": 4096}.

    Raises:
        ValueError: an unknown rope_type or number, or one that is missing.
    """
    if isinstance(entries, Extension):
        return entries
    numbers = {key: frozen(value) for key, value in entries.items() if key != "rope_type"}
    kind = EXTENSIONS[entries.get("rope_type", "")]
    try:
        return kind(**numbers)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{entries['rope_type']} takes {known}, not {sorted(numbers)} ({error})") from error


def frozen(value: Any) -> Any:
    """Lists, as JSON brings them, as tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
