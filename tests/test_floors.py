"""The shape of the code: who may import whom, and how long files and functions may be."""

import ast
import re
from pathlib import Path

import importlinter.cli

ROOT = Path(__file__).parents[1]
CODE = sorted(
    path for folder in ("rope_mm", "kernels", "train", "examples") for path in (ROOT / folder).rglob("*.py")
)
ALL = [*CODE, *sorted((ROOT / "tests").rglob("*.py"))]
NAMELESS = {"utils", "util", "helpers", "common", "misc", "base", "types"}


def text(path):
    return path.read_text(encoding="utf-8")


def code_lines(function):
    docstring = (ast.get_docstring(function) or "").splitlines()
    return function.end_lineno - function.lineno - len(docstring)


def is_kernel(function):
    """A Triton kernel is one program, however long."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_module_imports_from_a_floor_above(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        importlinter.cli, "_configure_logging", lambda verbose: None
    )  # it silences all others
    assert importlinter.cli.lint_imports(no_cache=True) == 0


def test_the_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow the package `kernels` of PyPI, which transformers imports"
    )


def test_the_package_has_at_most_eighteen_rooms():
    rooms = [path.name for path in (ROOT / "rope_mm").iterdir() if not path.name.startswith("_")]
    assert "positions" in rooms
    assert len(rooms) <= 18, sorted(rooms)


def test_every_file_is_named_after_what_it_holds():
    assert ALL
    assert [path for path in ALL if path.stem in NAMELESS] == []


def test_no_file_has_more_than_500_lines():
    assert ALL
    assert [path for path in ALL if len(text(path).splitlines()) > 500] == []


def test_every_function_fits_on_a_screen():
    found = [
        (path.name, node.name, code_lines(node))
        for path in CODE
        for node in ast.walk(ast.parse(text(path)))
        if isinstance(node, ast.FunctionDef) and not is_kernel(node)
    ]
    assert len(found) > 500
    assert [function for function in found if function[2] >= 40] == []


def test_no_file_imports_torchvision():
    pattern = re.compile(r"^\s*(?:import|from)\s+torchvision\b", re.MULTILINE)
    assert ALL
    assert [path for path in ALL if pattern.search(text(path))] == []
