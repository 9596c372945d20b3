"""The code in README and docs/ runs as printed: Python blocks share their names, bash blocks run too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*?\)(?:  # (.*))?$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def takes_long(page: Path) -> bool:
    """Whether the code of a page starts programs or trains."""
    return "bash" in dict(blocks(page)) or page.stem in ("qwen_vl", "pretrained")


def pages() -> list:
    """Each page that has code, slow where it takes long; such tutorials run as notebooks instead."""
    docs = ROOT / "docs"
    tutorials = [page for page in sorted(docs.glob("tutorials/*.md")) if not takes_long(page)]
    return [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.slow] if takes_long(page) else [],
        )
        for page in [ROOT / "README.md", *sorted(docs.glob("*.md")), *tutorials]
        if blocks(page)
    ]


def run_python(code: str, names: dict, page: Path, capsys) -> None:
    """Run a block; the comment behind each print is a line of what it prints, in this order."""
    exec(compile(code, str(page), "exec"), names)
    printed = iter(capsys.readouterr().out.splitlines())  # a trainer may print lines of its own between
    for comment in filter(None, PRINTED.findall(code)):
        assert any(line == comment or comment.startswith(f"{line}, ") for line in printed), comment


def run_bash(code: str, folder: Path) -> None:
    """Run a block in a folder that looks like a clone."""
    python = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    from rope_mm import LAYOUTS

    monkeypatch.chdir(tmp_path)
    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setitem(LAYOUTS, "book", None)  # forgotten afterwards
    names: dict = {}
    for language, code in blocks(page):
        if language == "python":
            run_python(code, names, page, capsys)
        else:
            run_bash(code, tmp_path)
