"""Pictures of a scheme: matplotlib Figures (extra `plots`), in colours safe for colour-blind readers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rope_mm.analysis.figures import new_figure
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme
from rope_mm.segments import Image, Segment, Text, Video, read_segments

# Okabe and Ito's colours, and a shape beside each, so that no difference rests on colour alone
STYLES = {Text: ("#000000", "o"), Image: ("#D55E00", "s"), Video: ("#0072B2", "^")}
OTHER = ("#009E73", "D")


def style_of(segment: Segment) -> tuple[str, str]:
    """Colour and marker of a segment's type."""
    return next((style for kind, style in STYLES.items() if isinstance(segment, kind)), OTHER)


def plane_axes(axes: Sequence[str]) -> tuple[int, int]:
    """Indices of the two axes that a plane shows: rows and columns where there are any, else the last two."""
    if "y" in axes and "x" in axes:
        return axes.index("y"), axes.index("x")
    return max(len(axes) - 2, 0), len(axes) - 1


def draw_rows(panels: Any, positions: Tensor, segments: Sequence[Segment], axes: Sequence[str]) -> None:
    """One panel for each axis: the coordinate of every token, in the order of the sequence."""
    start = 0
    for segment in segments:
        stop = start + segment.tokens
        colour, marker = style_of(segment)
        for panel, column in zip(panels, positions.T, strict=True):
            panel.plot(range(start, stop), column[start:stop].tolist(), marker, color=colour, markersize=4)
        start = stop
    for panel, axis in zip(panels, axes, strict=True):
        panel.set_ylabel(axis, rotation=0, labelpad=12)
        panel.grid(alpha=0.3)
        panel.label_outer()
    panels[-1].set_xlabel("token number")


def draw_plane(panel: Any, positions: Tensor, segments: Sequence[Segment], axes: Sequence[str]) -> None:
    """Tokens on the plane of rows and columns, the origin at the top left, a label for each type."""
    row, column = plane_axes(axes)
    start, labelled = 0, set()
    for segment in segments:
        here = positions[start : start + segment.tokens]
        colour, marker = style_of(segment)
        name = "" if type(segment) in labelled else type(segment).__name__.lower()
        labelled.add(type(segment))
        x, y = here[:, column].tolist(), here[:, row].tolist()
        panel.plot(x, y, marker, color=colour, markersize=5, label=name or None, alpha=0.8)
        start += segment.tokens
    panel.set_xlabel(axes[column])
    panel.set_ylabel(axes[row], rotation=0, labelpad=12)
    panel.invert_yaxis()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def positions_picture(scheme: str | Scheme, segments: str | Sequence[Segment]) -> Any:
    """Where the tokens of a sequence stand: each axis along the sequence, and rows against columns.

    Args:
        scheme: a key of SCHEMES, or a Scheme.
        segments: segments, or their text form "text:5 image:2x3".

    Returns:
        A matplotlib Figure of 8 x 3.6 inches.

    Raises:
        ValueError: an unknown scheme, what is no segment, or no matplotlib.
    """
    chosen, segments = read_scheme(scheme), read_segments(segments)
    positions, _ = chosen.place(segments)
    axes = chosen.axes
    figure = new_figure(8.0, 3.6)
    grid = figure.add_gridspec(len(axes), 2, width_ratios=(3, 2))
    panels: list[Any] = []
    for number in range(len(axes)):
        panels.append(figure.add_subplot(grid[number, 0], sharex=panels[0] if panels else None))
    draw_rows(panels, positions, segments, axes)
    draw_plane(figure.add_subplot(grid[:, 1]), positions, segments, axes)
    return figure
