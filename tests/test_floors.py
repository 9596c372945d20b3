import ast
import re
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
CODE = sorted(
    path for folder in ("rope_mm", "kernels", "train", "examples") for path in (ROOT / folder).rglob("*.py")
)
ALL = [*CODE, *sorted((ROOT / "tests").rglob("*.py"))]


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_nobody_imports_from_a_floor_above(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def test_the_folder_of_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow the kernels of PyPI in transformers"
    )


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_file_is_named_after_what_it_holds(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "base", "types"}


@pytest.mark.parametrize("path", CODE, ids=name)
def test_a_file_is_one_idea(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", CODE, ids=name)
def test_a_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue  # a kernel is one program
            said = len((ast.get_docstring(node) or "").splitlines())
            assert node.end_lineno - node.lineno - said < 40, node.name


@pytest.mark.parametrize("path", ALL, ids=name)
def test_torchvision_is_not_needed(path):
    imports = re.findall(
        r"^\s*(?:import|from)\s+torchvision\b", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert not imports
