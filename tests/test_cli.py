import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import rope_mm
from rope_mm import SCHEMES, Rotary, check_rotary, cli, properties_table
from rope_mm.analysis.properties import COLUMNS, legend

ROOT = Path(__file__).parent.parent


def test_schemes_prints_the_table_of_those_named(capsys):
    assert cli.main(["schemes", "--format", "markdown", "rope-tv", "m-rope"]) == 0
    assert capsys.readouterr().out == properties_table(["rope-tv", "m-rope"], "markdown") + "\n"


def test_the_command_alone_lists_its_commands_with_a_line_each(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    for command in ("schemes", "show", "check", "lens", "train", "explore"):
        assert re.search(rf"^    {command} +\w.*$", printed, re.MULTILINE), command


def test_the_table_for_a_person_ends_with_the_meaning_of_each_column(capsys):
    assert cli.main(["schemes", "rope-tv"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{properties_table(['rope-tv'])}\n\n{legend()}\n"
    assert [line.partition("  ")[0] for line in legend().splitlines()] == list(COLUMNS)


def test_show_without_segments_shows_an_example(capsys):
    assert cli.main(["show", "rope-tv"]) == 0
    assert "image:2x3" in capsys.readouterr().out


def test_schemes_prints_all_without_a_name(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SCHEMES", {"flat": None, "grid": None})
    assert cli.main(["schemes", "--format", "json"]) == 0
    assert [row["scheme"] for row in json.loads(capsys.readouterr().out)] == ["flat", "grid"]


def test_show_prints_owners_waves_and_positions(capsys):
    assert cli.main(["show", "rope-tv", "text:2 image:1x2 text:1", "--head-dim", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '{"layout": "rope-tv"}'
    assert "tyxtyxty" in lines
    assert "t   6.283 to 6283" in lines
    rows = [line.split() for line in lines[-6:]]
    assert rows == [
        ["0", "text:2", "0", "0", "0"],
        ["1", "text:2", "1", "1", "1"],
        ["2", "image:1x2", "2.5", "2.5", "2"],
        ["3", "image:1x2", "2.5", "2.5", "3"],
        ["4", "text:1", "4", "4", "4"],
        ["next", "text", "5"],
    ]


def test_show_has_a_line_of_owners_for_each_head_and_names_axes_that_do_not_turn(capsys):
    assert cli.main(["show", "mh-rope", "text:1", "--head-dim", "8", "--heads", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[3:6] == ["tttt", "yyyy", "xxxx"]
    assert cli.main(["show", "hope", "text:1"]) == 0
    assert "t   not rotated" in capsys.readouterr().out


def test_check_prints_the_report(capsys):
    assert cli.main(["check", "golden-gate", "--heads", "4"]) == 0
    assert capsys.readouterr().out == f"{check_rotary(Rotary(64, 'golden-gate', heads=4))}\n"


def test_check_fails_where_the_encoding_does(capsys, monkeypatch):
    monkeypatch.setattr(cli, "check_rotary", lambda rope: replace(check_rotary(rope), relative=0.5))
    assert cli.main(["check", "rope-tv"]) == 1
    assert "NO  relative: error 5.0e-01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schemes", "rope-tvv"], "did you mean 'rope-tv"),
        (["show", "rope-tv", "text"], "'text' is not a segment"),
        (["check", "rope-tv", "--head-dim", "7"], "head_dim 7"),
        (["check", "mixed", "--heads", "-1"], "heads must be a whole number >= 1 and <= 65536, not -1"),
        (["check", "rope-tv", "--heads", "0"], "heads must be a whole number >= 1 and <= 65536, not 0"),
        (["show", "rope-tv", "still:1"], "write unrotated:1"),
        (["show", "rope-tv", "video:2x2x2@0.5"], "write @2fps for frames per second"),
        (["show", "rope-tv", "text:9999999999999999"], "too long"),
        (["show", "rope-tv", "image:40000x40000"], "1600000000 tokens are too many to show"),
        (["show", "qwen2-vl-vision", "image:3x3"], "blocks of 2 x 2"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_2(words, said, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rope-mm: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("command", ["schemes", "show", "check"])
def test_help_says_what_a_command_takes(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "NAME" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rope-mm {rope_mm.__version__}\n"


def test_the_version_is_written_once():
    project = (ROOT / "pyproject.toml").read_text()
    assert '[tool.hatch.version]\npath = "rope_mm/__init__.py"' in project
    assert rope_mm.__version__ not in project


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "rope_mm", "show", "rope-2d", "image:1x2"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert '{"layout": "grid-2d"' in done.stdout


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m rope_mm show rope-tv text:50000 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{"layout": "rope-tv"}\n'


def test_a_training_program_runs_with_a_named_configuration(tmp_path):
    words = ["train", "adversarial", "--config", "digits", "--dry-run", f"--output_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-m", "rope_mm", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "global_batch_size" in done.stdout, done.stderr[-1000:]


def test_an_unknown_program_or_configuration_is_answered_with_those_there_are(capsys):
    assert cli.main(["train", "adversaria"]) == 2
    assert "did you mean 'adversarial'?" in capsys.readouterr().err
    assert cli.main(["train", "adversarial", "--config", "digit"]) == 2
    assert "configuration of adversarial 'digit' is unknown; did you mean" in capsys.readouterr().err


def test_the_names_of_all_schemes_are_printed_without_measuring_them(capsys, monkeypatch):
    monkeypatch.setattr(cli, "properties_table", None)
    assert cli.main(["schemes", "--names"]) == 0
    assert capsys.readouterr().out.split() == list(SCHEMES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "rope-tv", "--head-dim", "100000000"], "--head-dim 100000000 is too wide for this command"),
        (
            ["check", "rope-tv", "--head-dim", "100000000"],
            "--head-dim 100000000 is too wide for this command",
        ),
        (["lens", "rope-tv", "text:2 image:2x3", "--out", "/proc/x"], "cannot write pictures to /proc/x"),
    ],
)
def test_sizes_that_never_end_and_folders_that_cannot_be_written_are_refused_in_a_line(
    words, message, capsys
):
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"rope-mm: {message}") and printed.count("\n") == 1
