"""The README's Python runs as it stands, in order, and its commands are ones that the scripts know."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from rope_mm import SCHEMES, properties_table
from rope_mm.losses import GAN_LOSSES, PENALTIES
from rope_mm.training.config import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs_and_prints_what_it_says(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"^print\(.*\)(?:  # (.*))?$", block, flags=re.MULTILINE)
        assert len(printed) == len(said)
        for line, words in zip(printed, said, strict=True):
            assert words.startswith(line) or not words


def test_the_picture_of_positions_is_what_place_gives():
    from rope_mm import place

    positions, _ = place("text:2 image:2x3 text:1 video:2x2x2 text:1", "rope-tv")
    for axis, row in zip("tyx", positions.T.tolist(), strict=True):
        assert axis + "".join(f"{value:5g}" for value in row) in README


@pytest.mark.parametrize("name", [*SCHEMES, *GAN_LOSSES, *PENALTIES])
def test_every_scheme_and_loss_is_in_a_table(name):
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows) or name in PENALTIES


def test_the_promises_are_those_that_are_measured():
    for row in properties_table(SCHEMES, "markdown").splitlines()[2:]:
        assert row in README, row


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def schema(path):
    """The configuration class of a script in train/, named after it: compare_losses.py, CompareLosses."""
    return getattr(import_module(path.stem), path.stem.title().replace("_", ""))


def test_every_command_is_one_that_the_project_knows():
    pattern = r"^    (?:\w+=\S+ )?((?:python|accelerate|torchrun|make) .*)$"
    commands = re.findall(pattern, README.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) >= 6
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert words[1] in targets
            continue
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).exists()
        load(
            schema(ROOT / words[script]),
            [w.replace("configs/", f"{ROOT}/configs/") for w in words[script + 1 :]],
        )
