"""Each example runs as it stands, within what its first lines say, and says what it shows."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

from rope_mm import LAYOUTS

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "llama_kernels": "gradients differ by",
    "own_scheme": "4 words after a page",
    "qwen_vl_rope_tv": "loss 3.",
    "vit_rope_2d": "undone: the output is what it was, bit for bit",
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_says_what_it_shows(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setitem(LAYOUTS, "page", None)  # forgotten afterwards
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out.splitlines()[-1]


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_is_a_page_that_begins_with_its_command_and_cost(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    said = ast.get_docstring(ast.parse(text))
    assert said and f"python examples/{name}.py" in said and "nothing is downloaded" in said
