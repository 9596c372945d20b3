"""Every public name is used by some test."""

import importlib
import re
from pathlib import Path

import pytest

MODULES = ("rope_mm", "rope_mm.losses", "rope_mm.models", "rope_mm.data", "rope_mm.hf")
TESTS = "\n".join(
    path.read_text() for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)
)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_tested(module):
    source = Path(importlib.import_module(module).__file__).read_text()
    names = re.findall(r" as (\w+)$", source, flags=re.MULTILINE)
    assert names
    assert [name for name in names if not re.search(rf"\b{name}\b", TESTS)] == []


def test_a_public_function_never_has_a_modules_name():
    folder = Path(importlib.import_module("rope_mm").__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {
        path.name for path in folder.iterdir() if path.is_dir()
    }
    names = re.findall(r" as (\w+)$", (folder / "__init__.py").read_text(), flags=re.MULTILINE)
    assert not modules & set(names)
