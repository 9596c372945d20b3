import pytest

from rope_mm import cli
from rope_mm.analysis.choosing import CHOICES, explain_choice, list_tasks
from rope_mm.schemes.zoo import SCHEMES


@pytest.mark.parametrize("task", CHOICES)
def test_each_task_names_schemes_that_exist_and_code_that_gives_that_scheme(task):
    choice = CHOICES[task]
    assert {choice.scheme, *choice.others} - {""} <= SCHEMES.keys()
    text = explain_choice(task)
    assert choice.code in text and text.startswith(f"{choice.task}: ")
    assert ("axis of each pair" in text) == bool(choice.scheme)
    if choice.code.startswith("rope = ") and choice.scheme:
        found = {}
        exec(f"from rope_mm import Rotary\n{choice.code}", found)
        given = {} if choice.theta is None else {"theta": choice.theta}
        assert found["rope"].scheme == SCHEMES[choice.scheme].replace(**given)


def test_the_list_has_a_line_for_each_task_and_an_unknown_one_is_refused():
    assert [line.split()[0] for line in list_tasks().splitlines()] == list(CHOICES)
    with pytest.raises(ValueError, match="did you mean 'vit'"):
        explain_choice("vitt")


def test_the_command_prints_the_tasks_or_one_answer(capsys):
    assert cli.main(["choose"]) == 0
    assert "rope-mm choose TASK says what to take" in capsys.readouterr().out
    assert cli.main(["choose", "video", "--head-dim", "16"]) == 0
    assert "videos of unknown length: rope-tv-causal" in capsys.readouterr().out
