"""What a scheme promises: measured on fixed pictures and stories, never declared by hand."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from rope_mm.analysis.check import check_rotary
from rope_mm.analysis.markdown import table
from rope_mm.positions.place import layout_id
from rope_mm.registry import Registry
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES, read_scheme
from rope_mm.segments import Image, Segment, Text, Video, read_segments

HEAD_DIM, HEADS = 64, 4
WORDS = (1, 6)  # before a picture
SIDES = ((1, 1), (1, 6), (6, 1), (2, 2), (3, 3), (2, 4), (4, 2), (3, 4), (5, 2))
PICTURES = [Image(y, x) if t == 1 else Video(t, y, x) for t, (y, x) in product((1, 2, 3, 8), SIDES)]
SQUARE = Image(16, 16)
STORY = "text:8 image:4x6 text:4 video:12x2x4 text:8"  # its video is longer than it is wide


@cache
def turned(scheme: Scheme) -> Tensor:
    """Which axes (a,) turn any channel: the others a model cannot see."""
    return scheme.omega(HEAD_DIM, HEADS).abs().amax((0, 2)) > 0


def turned_positions(scheme: Scheme, story: str | list[Segment]) -> Tensor:
    """Positions (s, a) on the axes that are turned."""
    return scheme.place(story)[0][:, turned(scheme)]


class Neighborhood(NamedTuple):
    """Positions of a picture's patches (n, a), of the words L before and K after it, a word's step (a,)."""

    before: Tensor
    patches: Tensor
    after: Tensor
    step: Tensor


def look(scheme: Scheme, picture: Segment, words: int) -> Neighborhood:
    """A picture among words, of which so many are before it."""
    p = turned_positions(scheme, [Text(words), picture, Text(2)])
    return Neighborhood(p[words - 1], p[words:-2], p[-2], p[-1] - p[-2])


def same(x: Tensor, y: Tensor) -> bool:
    """Equal but for the rounding of thirds and the like."""
    return bool(((x - y).abs() < 1e-9).all())


def compatible(scheme: Scheme) -> bool:
    """A text alone is rotated as by RoPE-1D of the same theta and pairs: p_n Omega = n theta^(-i / r)."""
    everywhere = tuple(extension for extension in scheme.extensions if not extension.axes)
    line = Scheme(
        layout="flat",
        theta=scheme.theta,
        fraction=scheme.fraction,
        slot=scheme.slot,
        still=scheme.still,
        extensions=everywhere,
    )
    angles, expected = (s.place("text:64")[0] @ s.omega(HEAD_DIM, HEADS) for s in (scheme, line))
    return same(angles, expected)


def room(sight: Neighborhood) -> float | None:
    """Positions that a picture takes on the words' walk: K - L - 1; None where words do not walk."""
    pace = sight.step @ sight.step
    return ((sight.after - sight.before) @ sight.step / pace - 1).item() if pace else None


def rate(sights: Iterable[Neighborhood]) -> float | None:
    """Words that a patch counts, (K - L - 1) / n, if that is the same in all pictures."""
    taken = {(room(sight), len(sight.patches)) for sight in sights}
    rates = {None if words is None else round(words / patches, 9) for words, patches in taken}
    return rates.pop() if len(rates) == 1 else None


def symmetric(sight: Neighborhood) -> Tensor:
    """Axes (a,) on which the gap before is the gap after: p_1 - L = K - p_n."""
    return (sight.patches[0] + sight.patches[-1] - sight.before - sight.after).abs() < 1e-9


def central(sight: Neighborhood) -> bool:
    """Whether every patch has a mirror image: p_k + p_(n + 1 - k) = L + K."""
    return same(sight.patches + sight.patches.flip(0), sight.before + sight.after)


def causal(scheme: Scheme, y: int, x: int, frames: int = 6) -> bool:
    """Whether a longer video begins as the shorter one: p_k of t frames = p_k of more."""
    whole = turned_positions(scheme, [Text(2), Video(frames, y, x)])
    shorter = (turned_positions(scheme, [Text(2), Video(t, y, x)]) for t in range(1, frames))
    return all(same(part, whole[: len(part)]) for part in shorter)


def collisions(scheme: Scheme, story: str = STORY) -> tuple[int, int]:
    """Tokens of a story that share their position with another, and words that stand on a patch."""
    word = torch.cat([torch.full((s.tokens,), isinstance(s, Text)) for s in read_segments(story)])
    rounded = turned_positions(scheme, story).round(decimals=9) + 0.0  # no -0
    _, place, count = rounded.unique(dim=0, return_inverse=True, return_counts=True)
    return int((count[place] > 1).sum()), int(torch.isin(place[word], place[~word]).sum())


def distance(here: Tensor, there: Tensor) -> float:
    """Mean |p - q| over tokens and axes, so that neighbours among words are 1 apart."""
    return (here - there).abs().mean().item()


def distances(scheme: Scheme, picture: Segment) -> tuple[float, float] | None:
    """From the word before to the patches and to the word after; None where more words before change it."""
    few, many = (look(scheme, picture, words) for words in WORDS)
    (near, far), other = ((distance(s.before, s.patches), distance(s.patches, s.after)) for s in (few, many))
    return (near, far) if same(torch.tensor((near, far)), torch.tensor(other)) else None


def inside_text(sight: Neighborhood) -> bool:
    """Whether the picture lies among its words on every axis: L < p < K."""
    return bool(((sight.before < sight.patches) & (sight.patches < sight.after)).all())


def integral(sight: Neighborhood) -> bool:
    """Whether all coordinates are whole numbers."""
    return not (torch.cat((sight.patches, sight.after[None])) % 1).any()


@dataclass(frozen=True)
class LayoutProperties:
    """What a scheme keeps of RoPE-TV's three principles (kexue.fm 10352) and more, on the axes that it turns.

    Pictures are PICTURES, each among words. Schemes for pictures alone place each from the same origin, so
    that pictures and words collide there.

    Attributes:
        scheme: its name.
        compatible: a text alone is rotated as by RoPE-1D of the same theta.
        equivalent: n patches count as n words; `rate` is how many words a patch counts where that is the
            same for all pictures, else None.
        symmetric: the gap before a picture is the gap after it; `symmetric_on` has the axes where it is.
        central: the k-th patch stands after the word before as the k-th last before the word after.
        causal: a longer video never moves an earlier frame.
        between: a picture lies past the word before it and short of the word after it on every axis.
        collisions: tokens of STORY that share their position; `words_on_patches` of its words are on a patch.
        density: patches of SQUARE per position that it takes; None where it takes none.
        distances: of its patches, on average, from the word before and from the word after; None where that
            depends on how many words came before.
        integral: all coordinates are whole numbers.
        rotation: error from `check_rotary`; `relative`, too; `rotary` is whether its report is all well.
    """

    scheme: str
    compatible: bool
    equivalent: bool
    rate: float | None
    symmetric: bool
    symmetric_on: tuple[str, ...]
    central: bool
    causal: bool
    between: bool
    collisions: int
    words_on_patches: int
    density: float | None
    distances: tuple[float, float] | None
    integral: bool
    rotation: float
    relative: float
    rotary: bool


def takes(scheme: Scheme, picture: Segment) -> bool:
    """Whether the layout places it at all: blocks of patches want even sides."""
    try:
        return bool(scheme.place([picture]))
    except ValueError:
        return False


def measure_properties(scheme: str | Scheme) -> LayoutProperties:
    """What a scheme promises, measured.

    Raises:
        ValueError: an unknown name.
    """
    chosen = read_scheme(scheme)
    pictures = [picture for picture in PICTURES if takes(chosen, picture)]
    sights = [look(chosen, picture, words) for picture, words in product(pictures, WORDS)]
    everywhere = torch.stack([symmetric(sight) for sight in sights]).all(0)
    axes = [axis for axis, turns in zip(chosen.axes, turned(chosen), strict=True) if turns]
    square, words_per_patch = look(chosen, SQUARE, words=8), rate(sights)
    taken, (shared, on_patches) = room(square), collisions(chosen)
    report = check_rotary(Rotary(HEAD_DIM, chosen, heads=HEADS))
    return LayoutProperties(
        scheme=scheme if isinstance(scheme, str) else layout_id(chosen.layout, dict(chosen.options)),
        compatible=compatible(chosen),
        equivalent=words_per_patch == 1,
        rate=words_per_patch,
        symmetric=bool(everywhere.all()),
        symmetric_on=tuple(axis for axis, holds in zip(axes, everywhere, strict=True) if holds),
        central=all(map(central, sights)),
        causal=all(causal(chosen, y, x) for y, x in SIDES if takes(chosen, Image(y, x))),
        between=all(map(inside_text, sights)),
        collisions=shared,
        words_on_patches=on_patches,
        density=SQUARE.tokens / taken if taken else None,
        distances=distances(chosen, SQUARE),
        integral=all(map(integral, sights)),
        rotation=report.rotation,
        relative=report.relative,
        rotary=report.ok,
    )


def answer(promised: bool, otherwise: str = "") -> str:
    """Yes or no, and what holds where it is no."""
    return "yes" if promised else f"no ({otherwise})" if otherwise else "no"


def number(value: float | None) -> str:
    """Four digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


COLUMNS: dict[str, Callable[[LayoutProperties], str]] = {
    "compatible": lambda p: answer(p.compatible),
    "equivalent": lambda p: answer(p.equivalent, "" if p.rate is None else number(p.rate)),
    "symmetric": lambda p: answer(p.symmetric, " ".join(p.symmetric_on)),
    "central": lambda p: answer(p.central),
    "causal": lambda p: answer(p.causal),
    "between": lambda p: answer(p.between),
    "collisions": lambda p: f"{p.collisions} ({p.words_on_patches})" if p.collisions else "0",
    "density": lambda p: number(p.density),
    "distances": lambda p: ", ".join(map(number, p.distances or [None])),
    "integral": lambda p: answer(p.integral),
    "rotary": lambda p: answer(p.rotary),
}


def markdown(rows: list[LayoutProperties]) -> str:
    """A table whose first cells are names in code."""
    lines = [[f"`{row.scheme}`", *(cell(row) for cell in COLUMNS.values())] for row in rows]
    return table(["scheme", *COLUMNS], lines)


def text(rows: list[LayoutProperties]) -> str:
    """Columns side by side."""
    lines = [["scheme", *COLUMNS], *([row.scheme, *(cell(row) for cell in COLUMNS.values())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def to_json(rows: list[LayoutProperties]) -> str:
    """A list of objects, every field and digit."""
    return json.dumps([asdict(row) for row in rows], indent=2)


FORMATS: Registry[Callable[[list[LayoutProperties]], str]] = Registry(
    "format", {"text": text, "markdown": markdown, "json": to_json}
)


def properties_table(schemes: Iterable[str | Scheme] = SCHEMES, format: str = "text") -> str:
    """A line for each scheme of what it promises, as "text", "markdown" or "json".

    Raises:
        ValueError: an unknown name or format.
    """
    write = FORMATS[format]
    return write([measure_properties(scheme) for scheme in schemes])
