import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.training import config
from rope_mm.training.config import dump, load


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train an example."""

    out: str = "runs/example"
    steps: int = 1_000
    seed: int | None = None
    note: str | None = None
    loss: Literal["rsgan", "ns", "no"] = "rsgan"
    sizes: tuple[int, ...] = (8, 16)
    words: tuple[str, ...] = ()
    dry_run: bool = False
    optim: Optim = field(default_factory=Optim)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Strict:
    """A schema with a key to give and a rule of its own."""

    out: str
    steps: int = 1

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@pytest.fixture
def yaml(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_nothing_given_is_the_defaults():
    assert load(Example, []) == Example()


def test_flags_beat_files_and_later_files_beat_earlier_ones(yaml):
    first = yaml("steps: 1\nseed: 1\nout: a\n")
    second = yaml("steps: 2\nseed: 2\n", "second.yaml")
    read = load(Example, ["--steps", "3", "--config", first, "--config", second])
    assert (read.steps, read.seed, read.out) == (3, 2, "a")


def test_a_rate_without_a_dot_is_a_float(yaml):
    assert load(Example, ["--config", yaml("optim:\n  lr: 3e-4\nmodel:\n  scale: 1e-3\n")]) == Example(
        optim=Optim(lr=3e-4), model={"scale": 1e-3}
    )
    assert load(Example, ["--optim.lr", "3e-4", "--model.scale=1e-3"]).model == {"scale": 1e-3}


@pytest.mark.parametrize("flags", [["--dry-run"], ["--dry_run"], ["--dry-run=true"], ["--dry-run", "yes"]])
def test_a_switch_is_written_as_one_likes(flags):
    read = load(Example, [*flags, "--steps", "5"])
    assert read.dry_run and read.steps == 5


def test_a_negative_number_is_a_value_and_not_a_flag():
    assert load(Example, ["--optim.lr", "-1"]).optim.lr == -1


def test_text_stays_text():
    read = load(Example, ["--out", "001", "--note=1e3", "--loss", "no"])
    assert (read.out, read.note, read.loss) == ("001", "1e3", "no")
    assert load(Example, ["--note", "x", "--note", "null"]).note is None


def test_tuples_are_tuples():
    read = load(Example, ["--optim.betas", "[0.5, 0.9]", "--sizes=[4]", "--words", "[a, b]"])
    assert (read.optim.betas, read.sizes, read.words) == ((0.5, 0.9), (4,), ("a", "b"))


def test_the_free_keys_of_several_sources_merge(yaml):
    file = yaml("model:\n  hidden_size: 32\n  rope: {layout: rope-tv, theta: 100}\n")
    read = load(Example, ["--config", file, "--model.rope.theta", "5", "--model.new-key", "[1, 2]"])
    assert read.model == {"hidden_size": 32, "rope": {"layout": "rope-tv", "theta": 5}, "new_key": [1, 2]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lrr: optim.lrr is unknown; did you mean optim.lr?"),
        (["--lr", "1"], "--lr: lr is unknown; did you mean optim.lr?"),
        (["--stesp=1"], "--stesp: stesp is unknown; did you mean steps?"),
        (["--steps.more", "1"], "--steps.more: steps.more is unknown; did you mean steps?"),
        (["--zzz", "1"], "--zzz: zzz is unknown; there are: out, steps"),
        (["steps=1"], "'steps' is no flag; write --key value"),
        (["--dry-run", "now"], "'now' is no flag"),
        (["--steps"], "--steps: needs a value"),
        (["--steps", "--dry-run"], "--steps: needs a value"),
        (["--steps", "many"], "--steps: steps must be int, not 'many'"),
        (["--steps", "2.5"], "--steps: steps must be int, not 2.5"),
        (["--steps", "null"], "--steps: steps must be int, not None"),
        (["--seed", "x"], "--seed: seed must be int | None, not 'x'"),
        (["--loss", "wgan"], "--loss: loss must be one of rsgan, ns, no, not 'wgan'"),
        (["--dry-run=maybe"], "--dry-run: dry_run must be bool, not 'maybe'"),
        (["--optim.betas", "[1]"], "optim.betas must be tuple[float, float], not [1]"),
        (["--optim.betas", "0.5"], "optim.betas must be tuple[float, float], not 0.5"),
        (["--sizes", "[1, x]"], "sizes must be tuple[int, ...], not [1, 'x']"),
        (["--sizes", "[1"], "--sizes: '[1' is no value"),
        (["--optim", "3"], "--optim: optim must be a group of keys (lr, betas), not 3"),
        (["--model", "3"], "model must be dict[str, Any], not 3"),
        (["--out", "${nowhere}"], "out: Interpolation key 'nowhere' not found"),
        (["--config", "no/such.yaml"], "no/such.yaml: cannot be read as YAML"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_sentence(flags, message):
    with pytest.raises(ValueError) as caught:
        load(Example, flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "optim.lrr is unknown; did you mean optim.lr?"),
        ("dry-run: true\n", "dry-run is unknown; did you mean dry_run?"),
        ("optim:\n  lr: fast\n", "optim.lr must be float, not 'fast'"),
        ("optim: 3\n", "optim must be a group of keys (lr, betas), not 3"),
        ("optim:\n", "optim must be a group of keys (lr, betas), not None"),
        ("loss: wgan\n", "loss must be one of rsgan, ns, no, not 'wgan'"),
        ("steps: [1, 2]\n", "steps must be int, not [1, 2]"),
        ("- steps\n", "holds a list"),
        ("steps: [1\n", "cannot be read as YAML"),
        ("steps: 1\nsteps: 2\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_answered_in_one_sentence(yaml, text, message):
    with pytest.raises(ValueError) as caught:
        load(Example, ["--config", yaml(text)])
    assert (
        message in str(caught.value) and "run.yaml: " in str(caught.value) and "\n" not in str(caught.value)
    )


def test_an_empty_file_changes_nothing(yaml):
    assert load(Example, ["--config", yaml("# all as it is\n")]) == Example()


def test_a_key_without_a_default_must_be_given():
    assert load(Strict, ["--out", "x"]) == Strict(out="x")
    with pytest.raises(ValueError, match="out"):
        load(Strict, [])


def test_the_rules_of_the_schema_speak():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        load(Strict, ["--out", "x", "--steps", "0"])


def test_help_is_a_file_of_the_defaults(capsys, yaml):
    with pytest.raises(SystemExit) as left:
        load(Example, ["--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "# Train an example." in printed
    assert load(Example, ["--config", yaml(printed)]) == Example()


words = st.text(st.characters(exclude_categories=["C"], exclude_characters="$?\\"), max_size=12)
examples = st.builds(
    Example,
    out=words,
    steps=st.integers(-(10**9), 10**9),
    seed=st.none() | st.integers(0, 10**6),
    loss=st.sampled_from(["rsgan", "ns", "no"]),
    sizes=st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    dry_run=st.booleans(),
    optim=st.builds(Optim, lr=st.floats(allow_nan=False), betas=st.tuples(st.floats(0, 1), st.floats(0, 1))),
    model=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers() | words | st.booleans()),
)


@given(examples)
def test_what_is_dumped_is_read_back(tmp_path_factory, example):
    file = tmp_path_factory.mktemp("dump") / "run.yaml"
    file.write_text(dump(example), encoding="utf-8")
    assert load(Example, ["--config", str(file)]) == example


@given(examples, st.booleans())
def test_flags_say_what_a_file_says(example, joined):
    values = {
        "out": example.out,
        "steps": example.steps,
        "seed": "null" if example.seed is None else example.seed,
        "loss": example.loss,
        "sizes": list(example.sizes),
        "dry-run": str(example.dry_run).lower(),
        "optim.lr": example.optim.lr,
        "optim.betas": list(example.optim.betas),
    }
    pairs = [[f"--{key}={value}"] if joined or str(value).startswith("--") else [f"--{key}", str(value)]
             for key, value in values.items()]  # fmt: skip
    read = load(Example, [word for pair in pairs for word in pair])
    assert dump(read) == dump(Example(**{**vars(example), "model": {}}))


def test_a_script_ends_in_one_line_and_code_2(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from rope_mm.training.config import run\n"
        "@dataclass(frozen=True)\n"
        "class Example:\n"
        "    steps: int = 1\n"
        "if __name__ == '__main__':\n"
        "    run(print, Example)\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--step", "2"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --step: step is unknown; did you mean steps?\n"


def test_a_run_hands_over_the_configuration_and_keeps_the_exit_codes(capsys):
    seen = []
    config.run(seen.append, Example, ["--steps", "7"])
    assert seen == [Example(steps=7)]

    def fail(_):
        raise ValueError("too few pictures")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        config.run(fail, Example, [])
    assert left.value.code == 2 and capsys.readouterr().err == "error: too few pictures\n"
    with pytest.raises(SystemExit) as left:
        config.run(stop, Example, [])
    assert left.value.code == 130
