"""What a scheme promises: measured on fixed images and sequences, never declared by hand."""

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
TEXT_BEFORE = (1, 6)  # tokens before an image
SIDES = ((1, 1), (1, 6), (6, 1), (2, 2), (3, 3), (2, 4), (4, 2), (3, 4), (5, 2))
IMAGES = [Image(y, x) if t == 1 else Video(t, y, x) for t, (y, x) in product((1, 2, 3, 8), SIDES)]
SQUARE = Image(16, 16)
MIXED = "text:8 image:4x6 text:4 video:12x2x4 text:8"  # its video is longer than it is wide


@cache
def rotating_axes(scheme: Scheme) -> Tensor:
    """Which axes (a,) rotate any channel: a model cannot see the others."""
    return scheme.omega(HEAD_DIM, HEADS).abs().amax((0, 2)) > 0


def heads_alike(scheme: Scheme) -> bool:
    """Whether all of several heads are rotated as a single one is."""
    return bool((scheme.omega(HEAD_DIM, HEADS) == scheme.omega(HEAD_DIM)).all())


def rotating_positions(scheme: Scheme, segments: str | list[Segment]) -> Tensor:
    """Positions (s, a) on the axes that rotate any channel."""
    return scheme.place(segments)[0][:, rotating_axes(scheme)]


class Neighborhood(NamedTuple):
    """An image or video among text.

    Attributes:
        before: position L (a,) of the text token before it.
        patches: positions (n, a) of its patches.
        after: position K (a,) of the text token after it.
        step: from one text token to the next (a,).
    """

    before: Tensor
    patches: Tensor
    after: Tensor
    step: Tensor


def image_in_text(scheme: Scheme, image: Segment, before: int) -> Neighborhood:
    """An image after `before` text tokens and before two more."""
    p = rotating_positions(scheme, [Text(before), image, Text(2)])
    return Neighborhood(p[before - 1], p[before:-2], p[-2], p[-1] - p[-2])


def same(x: Tensor, y: Tensor) -> bool:
    """Equal but for the rounding of thirds and the like."""
    return bool(((x - y).abs() < 1e-9).all())


def compatible(scheme: Scheme) -> bool:
    """Text alone is rotated as by RoPE-1D of the same theta and pairs: p_n Omega = n theta^(-i / r)."""
    everywhere = tuple(extension for extension in scheme.extensions if not extension.axes)
    line = Scheme(
        layout="flat",
        theta=scheme.theta,
        fraction=scheme.fraction,
        channel_offset=scheme.channel_offset,
        unrotated_fraction=scheme.unrotated_fraction,
        extensions=everywhere,
    )
    angles, expected = (s.place("text:64")[0] @ s.omega(HEAD_DIM, HEADS) for s in (scheme, line))
    return same(angles, expected)


def span(image: Neighborhood) -> float | None:
    """Positions that an image takes along the text: K - L - 1; None where text is not counted."""
    length = image.step @ image.step
    return ((image.after - image.before) @ image.step / length - 1).item() if length else None


def rate(images: Iterable[Neighborhood]) -> float | None:
    """Text tokens that a patch counts as, (K - L - 1) / n, if that is the same in all images."""
    taken = {(span(image), len(image.patches)) for image in images}
    rates = {None if tokens is None else round(tokens / patches, 9) for tokens, patches in taken}
    return rates.pop() if len(rates) == 1 else None


def symmetric(image: Neighborhood) -> Tensor:
    """Axes (a,) on which the gap before is the gap after: p_1 - L = K - p_n."""
    return (image.patches[0] + image.patches[-1] - image.before - image.after).abs() < 1e-9


def central(image: Neighborhood) -> bool:
    """Whether every patch has a mirror image: p_k + p_(n + 1 - k) = L + K."""
    return same(image.patches + image.patches.flip(0), image.before + image.after)


def causal(scheme: Scheme, y: int, x: int, frames: int = 6) -> bool:
    """Whether a longer video begins as the shorter one: p_k of t frames = p_k of more.

    Args:
        scheme: whose positions are compared.
        y: rows of patches.
        x: columns of patches.
        frames: of the longest video.
    """
    whole = rotating_positions(scheme, [Text(2), Video(frames, y, x)])
    shorter = (rotating_positions(scheme, [Text(2), Video(t, y, x)]) for t in range(1, frames))
    return all(same(part, whole[: len(part)]) for part in shorter)


def collisions(scheme: Scheme, segments: str = MIXED) -> tuple[int, int]:
    """Tokens that share their position with another one, and text tokens that stand on a patch."""
    text = torch.cat([torch.full((s.tokens,), isinstance(s, Text)) for s in read_segments(segments)])
    rounded = rotating_positions(scheme, segments).round(decimals=9) + 0.0  # no -0
    _, place, count = rounded.unique(dim=0, return_inverse=True, return_counts=True)
    return int((count[place] > 1).sum()), int(torch.isin(place[text], place[~text]).sum())


def distance(here: Tensor, there: Tensor) -> float:
    """Mean |p - q| over tokens and axes, so that neighbours in text are 1 apart."""
    return (here - there).abs().mean().item()


def distances(scheme: Scheme, image: Segment) -> tuple[float, float] | None:
    """From the token before to the patches, and from them to the one after; None if more text changes it."""
    few, many = (image_in_text(scheme, image, before) for before in TEXT_BEFORE)
    (near, far), other = ((distance(s.before, s.patches), distance(s.patches, s.after)) for s in (few, many))
    return (near, far) if same(torch.tensor((near, far)), torch.tensor(other)) else None


def inside_text(image: Neighborhood) -> bool:
    """Whether the image lies between the text before and after it on every axis: L < p < K."""
    return bool(((image.before < image.patches) & (image.patches < image.after)).all())


def integral(image: Neighborhood) -> bool:
    """Whether all coordinates are whole numbers."""
    return not (torch.cat((image.patches, image.after[None])) % 1).any()


@dataclass(frozen=True)
class LayoutProperties:
    """What a scheme keeps of RoPE-TV's three principles (kexue.fm 10352) and more, on the axes it rotates by.

    Images are IMAGES, each between text. Schemes for images alone place each at the same origin, so that
    images and text collide there.

    Attributes:
        scheme: its name.
        compatible: text alone is rotated as by RoPE-1D of the same theta.
        equivalent: n patches count as n text tokens.
        rate: text tokens that a patch counts as; None where that is not the same for all images.
        symmetric: the gap before an image is the gap after it.
        symmetric_on: the axes on which it is.
        central: the k-th patch stands after the text as the k-th last stands before it.
        causal: a longer video never moves an earlier frame.
        inside_text: an image lies past the text before it and short of the text after it on every axis.
        collisions: tokens of MIXED that share their position.
        text_on_patches: text tokens of MIXED that stand on a patch.
        density: patches of SQUARE per position that it takes; None where it takes none.
        distances: of its patches, on average, from the text token before and from the one after; None where
            that depends on how much text came before.
        integral: all coordinates are whole numbers.
        rotation: error from `check_rotary`.
        relative: error from `check_rotary`.
        rotary: whether the report of `check_rotary` is all well.
    """

    scheme: str
    compatible: bool
    equivalent: bool
    rate: float | None
    symmetric: bool
    symmetric_on: tuple[str, ...]
    central: bool
    causal: bool
    inside_text: bool
    collisions: int
    text_on_patches: int
    density: float | None
    distances: tuple[float, float] | None
    integral: bool
    rotation: float
    relative: float
    rotary: bool


def fits(scheme: Scheme, image: Segment) -> bool:
    """Whether the layout places it at all: blocks of patches want even sides."""
    try:
        return bool(scheme.place([image]))
    except ValueError:
        return False


def measure_properties(scheme: str | Scheme) -> LayoutProperties:
    """What a scheme promises, measured.

    Args:
        scheme: a key of SCHEMES, or a Scheme.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> measure_properties("rope-tv").causal, measure_properties("rope-tv-causal").causal
        (False, True)
    """
    chosen = read_scheme(scheme)
    fitting = [image for image in IMAGES if fits(chosen, image)]
    images = [image_in_text(chosen, image, before) for image, before in product(fitting, TEXT_BEFORE)]
    everywhere = torch.stack([symmetric(image) for image in images]).all(0)
    axes = [axis for axis, rotates in zip(chosen.axes, rotating_axes(chosen), strict=True) if rotates]
    square, tokens_per_patch = image_in_text(chosen, SQUARE, before=8), rate(images)
    taken, (shared, on_patches) = span(square), collisions(chosen)
    report = check_rotary(Rotary(HEAD_DIM, chosen, heads=None if heads_alike(chosen) else HEADS))
    return LayoutProperties(
        scheme=scheme if isinstance(scheme, str) else layout_id(chosen.layout, dict(chosen.options)),
        compatible=compatible(chosen),
        equivalent=tokens_per_patch == 1,
        rate=tokens_per_patch,
        symmetric=bool(everywhere.all()),
        symmetric_on=tuple(axis for axis, holds in zip(axes, everywhere, strict=True) if holds),
        central=all(map(central, images)),
        causal=all(causal(chosen, y, x) for y, x in SIDES if fits(chosen, Image(y, x))),
        inside_text=all(map(inside_text, images)),
        collisions=shared,
        text_on_patches=on_patches,
        density=SQUARE.tokens / taken if taken else None,
        distances=distances(chosen, SQUARE),
        integral=all(map(integral, images)),
        rotation=report.rotation,
        relative=report.relative,
        rotary=report.ok,
    )


def answer(holds: bool, otherwise: str = "") -> str:
    """Yes or no, and what holds where it is no."""
    return "yes" if holds else f"no ({otherwise})" if otherwise else "no"


def number(value: float | None) -> str:
    """Four digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


COLUMNS: dict[str, Callable[[LayoutProperties], str]] = {
    "compatible": lambda p: answer(p.compatible),
    "equivalent": lambda p: answer(p.equivalent, "" if p.rate is None else number(p.rate)),
    "symmetric": lambda p: answer(p.symmetric, " ".join(p.symmetric_on)),
    "central": lambda p: answer(p.central),
    "causal": lambda p: answer(p.causal),
    "inside text": lambda p: answer(p.inside_text),
    "collisions": lambda p: f"{p.collisions} ({p.text_on_patches})" if p.collisions else "0",
    "density": lambda p: number(p.density),
    "distances": lambda p: ", ".join(map(number, p.distances or [None])),
    "integral": lambda p: answer(p.integral),
    "rotary": lambda p: answer(p.rotary),
}


LEGEND: dict[str, str] = {
    "compatible": "a text alone is rotated as by RoPE in one dimension",
    "equivalent": "n patches count as n text tokens; no (x): each counts as x",
    "symmetric": "the gap before an image equals the gap after it; no (t): on these axes only",
    "central": "the k-th patch stands as far from the text before as the k-th last from the text after",
    "causal": "a longer video moves no earlier frame",
    "inside text": "an image lies between the text before and after it, on every axis",
    "collisions": "tokens of one example that share a position; in brackets: text tokens on a patch",
    "density": "patches per position in a 16 x 16 image",
    "distances": "mean distance per axis of its patches from the text before, and from the text after",
    "integral": "all positions are whole numbers",
    "rotary": "it is a rotation, and attention depends on distances only",
}


def legend() -> str:
    """What the columns of the table mean, a line each."""
    width = max(map(len, LEGEND))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in LEGEND.items())


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
    """A line for each scheme of what it promises.

    Args:
        schemes: keys of SCHEMES, or Schemes; all if nothing is given.
        format: "text", "markdown" or "json".

    Raises:
        ValueError: an unknown name or format.
    """
    write = FORMATS[format]
    return write([measure_properties(scheme) for scheme in schemes])
