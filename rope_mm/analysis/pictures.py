"""Pictures of a scheme: matplotlib Figures (extra `plots`), in colours safe for colour-blind readers.

`picture` makes one of PICTURES, of two schemes side by side if asked; `text_picture` needs no matplotlib.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rope_mm.analysis.figures import new_figure
from rope_mm.analysis.geometry import DEAD_TURN, decay, describe_pairs, find_collisions, scores
from rope_mm.registry import Registry
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme
from rope_mm.segments import Image, Segment, Text, Video, read_segments

EXAMPLE = "text:5 image:4x6 text:4 video:3x3x3 text:4"
MAX_TOKENS = 2_048
# Okabe and Ito's colours, and a shape beside each, so that no difference rests on colour alone
STYLES = {Text: ("#000000", "o"), Image: ("#D55E00", "s"), Video: ("#0072B2", "^")}
OTHER = ("#009E73", "D")
AXIS_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
LETTERS = {Text: "t", Image: "i", Video: "v"}


class NotShown(ValueError):
    """A picture that this sequence cannot have."""


@dataclass(frozen=True)
class Subject:
    """A scheme with a sequence.

    Attributes:
        name: of the scheme.
        scheme: itself.
        segments: what the sequence holds.
        positions: (s, a), where its tokens stand.
        omega: (a, r), radians per step of each pair; of the first head where each has its own.
    """

    name: str
    scheme: Scheme
    segments: list[Segment]
    positions: Tensor
    omega: Tensor

    def parts(self) -> list[tuple[Segment, Tensor]]:
        """Each segment with the positions (n, a) of its tokens."""
        sizes = [segment.tokens for segment in self.segments]
        return list(zip(self.segments, self.positions.split(sizes), strict=True))


def read_subject(
    scheme: str | Scheme, segments: str | Sequence[Segment] = EXAMPLE, head_dim: int = 64
) -> Subject:
    """A scheme with a sequence, placed.

    Args:
        scheme: a key of SCHEMES, or a Scheme.
        segments: segments, or their text form.
        head_dim: channels of a head.

    Raises:
        ValueError: an unknown scheme, what is no segment, no token or more than a picture can show.
    """
    chosen, listed = read_scheme(scheme), read_segments(segments)
    tokens = sum(segment.tokens for segment in listed)
    if not 0 < tokens <= MAX_TOKENS:
        raise ValueError(f"the sequence has {tokens} tokens; a picture shows 1 to {MAX_TOKENS}")
    positions, _ = chosen.place(listed)
    omega = chosen.omega(head_dim, heads=1, length=float(positions.max()) + 1)[0]
    name = scheme if isinstance(scheme, str) else chosen.layout
    return Subject(name, chosen, listed, positions, omega)


def style_of(segment: Segment) -> tuple[str, str]:
    """Colour and marker of a segment's type."""
    return next((style for kind, style in STYLES.items() if isinstance(segment, kind)), OTHER)


def axis_colour(number: int) -> str:
    """Colour of an axis by its number; they repeat after six."""
    return AXIS_COLOURS[number % len(AXIS_COLOURS)]


def plane_axes(axes: Sequence[str]) -> tuple[int, int]:
    """Indices of the two axes that a plane shows: rows and columns where there are any, else the last two."""
    if "y" in axes and "x" in axes:
        return axes.index("y"), axes.index("x")
    return max(len(axes) - 2, 0), len(axes) - 1


def draw_rows(panels: Sequence[Any], subject: Subject) -> None:
    """One panel for each axis: the coordinate of every token, in the order of the sequence."""
    start = 0
    for segment, here in subject.parts():
        colour, marker = style_of(segment)
        numbers = range(start, start + segment.tokens)
        for panel, column in zip(panels, here.T.tolist(), strict=True):
            panel.plot(numbers, column, marker, color=colour, markersize=3.5)
        start += segment.tokens
    for panel, axis in zip(panels, subject.scheme.axes, strict=True):
        panel.set_ylabel(axis, rotation=0, labelpad=10)
        panel.grid(alpha=0.3)
        panel.label_outer()
    panels[-1].set_xlabel("token number")


def draw_plane(panel: Any, subject: Subject) -> None:
    """Tokens by row and column; the gaps beside images, their middle, and rings at tokens that collide."""
    row, column = plane_axes(subject.scheme.axes)
    parts, labelled = subject.parts(), set()
    for segment, here in parts:
        colour, marker = style_of(segment)
        kind = type(segment).__name__.lower()
        label = None if kind in labelled else kind
        labelled.add(kind)
        panel.plot(*xy(here, row, column), marker, color=colour, markersize=4, label=label, alpha=0.8)
    for (_, before), (_, after) in pairwise(parts):
        gap = torch.stack((before[-1], after[0]))
        panel.plot(*xy(gap, row, column), color="#999999", linewidth=0.8)
    for (_, before), (segment, _), (_, after) in zip(parts, parts[1:], parts[2:], strict=False):
        if not isinstance(segment, Text):
            middle = (before[-1:] + after[:1]) / 2  # where a symmetric layout centres it
            panel.plot(*xy(middle, row, column), "x", color="#CC79A7", markersize=7)
    if collided := [token for group in find_collisions(subject.positions) for token in group]:
        rings = subject.positions[collided]
        panel.plot(*xy(rings, row, column), "o", mfc="none", mec="#CC79A7", markersize=9, label="collision")
    panel.set(xlabel=subject.scheme.axes[column])
    panel.set_ylabel(subject.scheme.axes[row], rotation=0, labelpad=10)
    panel.invert_yaxis()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)


def xy(points: Tensor, row: int, column: int) -> tuple[list[float], list[float]]:
    """The columns and rows of points, as matplotlib takes them.

    Args:
        points: (n, a).
        row: index of the axis that runs down.
        column: index of the axis that runs across.
    """
    return points[:, column].tolist(), points[:, row].tolist()


def draw_positions(figure: Any, subject: Subject) -> None:
    """Where the tokens stand: each axis along the sequence, and rows against columns."""
    axes = len(subject.scheme.axes)
    grid = figure.add_gridspec(axes, 2, width_ratios=(3, 2))
    panels: list[Any] = []
    for number in range(axes):
        panels.append(figure.add_subplot(grid[number, 0], sharex=panels[0] if panels else None))
    draw_rows(panels, subject)
    draw_plane(figure.add_subplot(grid[:, 1]), subject)


def draw_ownership(figure: Any, subject: Subject) -> None:
    """Which axis rotates which pair, and how many positions a full turn takes."""
    panel = figure.add_subplot()
    waves = math.tau / subject.omega.abs()  # infinite where an axis does not rotate a pair
    shown = waves.log10().masked_fill(waves.isinf(), math.nan)
    image = panel.imshow(shown.tolist(), aspect="auto", cmap="cividis", interpolation="nearest")
    panel.set_yticks(range(len(subject.scheme.axes)), subject.scheme.axes)
    panel.set_xlabel("pair of channels")
    figure.colorbar(image, ax=panel, label="log10 of the wavelength in positions")


def draw_wavelengths(figure: Any, subject: Subject) -> None:
    """The wavelength of each pair beside the room that the sequence takes; pairs without use are hollow."""
    panel = figure.add_subplot()
    span = (subject.positions.amax(0) - subject.positions.amin(0)).tolist()
    for number, pair in enumerate(describe_pairs(subject.omega, span)):
        if pair["wavelength"] is None:
            continue
        axis = int(torch.tensor(pair["omega"]).abs().argmax())
        colour, dead = axis_colour(axis), pair["state"] != "useful"
        panel.plot(number, pair["wavelength"], "o", color=colour, mfc="none" if dead else colour)
    for axis, reach in enumerate(span):
        name = subject.scheme.axes[axis]
        panel.axhline(max(reach, 1e-3), color=axis_colour(axis), linewidth=1, label=f"room on {name}")
    panel.axhspan(math.tau * max(*span, 1.0) / DEAD_TURN, 1e9, color="#999999", alpha=0.2, label="dead band")
    panel.axhspan(1e-3, 2.0, color="#999999", alpha=0.4, label="beyond Nyquist")
    tops = math.tau / subject.omega.abs()[subject.omega != 0]
    panel.set(yscale="log", xlabel="pair of channels", ylabel="wavelength in positions")
    panel.set_ylim(min(1.0, tops.min().item() / 2), max(tops.max().item(), math.tau * max(*span, 1.0)) * 20)
    panel.legend(frameon=False, fontsize=8)


def draw_decay(figure: Any, subject: Subject) -> None:
    """The expected score of two equal heads by their distance: on each axis, and on all axes at once."""
    panel = figure.add_subplot()
    for number, (axis, speeds) in enumerate(zip(subject.scheme.axes, subject.omega, strict=True)):
        panel.plot(decay(speeds), color=axis_colour(number), label=f"on {axis}")
    panel.plot(decay(subject.omega.sum(0)), color="#000000", linestyle="--", label="on all axes at once")
    panel.axhline(0, color="#999999", linewidth=0.8)
    panel.set(xlabel="distance", ylabel="mean of cos(angle)", ylim=(-1.05, 1.05))
    panel.legend(frameon=False, fontsize=8)


def draw_scores(figure: Any, subject: Subject) -> None:
    """The score of the middle patch of the first image over that image, and over the whole sequence."""
    start = 0
    for segment in subject.segments:
        if not isinstance(segment, Text):
            break
        start += segment.tokens
    else:
        raise NotShown("scores are shown over an image or a video, and the sequence has text alone")
    _, y, x = segment.grid
    token = start + (y // 2) * x + x // 2
    values = scores(subject.positions, subject.omega, token)
    patches = torch.tensor(values[start : start + y * x]).view(y, x)
    plane, line = figure.subplots(1, 2, width_ratios=(1, 2))
    image = plane.imshow(patches.tolist(), cmap="cividis")
    plane.plot(x // 2, y // 2, "x", color="#D55E00")
    plane.set(xlabel="x", ylabel="y", title="first image")
    figure.colorbar(image, ax=plane)
    line.plot(values, color="#000000", linewidth=1)
    line.axvline(token, color="#D55E00", linewidth=1)
    line.set(xlabel="token number", title="whole sequence", ylim=(-1.05, 1.05))


def angle_errors(omega: Tensor, positions: Tensor, dtype: torch.dtype) -> list[float]:
    """The largest error of cos and sin over the pairs where angles are products in a dtype.

    Args:
        omega: (r,), float64.
        positions: (n,), float64.
        dtype: of both factors and of the product; float64 makes the angles exactly and rounds cos and sin.
    """
    truth = torch.outer(positions, omega)
    if dtype == torch.float64:
        made = [f(truth).float().double() for f in (torch.cos, torch.sin)]
    else:
        angle = torch.outer(positions.to(dtype), omega.to(dtype)).double()
        made = [torch.cos(angle), torch.sin(angle)]
    errors = [(m - f(truth)).abs().amax(1) for m, f in zip(made, (torch.cos, torch.sin), strict=True)]
    return torch.maximum(*errors).tolist()


def draw_precision(figure: Any, subject: Subject) -> None:
    """The error of angles by position: as here, with float32 products, and in bfloat16."""
    panel = figure.add_subplot()
    omega, powers = subject.omega.abs().amax(0).double(), range(24)
    positions = torch.tensor([2.0**power - 1 for power in powers], dtype=torch.float64)
    rows = (
        ("exact", torch.float64, "#000000", "o"),
        ("float32 products", torch.float32, "#D55E00", "s"),
        ("bfloat16", torch.bfloat16, "#0072B2", "^"),
    )
    for label, dtype, colour, marker in rows:
        errors = [max(error, 1e-9) for error in angle_errors(omega, positions, dtype)]
        panel.plot([2**power for power in powers], errors, marker=marker, color=colour, label=label)
    panel.set(xscale="log", yscale="log", xlabel="position", ylabel="largest error of cos, sin")
    panel.legend(frameon=False, fontsize=8)


PICTURES: Registry[Callable[[Any, Subject], None]] = Registry(
    "picture",
    {
        "positions": draw_positions,
        "ownership": draw_ownership,
        "wavelengths": draw_wavelengths,
        "decay": draw_decay,
        "scores": draw_scores,
        "precision": draw_precision,
    },
)


def picture(
    name: str,
    scheme: str | Scheme,
    segments: str | Sequence[Segment] = EXAMPLE,
    *,
    head_dim: int = 64,
    compare: str | Scheme | None = None,
) -> Any:
    """One picture of a scheme, or of two side by side.

    Args:
        name: a key of PICTURES.
        scheme: a key of SCHEMES, or a Scheme.
        segments: segments, or their text form "text:5 image:2x3".
        head_dim: channels of a head.
        compare: a second scheme.

    Returns:
        A matplotlib Figure, 8 inches wide for one scheme and 14 for two.

    Raises:
        ValueError: an unknown name or scheme, what is no segment, a sequence that this picture cannot show,
            or no matplotlib.
    """
    draw = PICTURES[name]
    subjects = [read_subject(each, segments, head_dim) for each in (scheme, compare) if each is not None]
    figure = new_figure(8.0 if len(subjects) == 1 else 14.0, 3.6)
    halves = [figure] if len(subjects) == 1 else figure.subfigures(1, 2)
    for half, subject in zip(halves, subjects, strict=True):
        half.suptitle(f"{subject.name}: {' '.join(map(str, subject.segments))}", fontsize=9)
        draw(half, subject)
    return figure


def text_picture(
    scheme: str | Scheme, segments: str | Sequence[Segment] = EXAMPLE, *, width: int = 64, height: int = 20
) -> str:
    """Rows against columns in characters: t text, i image, v video, + another, * where two kinds meet.

    Args:
        scheme: a key of SCHEMES, or a Scheme.
        segments: segments, or their text form.
        width: characters of a line.
        height: lines.

    Raises:
        ValueError: an unknown scheme, what is no segment, no token or more than a picture can show.
    """
    subject = read_subject(scheme, segments)
    row, column = plane_axes(subject.scheme.axes)
    points = subject.positions[:, [row, column]]
    low, room = points.amin(0), (points.amax(0) - points.amin(0)).clamp(min=1e-9)
    cells = ((points - low) / room * torch.tensor([height - 1, width - 1])).round().long().tolist()
    lines = [[" "] * width for _ in range(height)]
    letters = [
        next((letter for kind, letter in LETTERS.items() if isinstance(segment, kind)), "+")
        for segment in subject.segments
        for _ in range(segment.tokens)
    ]
    for (y, x), letter in zip(cells, letters, strict=True):
        lines[y][x] = letter if lines[y][x] in (" ", letter) else "*"
    axes = subject.scheme.axes
    return "\n".join(
        ["".join(line).rstrip() for line in lines] + [f"{axes[row]} down, {axes[column]} across"]
    )
