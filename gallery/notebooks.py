"""The tutorials as Jupyter notebooks, made when the documentation is built; their pages are the source.

    python gallery/notebooks.py docs/notebooks

Blocks of Python become cells, blocks of bash cells that begin with %%bash. It needs jupytext.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import jupytext

from rope_mm.analysis import markdown

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
HEADER = """---
jupyter:
  kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""  # without it a page of bash alone would be a notebook in bash


def notebook(page: Path) -> Any:
    """A page of Markdown as a notebook that has not been run."""
    made: Any = jupytext.reads(HEADER + page.read_text(encoding="utf-8"), fmt="md")
    made.metadata = {"kernelspec": made.metadata["kernelspec"], "language_info": {"name": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # the same page gives the same file
    return made


def title(page: Path) -> str:
    """The heading of a page."""
    return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def write_notebooks(folder: Path) -> None:
    """Write a notebook of every tutorial, and the page that leads to them.

    Args:
        folder: beside that of the tutorials, so that links lead where they did; what was in it is deleted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for page in TUTORIALS:
        jupytext.write(notebook(page), folder / f"{page.stem}.ipynb", fmt="ipynb")
        link = f"[{page.stem}.ipynb]({page.stem}.ipynb)"
        rows.append((f"[{title(page)}](../tutorials/{page.name})", link))
    text = f"""# Tutorials as notebooks

Each tutorial is also a notebook, to be opened in Jupyter from a clone of the repository, where its links and
`train/` are. A test runs all of them.

{markdown.table(("tutorial", "notebook"), rows)}

    pip install jupyterlab jupytext
    jupytext --to ipynb docs/tutorials/vit.md    # makes one from its page
"""
    (folder / "index.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_notebooks(Path(sys.argv[1]))
