"""Every public name is listed in `__all__`, has its docstring, and is used by some test."""

import ast
import importlib
import inspect
import pydoc
from pathlib import Path

import pytest

MODULES = ("rope_mm", "rope_mm.losses", "rope_mm.models", "rope_mm.data", "rope_mm.hf")
TESTS = Path(__file__).parent


def public_names(module):
    return importlib.import_module(module).__all__


def used_names(tree):
    """Names that are read in a module's code: what an import statement alone brings does not count."""
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rope_mm")
        for alias in node.names
    }
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for local, name in imported.items() if local in loaded} | attributes


USED = set().union(*(used_names(ast.parse(path.read_text())) for path in TESTS.rglob("*.py")))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_used_by_a_test(module):
    assert public_names(module)
    assert [name for name in public_names(module) if name not in USED] == []


@pytest.mark.parametrize("module", MODULES)
def test_help_lists_every_public_name(module):
    page = pydoc.plain(pydoc.render_doc(importlib.import_module(module)))
    assert [name for name in public_names(module) if name not in page] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_exists_once(module):
    names = public_names(module)
    assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_and_function_has_a_docstring(module):
    things = [(name, getattr(importlib.import_module(module), name)) for name in public_names(module)]
    mine = [(name, thing) for name, thing in things if inspect.isclass(thing) or inspect.isfunction(thing)]
    assert mine
    assert [name for name, thing in mine if not (thing.__doc__ or "").strip()] == []


def test_a_public_function_never_has_the_name_of_a_module():
    folder = Path(importlib.import_module("rope_mm").__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {x.name for x in folder.iterdir() if x.is_dir()}
    assert not modules & set(public_names("rope_mm"))
