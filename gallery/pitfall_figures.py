"""Figures of docs/pitfalls.md that are no pictures of one scheme: what goes wrong beside what is right.

    python gallery/pitfall_figures.py docs/images

Every number in them is computed, by `place` or by the wrong code itself. It needs matplotlib.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rope_mm import place, rotate
from rope_mm.analysis.figures import new_figure, save_figure
from rope_mm.analysis.pictures import STYLES, picture
from rope_mm.segments import Image, Text, parse_segments

WRONG, RIGHT = "#D55E00", "#0072B2"
DOCUMENTS = 6, 4, 7  # tokens of the documents in a row


def adjacent_images(figure: Any) -> None:
    """The runs of equal token types, which a search finds, beside the segments that are meant."""
    segments = parse_segments("text:3 image:2x3 image:2x3 text:3")
    runs: list[tuple[type, int]] = []
    for segment in segments:
        if runs and runs[-1][0] is type(segment):
            runs[-1] = (type(segment), runs[-1][1] + segment.tokens)
        else:
            runs.append((type(segment), segment.tokens))
    rows = {"segments": [(type(s), s.tokens) for s in segments], "runs of token types": runs}
    panel = figure.add_subplot()
    for number, parts in enumerate(rows.values()):
        start = 0
        for kind, tokens in parts:
            colour = "#999999" if kind is Text else STYLES[kind][0]
            panel.barh(number, tokens - 0.15, left=start, height=0.5, color=colour)
            panel.text(start + tokens / 2, number, f"{tokens}", ha="center", va="center", color="white")
            start += tokens
    panel.set(xlabel="token number", title="two images of 6 patches: found as one of 12, which fits no grid")
    panel.set_yticks(range(len(rows)), list(rows))


def mixed_pairing(q: Tensor, angles: Tensor) -> Tensor:
    """Heads (s, d) rotated by angles (s, d/2) of the pairing half, but with neighbouring channels paired."""
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    return q * cos + torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2) * sin


def norms(figure: Any) -> None:
    """The norm of one head at each position: constant under a rotation, not under the mixture."""
    positions, omega = torch.arange(64.0)[:, None], 10_000 ** (-torch.arange(8) / 8)[None]
    q = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(1, 64, 1, 16)
    turned, _ = rotate(q, q, positions, omega)
    panel = figure.add_subplot()
    panel.plot(mixed_pairing(q[0, :, 0], positions @ omega).norm(dim=-1), color=WRONG, label="mixed pairings")
    panel.plot(turned[0, :, 0].norm(dim=-1), color=RIGHT, linestyle="--", label="rotation")
    panel.set(xlabel="position", ylabel="norm of q")
    panel.legend(frameon=False)


def visibility(documents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which key (column) each query (row) of a packed row sees, causally: of any document, and of its own."""
    tokens = sum(documents)
    causal = torch.ones(tokens, tokens).tril()
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    return causal, causal * (number[:, None] == number)


def packed_row(figure: Any) -> None:
    """What each token of a packed row sees, if documents leak, and if they do not."""
    masks = visibility(DOCUMENTS)
    for panel, mask, title in zip(figure.subplots(1, 2), masks, ("leaks", "separate"), strict=True):
        panel.imshow(mask.tolist(), cmap="cividis")
        panel.set(xlabel="key", title=f"three documents: {title}")
    figure.axes[0].set_ylabel("query")


def stale_offset(figure: Any) -> None:
    """Positions of a second conversation whose generated tokens take the first one's offset."""
    _, first = place([Text(4), Image(6, 6), Text(4)], "m-rope")
    prompt, cursor = place([Text(3), Image(2, 2), Text(3)], "m-rope")
    right, _ = place([Text(6)], "m-rope", cursor)
    offset = first.next - first.tokens  # as rope_deltas
    wrong = [len(prompt) + number + offset for number in range(6)]
    numbers = range(len(prompt), len(prompt) + 6)
    panel = figure.add_subplot()
    panel.plot(prompt[:, 0], "o", color="#000000", label="prompt")
    panel.plot(numbers, right[:, 0], "s", color=RIGHT, label="generated")
    panel.plot(
        numbers, wrong, "^", color=WRONG, label="generated, with the offset of the conversation before"
    )
    panel.set(xlabel="token number", ylabel="t")
    panel.legend(frameon=False)


def first_image(figure: Any) -> None:
    """The positions of the second image of a batch, its own and the first one's."""
    given, own = (place([Image(*size)], "msrope")[0] for size in ((4, 8), (8, 4)))
    panel = figure.add_subplot()
    panel.plot(own[:, 2], own[:, 1], "s", color=RIGHT, label="its own: 8 rows, 4 columns")
    panel.plot(
        given[:, 2], given[:, 1], "o", mfc="none", mec=WRONG, markersize=11, label="those of the first, 4 x 8"
    )
    panel.set(xlabel="x", ylabel="y", xlim=(-5, 13), aspect="equal")
    panel.invert_yaxis()
    panel.legend(frameon=False, loc="right")


FIGURES = {
    "adjacent-images": (adjacent_images, (8, 2.2)),
    "norms": (norms, (8, 2.6)),
    "packed-row": (packed_row, (8, 3.6)),
    "stale-offset": (stale_offset, (8, 3.0)),
    "first-image": (first_image, (8, 3.6)),
}
SCHEMES = "rope-tv-2d", "hunyuan-image"  # side by side in the figure of halves
HALVES = "text:1 image:3x4 text:1"


def main(folder: Path) -> None:
    """Write all figures into a folder."""
    for name, (draw, size) in FIGURES.items():
        figure = new_figure(*size)
        draw(figure)
        save_figure(folder / f"{name}.png", figure, dpi=80)
    figure = picture("positions", SCHEMES[0], HALVES, compare=SCHEMES[1])
    save_figure(folder / "halves.png", figure, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
