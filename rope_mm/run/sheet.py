"""A contact sheet: rows of pictures, each with its caption, as a PNG that a person can judge."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rope_mm.run.checkpoint import write_file


def save_sheet(path: Path, pictures: Tensor, captions: Sequence[str]) -> None:
    """Write pictures (n, ch, y, x) in [-1, 1], n / len(captions) in a row, the caption beside it.

    Raises:
        ValueError: pictures that do not fill the rows, or a missing matplotlib.
    """
    columns, rest = divmod(len(pictures), len(captions))
    if rest or not columns:
        raise ValueError(f"{len(pictures)} pictures do not fill {len(captions)} rows of equal length")
    try:
        from matplotlib.figure import Figure  # matplotlib is optional
    except ImportError as error:
        raise ValueError("a contact sheet needs matplotlib; pip install 'rope-mm[plots]'") from error
    height, width = pictures.shape[-2:]
    rows = pictures.float().cpu().unflatten(0, (len(captions), columns))  # (r, c, ch, y, x)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (r*y, c*x, ch)
    figure = Figure(figsize=(0.6 * columns + 2, 0.6 * len(captions) * height / width), layout="constrained")
    axes = figure.subplots()
    axes.imshow((sheet.clamp(-1, 1) + 1).div(2).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(captions))], captions)
    axes.set_xticks([])
    write_file(path, lambda part: figure.savefig(part, format="png", dpi=100))
