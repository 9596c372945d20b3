"""A scheme is a layout, frequencies and a pairing under one name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rope_mm.choice import Choice
from rope_mm.frequencies import make_omega
from rope_mm.positions import LAYOUTS, Cursor, place
from rope_mm.segments import Segment


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Where tokens stand and how fast each pair of channels turns; frozen, hashable, printable.

    Attributes:
        layout: key of LAYOUTS; `options` are its own numbers, as (name, value) pairs.
        theta: the base of the ladder; `ladder` "shared" (RoPE-1D's own) or "own" (one for each axis).
        ownership: which axis turns which pair, a key of OWNERSHIPS or "dense"; `shares` are their parts.
        pairing: channels that turn together, "half" (i, i + r) or "interleaved" (2i, 2i + 1).
        fraction: part of the head's channels that is rotated, the first ones.
        learnable: whether Omega is a parameter; `per_head`: whether models give each key head its own.
    """

    layout: str
    options: tuple[tuple[str, float], ...] = ()
    theta: float = 10_000.0
    ladder: str = "shared"
    ownership: str = "round-robin"
    shares: tuple[int, ...] | None = None
    pairing: str = "half"
    fraction: float = 1.0
    learnable: bool = False
    per_head: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that its positions have."""
        return LAYOUTS[self.layout].axes

    def place(self, story: str | Sequence[Segment], cursor: Cursor | None = None) -> tuple[Tensor, Cursor]:
        """Positions (s, a) of a story and the cursor after it: `place` with this scheme's layout."""
        return place(story, self.layout, cursor, **dict(self.options))

    def omega(self, head_dim: int, heads: int | None = None) -> Tensor:
        """Omega (a, r) float64, or (heads, a, r).

        Raises:
            ValueError: a head_dim that is odd or leaves no pair to rotate.
        """
        pairs = int(head_dim * self.fraction) // 2
        if head_dim % 2 or not 0 < pairs <= head_dim // 2:
            raise ValueError(
                f"head_dim {head_dim} with fraction {self.fraction} makes no whole pairs; "
                "take an even head_dim and a fraction in (0, 1]"
            )
        return make_omega(len(self.axes), pairs, self.theta, self.ownership, self.shares, self.ladder, heads)


SCHEMES = Choice(
    "scheme",
    {
        "flat": Scheme(layout="flat"),
        "grid": Scheme(layout="grid", ladder="own", ownership="chunk"),
        "m-rope": Scheme(layout="m-rope", ownership="chunk", shares=(2, 3, 3)),
        "m-rope-qwen2-vl": Scheme(layout="m-rope", ownership="chunk", shares=(2, 3, 3), theta=1e6),
        "m-rope-qwen3-vl": Scheme(layout="m-rope", ownership="stride3", shares=(6, 5, 5), theta=5e6),
        "rope-tie": Scheme(layout="rope-tie"),
        "rope-tv": Scheme(layout="rope-tv"),
        "rope-tv-2d": Scheme(layout="rope-tv-2d"),
        "rope-tv-causal": Scheme(layout="rope-tv-causal"),
        "mixed": Scheme(layout="rope-tv", ownership="dense", ladder="own", learnable=True, per_head=True),
    },
)


def read_scheme(scheme: str | Scheme, **changes: Any) -> Scheme:
    """The scheme of that name, with some fields changed; None leaves a field as it is.

    Raises:
        ValueError: an unknown name or field.
    """
    chosen = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    changes = {field: frozen(value) for field, value in changes.items() if value is not None}
    if unknown := set(changes) - set(Scheme.__dataclass_fields__):
        raise ValueError(
            f"a scheme has no {sorted(unknown)}; it has {', '.join(Scheme.__dataclass_fields__)}"
        )
    return replace(chosen, **changes)


def frozen(value: Any) -> Any:
    """Lists, as JSON brings them, as tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
