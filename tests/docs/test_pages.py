"""README and docs/: links lead somewhere, commands are known, tables are complete and up to date."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from rope_mm import SCHEMES, parse_segments, place
from rope_mm.analysis import markdown
from rope_mm.losses import GAN_LOSSES, PENALTIES
from rope_mm.segments import SEGMENT_TYPES
from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = "gallery", "notebooks"  # folders that `make docs` makes
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in MADE),
]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's toc extension makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(page: Path) -> set[str]:
    return {
        slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


def links(page: Path) -> list[str]:
    """What a page links to inside the project."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))


def test_pages_have_links_and_commands():
    assert sum(map(len, map(links, PAGES))) > 50
    assert sum(map(len, map(commands, PAGES))) > 20


@by_page
def test_every_link_leads_to_a_file_and_an_anchor_that_exist(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"(\S+\.md)$", navigation, re.MULTILINE))
    made = {path for path in listed if path.split("/")[0] in MADE}
    assert made == {f"{folder}/index.md" for folder in MADE}
    assert listed - made == {str(page.relative_to(DOCS)) for page in PAGES[1:]}


def test_every_image_is_shown_somewhere():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = sorted((DOCS / "images").iterdir())
    assert files
    for file in files:
        assert f"images/{file.name}" in text, file.name


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("rotary", "rope_mm"),
        ("hf", "rope_mm.hf"),
        ("losses", "rope_mm.losses"),
        ("models", "rope_mm.models"),
        ("kernels", "rope_mm_kernels"),
    ],
)
def test_the_reference_has_every_public_name_of_a_module_and_no_other(page, module):
    text = (DOCS / "reference" / f"{page}.md").read_text()
    names = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", text, re.MULTILINE)
    assert sorted(names) == sorted(import_module(module).__all__)


def test_readme_has_at_most_220_lines():
    assert len(PAGES[0].read_text().splitlines()) <= 220


def test_readme_counts_schemes_and_originals_as_they_are():
    text = PAGES[0].read_text()
    rows = markdown.read_table(DOCS / "conformance.md", "originals")
    schemes, originals = {row[0] for row in rows}, {row[1] for row in rows}
    assert "more than 80 schemes" in text
    assert len(SCHEMES) > 80
    assert (len(schemes), len(originals)) == (64, 123)
    assert "64 agree with 123 original implementations" in text


def schema(script: Path):
    """The configuration class of a script in train/, named after it: compare_losses.py, CompareLosses."""
    return getattr(import_module(script.stem), script.stem.title().replace("_", ""))


def commands(page: Path) -> list[str]:
    """The commands of a page, a docstring or a configuration that run our scripts or the Makefile."""
    text = re.sub(r"\\+\n", " ", page.read_text(encoding="utf-8"))
    return re.findall(
        r"^(?:    |# )?(?:\w+=\S+ )?((?:python|accelerate|torchrun|make) .*)$", text, re.MULTILINE
    )


HEADS = [*sorted((ROOT / "train").glob("*.py")), *sorted((ROOT / "configs").rglob("*.yaml"))]


@pytest.mark.parametrize("page", [*PAGES, *HEADS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_the_project_knows(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        path = ROOT / words[script]
        assert path.exists(), command
        if path.parent.name == "train" and path.stem != "bench":  # its flags are argparse's
            load(schema(path), [w.replace("configs/", f"{ROOT}/configs/") for w in words[script + 1 :]])


def test_no_configuration_needs_a_file_outside_of_the_project():
    texts = {path.name: path.read_text(encoding="utf-8") for path in HEADS if path.suffix == ".yaml"}
    assert len(texts) > 10
    assert not [name for name, text in texts.items() if "../" in text or re.search(r"[\[ ]/\w", text)]


def test_readme_and_the_page_of_training_have_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 6
    assert len(commands(DOCS / "training.md")) >= 10


def test_scripts_and_configurations_begin_with_a_command():
    assert len(HEADS) > 20
    assert not [page.name for page in HEADS if page.parent.name != "accelerate" and not commands(page)]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        *((name, "schemes.md") for name in SCHEMES),
        *((name, "losses.md") for name in GAN_LOSSES),
        *((name, "losses.md") for name in PENALTIES),
    ],
)
def test_every_scheme_loss_and_penalty_has_a_row(name, page):
    rows = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)


def test_the_guide_to_a_scheme_has_the_table_that_the_command_prints(choices):
    _, body, _ = markdown.split_page(DOCS / "choosing.md", "choices")
    assert body.strip() == choices, "write it anew: pytest tests/docs --write-promises"


@pytest.mark.slow
def test_the_offsets_of_growing_images_are_those_that_are_measured(offsets):
    _, body, _ = markdown.split_page(DOCS / "factors.md", "offsets")
    assert body.strip() == offsets, "write it anew: pytest tests/docs --write-promises"


def test_the_promises_are_those_that_are_measured(promises):
    assert list(promises) == ["promises", "vision-promises"]
    for name, table in promises.items():
        _, body, _ = markdown.split_page(DOCS / "schemes.md", name)
        assert body.strip() == table, "write it anew: pytest tests/docs --write-promises"


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("conformance", "originals"),
        ("models", "families"),
        ("schemes", "promises"),
        ("schemes", "vision-promises"),
    ],
)
def test_writing_a_table_of_a_page_again_leaves_the_page_as_it_is(page, name, tmp_path):
    copy, text = tmp_path / "page.md", (DOCS / f"{page}.md").read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    _, body, _ = markdown.split_page(copy, name)
    markdown.write_table(copy, name, body.strip())
    assert copy.read_text(encoding="utf-8") == text


def test_the_text_forms_of_segments_in_the_page_of_schemes_are_read():
    section = (DOCS / "schemes.md").read_text().partition("### Segments in text")[2].partition("###")[0]
    forms = re.findall(r"`([a-z_]+:[^`]+)`", section)
    assert {form.partition(":")[0] for form in forms} == set(SEGMENT_TYPES)
    assert [str(segment) for form in forms for segment in parse_segments(form)] == forms


def test_the_positions_in_the_page_of_schemes_are_what_place_gives():
    text = (DOCS / "schemes.md").read_text()
    positions, _ = place("text:2 image:2x3 text:1 video:2x2x2 text:1", "rope-tv")
    for axis, row in zip("tyx", positions.T.tolist(), strict=True):
        assert axis + "".join(f"{value:5g}" for value in row) in text
