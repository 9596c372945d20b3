"""The gallery: a page for each scheme, made when the documentation is built.

    python gallery/scheme_pages.py docs/gallery

Pictures are those of `rope_mm.analysis.pictures`; promises and originals are rows of the tables in docs/ that
tests write; formulas, uses and pitfalls lie in facts.yaml, and tests evaluate the formulas. It needs
matplotlib and pyyaml.
"""

import math
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from rope_mm.analysis import markdown
from rope_mm.analysis.figures import save_figure
from rope_mm.analysis.pictures import picture
from rope_mm.positions.layouts import LAYOUTS
from rope_mm.schemes import zoo
from rope_mm.schemes.frequencies import ownership_map
from rope_mm.schemes.scheme import Scheme

ROOT = Path(__file__).parents[1]
PICTURES = {
    "positions": "Positions: each token by its number, and rows against columns",
    "ownership": "Which axis rotates which pair, and how far a full turn reaches",
}
SEGMENTS = "text:5 image:4x6 text:4 video:3x2x4 text:4"  # sizes that blocks of 2 x 2 patches tile, too
AUDIO_SEGMENTS = "audio:1600"  # 64 seconds
HEAD_DIM, HEADS, DPI = 64, 4, 80
WORKERS = 2
GROUPS = {
    "Text": zoo.TEXT,
    "Text, images and videos in one sequence": zoo.MULTIMODAL,
    "Images and videos by themselves": zoo.VISION,
    "Diffusion transformers": zoo.DIFFUSION,
    "Audio": zoo.AUDIO,
}
TABLES = "promises", "vision-promises"  # of docs/schemes.md
LADDERS = {"shared": "all pairs", "own": "the pairs of its axis", "dealt": "all pairs, dealt out to the axes"}
PAIRINGS = {"half": "i and i + r", "interleaved": "2i and 2i + 1", "block": "halves within each axis"}
THREAD = re.compile(r"\b([\w.-]+/[\w.-]+)#(\d+)")


@cache
def facts() -> dict[str, Any]:
    """What facts.yaml says, by "layouts", "schemes" and "pitfalls"."""
    return yaml.safe_load((ROOT / "gallery" / "facts.yaml").read_text(encoding="utf-8"))


def segments_of(name: str) -> str:
    """The sequence that the pictures of a scheme show."""
    return AUDIO_SEGMENTS if name in zoo.AUDIO else SEGMENTS


def position_formula(name: str) -> dict[str, str]:
    """The position of a text token and of a patch and the next text token's, or these in words.

    Args:
        name: of the scheme.
    """
    scheme = zoo.SCHEMES[name]
    diagonal = ", ".join("n" * len(scheme.axes))
    found = {"text": diagonal} | facts()["layouts"][scheme.layout]
    return found | {key: text for key, text in facts()["schemes"][name].items() if key != "used"}


def frequency_formula(scheme: Scheme) -> str:
    """The frequency of the i-th of n pairs on a ladder, in radians a step, as Python writes it."""
    first, last = scheme.freq_range
    formula = {
        "geometric": f"{scheme.theta:g} ** (-i / n)",
        "log": f"{factor(first)}{last / first:g} ** (i / (n - 1))",
        "linear": f"({first:g} + {last - first:g} * i / (n - 1))",
    }[scheme.spacing]
    scale = scheme.freq_scale
    return formula if isinstance(scale, tuple) else f"{factor(scale)}{formula}"


def factor(number: float) -> str:
    """A number before what it multiplies, in parts of pi where it is one; nothing for 1."""
    if number == 1:
        return ""
    parts = number / math.pi
    return f"{number:g} * " if parts * 4 % 1 else "pi * " if parts == 1 else f"{parts:g} * pi * "


def frequency_words(scheme: Scheme) -> str:
    """What else is to be said of the frequencies."""
    said = [f"ownership `{scheme.ownership}`", f"n: {LADDERS[scheme.ladder]}"]
    said.append(f"channels {PAIRINGS[scheme.pairing]} form a pair")
    if isinstance(scheme.freq_scale, tuple):
        axes = scheme.axis_order or scheme.axes
        pairs = zip(axes, scheme.freq_scale, strict=True)
        said.append("times " + ", ".join(f"{scale:g} on {axis}" for axis, scale in pairs))
    if scheme.fraction < 1:
        said.append(f"{scheme.fraction:.4g} of the channels rotate, those at the {scheme.channel_offset}")
    if scheme.unrotated_fraction:
        said.append(f"the slowest {scheme.unrotated_fraction:.0%} of the pairs do not rotate")
    if scheme.ladder_over_heads:
        said.append("one ladder runs over the pairs of all heads")
    if scheme.extensions:
        said.append(f"extended by `{', '.join(map(repr, scheme.extensions))}`")
    if scheme.learnable:
        said.append("this is where learning begins")
    return "; ".join(said)


def formula_table(name: str) -> str:
    """Positions and frequencies of a scheme as a table."""
    scheme, formula = zoo.SCHEMES[name], position_formula(name)
    rows = [("position of a text token", f"`{formula['text']}`")]
    if "words" in formula:
        rows.append(("positions of an image or a video", formula["words"]))
    else:
        rows.append(("position of row i, column j of frame k", f"`{formula['patch']}`"))
        rows.append(("the next text token's n", f"`{formula['after']}`"))
    rows.append(("frequency i of n", f"`{frequency_formula(scheme)}`"))
    rows.append(("", frequency_words(scheme)))
    omega = scheme.omega(HEAD_DIM, heads=HEADS if scheme.per_head else 1)
    lines = ownership_map(omega, scheme.axes).split("\n")
    title = f"axes of the {omega.shape[-1]} pairs of a head of {HEAD_DIM} channels"
    rows.append((title, "<br>".join(f"`{line}`" for line in lines)))
    return markdown.table((f"on the axes {', '.join(scheme.axes)}", ""), rows)


@cache
def promises() -> tuple[list[str], dict[str, list[str]]]:
    """The titles of the table of promises, and its row for each scheme."""
    page, rows = ROOT / "docs" / "schemes.md", {}
    for table in TABLES:
        rows |= {row[0]: row for row in markdown.read_table(page, table)}
    _, body, _ = markdown.split_page(page, TABLES[0])
    titles = next(line for line in body.split("\n") if line)
    return [cell.strip() for cell in titles.strip("|").split("|")], rows


@cache
def originals() -> list[list[str]]:
    """The rows of the table of conformance."""
    return markdown.read_table(ROOT / "docs" / "conformance.md", "originals")


def promise_table(name: str) -> str:
    """The row of promises of a scheme."""
    titles, rows = promises()
    return markdown.table(titles[1:], [rows[name][1:]])


def original_table(name: str) -> str:
    """The originals that a scheme is compared with, or that there is none."""
    rows = [row[1:] for row in originals() if row[0] == name]
    if not rows:
        return "It is known from an article or from this library; there is no released code to compare with."
    return markdown.table(("original", "compared", "largest difference"), rows)


def pitfall_list(name: str) -> str:
    """What released code got wrong with a scheme, and how that is excluded here."""
    items = [pitfall for pitfall in facts()["pitfalls"] if name in pitfall["schemes"]]
    if not items:
        return "No error of released code with it is known to us."
    return "\n".join(
        f"- {item['wrong']} *Here:* {item['here']} ({link_threads(item['seen'])})" for item in items
    )


def link_threads(text: str) -> str:
    """A text whose owner/name#number are links to issues and pull requests."""
    return THREAD.sub(r"[\1 \2](https://github.com/\1/issues/\2)", text)


def scheme_page(name: str) -> str:
    """The page of a scheme, in Markdown."""
    scheme = zoo.SCHEMES[name]
    aliases = [alias for alias, target in zoo.ALIASES.items() if target == name]
    also = f" Also called {', '.join(f'`{alias}`' for alias in aliases)}." if aliases else ""
    images = "\n\n".join(f"![{text}]({name}-{kind}.png)" for kind, text in PICTURES.items())
    return f"""# {name}

Used in: {facts()["schemes"][name]["used"]}.{also} Source of the positions: {LAYOUTS[scheme.layout].source}.

{images}

## Formula

{formula_table(name)}

## Promises

{promise_table(name)}

What each means: [Schemes](../schemes.md#what-each-scheme-promises).

## Original

{original_table(name)}

## What went wrong with it

{pitfall_list(name)}

All of the field: [What goes wrong](../pitfalls.md).

## Try it

    rope-mm lens {name} "{segments_of(name)}" --out pictures
    rope-mm explore

In Python it is `Rotary(head_dim={HEAD_DIM}, scheme="{name}")`.
"""


def index_page(names: Sequence[str]) -> str:
    """The page that shows all schemes."""
    parts = []
    for title, group in GROUPS.items():
        rows = [
            (f"[`{name}`]({name}.md)", facts()["schemes"][name]["used"], thumbnail(name))
            for name in group
            if name in names
        ]
        if rows:
            parts.append(f"## {title}\n\n{markdown.table(('scheme', 'used in', 'positions'), rows)}")
    return (
        f"""# Gallery

Each scheme on a page: where tokens stand, which axis rotates which pair, its formula, what it promises, the
code that it agrees with, and what released code got wrong with it. The sequence in the pictures is
`{SEGMENTS}`: text as black dots, images as squares, videos as triangles; for audio it is `{AUDIO_SEGMENTS}`.

"""
        + "\n\n".join(parts)
        + "\n"
    )


def thumbnail(name: str) -> str:
    """A small picture of positions."""
    return f'<img src="{name}-positions.png" alt="positions of {name}" width="360" loading="lazy">'


def write_scheme(folder: Path, name: str) -> None:
    """Write the page and the pictures of a scheme.

    Args:
        folder: of the gallery.
        name: of the scheme.
    """
    for kind in PICTURES:
        figure = picture(kind, name, segments_of(name), head_dim=HEAD_DIM)
        save_figure(folder / f"{name}-{kind}.png", figure, DPI)
    (folder / f"{name}.md").write_text(scheme_page(name), encoding="utf-8")


def write_gallery(folder: Path, names: Iterable[str] = zoo.SCHEMES, workers: int = WORKERS) -> None:
    """Write the gallery anew.

    Args:
        folder: what was in it is deleted.
        names: of the schemes.
        workers: processes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chosen, write = list(names), partial(write_scheme, folder)
    if workers == 1:
        list(map(write, chosen))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(write, chosen, chunksize=8))
    (folder / "index.md").write_text(index_page(chosen), encoding="utf-8")


if __name__ == "__main__":
    write_gallery(Path(sys.argv[1]))
