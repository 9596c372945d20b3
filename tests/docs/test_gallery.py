"""The gallery: formulas that are evaluated, facts of every scheme, pages whose links and tables are whole."""

import math
import re

import pytest
import torch

from gallery import scheme_pages
from rope_mm import LAYOUTS, SCHEMES, Cursor, Image, Text, Video, place
from rope_mm.positions.grids import merge_order
from rope_mm.schemes.frequencies import LADDERS, pair_directions

NAMES = {name: getattr(math, name) for name in ("floor", "ceil", "trunc", "sqrt", "pi")} | {"max": max}
SEGMENTS = [
    Text(3), Image(4, 6), Text(2), Video(3, 2, 4, 0.7), Video(6, 2, 2), Text(1), Image(2, 8), Image(6, 2),
    Text(40), Image(2, 2),
]  # fmt: skip
IN_WORDS = {"circle", "ltx2", "ltx2-audio", "music-flamingo", "qwen-image-layered"}


def evaluate(formula, **numbers):
    """The values of a formula, as a tuple."""
    return eval(f"({formula},)", {"__builtins__": {}}, NAMES | numbers)


def placed(name):
    """Each segment of a sequence with the cursor before it, its positions, and the cursor after it."""
    scheme, cursor, found = SCHEMES[name], Cursor(), []
    options = dict(scheme.options)
    for segment in SEGMENTS:
        positions, after = place([segment], scheme.layout, cursor, **options)
        found.append((segment, cursor, positions, after))
        cursor = after
    return found


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in IN_WORDS])
def test_the_formula_of_positions_gives_what_place_gives(name):
    formula, merge = scheme_pages.position_formula(name), dict(SCHEMES[name].options).get("merge", 1)
    rows = placed(name)
    assert len(rows) == len(SEGMENTS)
    for segment, before, positions, after in rows:
        n, m = before.next, before.images
        if isinstance(segment, Text):
            expected = [evaluate(formula["text"], n=n + k) for k in range(segment.tokens)]
            assert positions.tolist() == [list(map(float, row)) for row in expected]
            continue
        (t, y, x), s = segment.grid, getattr(segment, "seconds_per_frame", 0.0)
        sizes = {"n": n, "m": m, "t": t, "y": y, "x": x, "s": s}
        expected = [
            evaluate(formula["patch"], **sizes, k=k, i=i, j=j)
            for k in range(t) for i in range(y) for j in range(x)
        ]  # fmt: skip
        expected = torch.tensor(expected, dtype=torch.float64)
        expected = merge_order(expected, segment, merge) if merge > 1 else expected
        torch.testing.assert_close(positions, expected, rtol=0, atol=1e-9)
        assert evaluate(formula["after"], **sizes) == (pytest.approx(after.next),)


def test_only_a_formula_that_would_not_fit_a_line_is_in_words():
    found = {name for name in SCHEMES if "words" in scheme_pages.position_formula(name)}
    assert found == IN_WORDS


@pytest.mark.parametrize(
    "name", [name for name, scheme in SCHEMES.items() if not (scheme.extensions or scheme.ladder_over_heads)]
)
def test_the_formula_of_frequencies_gives_omega(name):
    scheme, formula = SCHEMES[name], scheme_pages.frequency_formula(SCHEMES[name])
    omega = scheme.omega(64, heads=2)[0]  # (a, r)
    shares = scheme.axis_shares or (1,) * len(scheme.axis_order or scheme.axes)
    groups = pair_directions(scheme.ownership, len(shares), omega.shape[1], 2, shares, 0).groups
    expected = [evaluate(formula, i=i, n=n)[0] for i, n in zip(*LADDERS[scheme.ladder](groups), strict=True)]
    found, expected = omega.norm(dim=0).double(), torch.tensor(expected, dtype=torch.float64)
    rotates = found > 0
    assert rotates.sum() >= len(found) // 4
    torch.testing.assert_close(found[rotates], expected[rotates], rtol=1e-5, atol=0)


def test_every_layout_and_scheme_has_facts_and_no_other_does():
    facts = scheme_pages.facts()
    assert set(facts["layouts"]) == set(LAYOUTS)
    assert set(facts["schemes"]) == set(SCHEMES)
    assert {name for pitfall in facts["pitfalls"] for name in pitfall["schemes"]} <= set(SCHEMES)
    assert len(facts["pitfalls"]) > 40
    for pitfall in facts["pitfalls"]:
        assert set(pitfall) == {"schemes", "wrong", "here", "seen"}
        assert pitfall["wrong"].endswith(".") and pitfall["here"].endswith(".")


def test_every_group_of_the_zoo_is_in_the_gallery():
    assert [name for group in scheme_pages.GROUPS.values() for name in group] == list(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_page_has_the_row_of_promises_the_originals_and_whole_tables(name):
    page = scheme_pages.scheme_page(name)
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 2
    for table in tables:
        assert len({re.sub(r"`[^`]*`", "", line).count("|") for line in table.split("\n")}) == 1
    rows = [row for row in scheme_pages.originals() if row[0] == name]
    assert all(f"| {row[1]} | {row[2]} | {row[3]} |" in page for row in rows)
    assert ("no released code" in page) == (not rows)
    row = " | ".join(scheme_pages.promises()[1][name][1:])
    assert f"| {row} |" in page


def test_the_pages_of_two_schemes_have_their_pictures_and_links_that_lead_somewhere(tmp_path):
    folder = tmp_path / "docs" / "gallery"
    for page in ("schemes.md", "pitfalls.md"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / page).touch()
    scheme_pages.write_gallery(folder, ["ltx", "qwen2-vl-vision"], workers=1)
    pages = sorted(folder.glob("*.md"))
    assert [page.stem for page in pages] == ["index", "ltx", "qwen2-vl-vision"]
    links = [
        (page, link) for page in pages for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", page.read_text())
    ]
    assert len(links) > 10
    for page, link in links:
        assert link.startswith("https://") or (page.parent / link.partition("#")[0]).exists(), link


def test_a_thread_is_a_link():
    assert scheme_pages.link_threads("seen in a/b-c#12 and elsewhere") == (
        "seen in [a/b-c 12](https://github.com/a/b-c/issues/12) and elsewhere"
    )
