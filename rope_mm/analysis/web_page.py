"""HTML pages in one file, which load nothing: text, tables, curves as SVG, images and animations."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rope_mm.analysis.figures import new_figure
from rope_mm.checks.extras import extra

Points = Sequence[tuple[float, float]]
COLUMNS = 3  # panels in a row
WIDTH = 1_200  # pixels of an image, at most
SHOWN, LAST = 400, 3_000  # milliseconds of a frame, and of the last one
BAND = 18  # pixels above a frame, for its label
MARKERS = ("o", "s", "^", "D", "v")  # beside colours, which not all readers tell apart

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
img, svg {{ max-width: 100%; height: auto; background: white; }}
pre {{ overflow-x: auto; background: #f4f4f4; color: black; padding: .7rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #aaa; padding: .2rem .6rem; text-align: left; }}
figure {{ margin: 1rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, sections: Mapping[str, str]) -> str:
    """A whole page.

    Args:
        title: of the page.
        sections: heading -> HTML; empty ones are not shown.
    """
    parts = [f"<h2>{escape(heading)}</h2>\n{body}" for heading, body in sections.items() if body]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text as it is, such as a configuration."""
    return f"<pre>{escape(text.strip())}</pre>"


def html_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain text.

    Args:
        titles: of the columns.
        rows: of cells.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>\n<tr>{head}</tr>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def from_markdown(text: str) -> str:
    """Tables and paragraphs of Markdown, without its marks of bold text and code."""
    parts = []
    for block in text.replace("**", "").replace("`", "").strip().split("\n\n"):
        lines = block.splitlines()
        if not block.startswith("|"):
            parts.append(paragraph(" ".join(lines)))
            continue
        cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        parts.append(html_table(cells[0], cells[2:]))
    return "\n".join(parts)


def link(address: str, text: str) -> str:
    """A link to another file."""
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def image(data: bytes, kind: str, caption: str) -> str:
    """An image inside the page, with a caption below it.

    Args:
        data: of the file.
        kind: of image, such as "png".
        caption: what it shows.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def curves(panels: Mapping[str, Mapping[str, Points]]) -> str:
    """Panels of curves over steps, as SVG.

    Args:
        panels: title -> label -> points (step, value); panels of the same labels share one legend.

    Raises:
        MissingPackage: no matplotlib.
    """
    if not panels:
        return ""
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(4.2 * COLUMNS, 2.8 * rows)
    figure.set_layout_engine(None)  # which takes a third of the time
    figure.subplots_adjust(0.05, 0.4 / (2.8 * rows), 0.99, 1 - 0.3 / (2.8 * rows), hspace=0.5, wspace=0.25)
    grid, explained = figure.subplots(rows, COLUMNS, squeeze=False).flatten(), set()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for number, (label, points) in enumerate(lines.items()):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            if len(points) < 20:
                style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 3}
            axes.plot(*zip(*points, strict=True), linewidth=1, label=label, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if list(lines) != [title] and tuple(lines) not in explained:
            axes.legend(frameon=False, fontsize=7)
            explained.add(tuple(lines))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return to_svg(figure)


def to_svg(figure: Any) -> str:
    """A figure as an element of HTML; the same figure gives the same text."""
    with extra("plots"):
        from matplotlib import rc_context
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "rope_mm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "<svg" + file.getvalue().partition("<svg")[2]


def animation(frames: Mapping[str, Path], most: int) -> bytes:
    """Image files as an animation, WebP without loss, with labels above; the last frame stays longer.

    Args:
        frames: label -> image file, in their order.
        most: how many of them are shown, the first and the last among them.
    """
    with extra("hf"):
        from PIL import Image as PILImage
    labels = list(frames)
    count = min(len(labels), most)
    chosen = sorted({round(i * (len(labels) - 1) / max(count - 1, 1)) for i in range(count)})
    opened = [(labels[i], read_image(frames[labels[i]])) for i in chosen]
    size = tuple(max(picture.size[side] for _, picture in opened) for side in (0, 1))
    pictures = [labelled(label, picture, size) for label, picture in opened]
    zoom = min(1.0, WIDTH / size[0])
    if zoom < 1:
        small = round(pictures[0].width * zoom), round(pictures[0].height * zoom)
        pictures = [picture.resize(small, PILImage.Resampling.BOX) for picture in pictures]
    durations = [SHOWN] * (len(pictures) - 1) + [LAST]
    file = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "quality": 0, "method": 0, "loop": 0}
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, **options)
    return file.getvalue()


def read_image(path: Path) -> Any:
    """An image file in RGB."""
    from PIL import Image as PILImage

    with PILImage.open(path) as file:
        return file.convert("RGB")


def labelled(label: str, picture: Any, size: tuple[int, ...]) -> Any:
    """A picture at the top left of a white one of a size, below its label.

    Args:
        label: a few words.
        picture: of PIL.
        size: width and height in pixels.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    font: Any = ImageFont.load_default(BAND - 4)
    whole = PILImage.new("RGB", (size[0], size[1] + BAND), "white")
    whole.paste(picture, (0, BAND))
    ImageDraw.Draw(whole).text((4, 0), label, fill="black", font=font)
    return whole
