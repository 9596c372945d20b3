"""Figures, of matplotlib, which is not needed for anything else."""

import io
from collections.abc import Sequence
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


def save_animation(path: Path, figures: Sequence[Any], milliseconds: int = 100, dpi: int = 80) -> None:
    """Write figures of one size as the frames of an animated WebP file; the last one stays longer.

    Args:
        path: of the file.
        figures: of matplotlib, in their order.
        milliseconds: that each is shown for.
        dpi: pixels of an inch.
    """
    with extra("hf"):
        from PIL import Image
    frames = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=dpi)
        frames.append(Image.open(file).convert("RGB"))
    durations = [milliseconds] * (len(frames) - 1) + [20 * milliseconds]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": durations}
    write_file(path, lambda part: frames[0].save(part, "WEBP", loop=0, quality=60, method=4, **options))
