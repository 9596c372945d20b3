"""Each example runs as it stands and ends with the line that shows its point."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

from rope_mm import LAYOUTS

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_LINE = {
    "llama_kernels": "gradients differ by",
    "own_scheme": "4 tokens after a page",
    "qwen_vl_rope_tv": "loss 3.",
    "vit_rope_2d": "undone: the output is the same as before, bit for bit",
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize("name", LAST_LINE)
def test_an_example_runs_and_prints_its_last_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setitem(LAYOUTS, "page", None)  # forgotten afterwards
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert LAST_LINE[name] in capsys.readouterr().out.splitlines()[-1]


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LAST_LINE)


@pytest.mark.parametrize("name", LAST_LINE)
def test_an_example_is_a_page_that_begins_with_its_command_and_cost(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    assert f"python examples/{name}.py" in docstring
    assert "nothing is downloaded" in docstring
