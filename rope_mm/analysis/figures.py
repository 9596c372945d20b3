"""Figures, of matplotlib, which is not needed for anything else."""

from pathlib import Path
from typing import Any

from rope_mm.checks.extras import extra
from rope_mm.files import write_file


def new_figure(width: float, height: float) -> Any:
    """An empty figure; width and height are in inches.

    Raises:
        MissingPackage: no matplotlib.
    """
    with extra("plots"):
        from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def save_figure(path: Path, figure: Any, dpi: int = 100) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    write_file(path, lambda part: figure.savefig(part, format="png", dpi=dpi))
