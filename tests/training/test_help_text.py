from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from rope_mm.registry import Registry
from rope_mm.training.config import load, usage
from rope_mm.training.help_text import comments_of, read_comments

TRAIN = Path(__file__).parents[2] / "train"
SCRIPTS = sorted(path.stem for path in TRAIN.glob("*.py") if path.stem != "bench")
COLOURS = Registry("colour", {"red": 1, "blue": 2})


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: str = "red"  # of COLOURS
    coats: int = 1  # "" would be none, # too
    kind: str = field(
        default="a: # b",  # what it is
    )


@dataclass(frozen=True, kw_only=True)
class Tool:
    steps: int = 1  # of a tool
    size: int = 2
    mode: Literal["whole", "rolling"] = "whole"


@dataclass(frozen=True, kw_only=True)
class Brush(Tool):
    """Paint."""

    steps: int = 3  # of a brush
    paint: Paint = field(default_factory=Paint)  # how to paint
    free: dict[str, Any] = field(default_factory=lambda: {"steps": 4})

    def stroke(self) -> int:
        steps: int = 5  # of no field
        return steps


def test_comments_of_bases_and_groups_are_found_and_choices_spelled_out():
    assert read_comments(Brush) == {
        "steps": "of a brush",
        "mode": "one of whole, rolling",
        "paint": "how to paint",
        "paint.colour": "of red, blue",
        "paint.coats": '"" would be none, # too',
        "paint.kind": "what it is",
    }


def test_without_a_source_there_are_no_comments():
    names: dict[str, Any] = {"__name__": "nowhere", "dataclass": dataclass}
    exec("@dataclass\nclass Bare:\n    steps: int = 1  # lost", names)
    assert comments_of(names["Bare"]) == {}


def test_help_says_of_each_key_what_the_source_says():
    lines = usage(Brush).splitlines()
    assert "steps: 3  # of a brush" in lines and "  colour: red  # of red, blue" in lines
    assert "size: 2" in lines and "  steps: 4" in lines  # which is no field


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_is_a_file_of_its_defaults(script, tmp_path):
    schema = getattr(import_module(script), script.title().replace("_", ""))
    (tmp_path / "help.yaml").write_text(usage(schema), encoding="utf-8")
    assert load(schema, ["--config", str(tmp_path / "help.yaml")]) == schema()
