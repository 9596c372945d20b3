import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.registry import Registry
from rope_mm.training import config
from rope_mm.training.config import check_options, dump, load, option, override, usage
from rope_mm.training.config_keys import known_keys
from rope_mm.training.old_keys import OLD_KEYS


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


def test_without_arguments_the_configuration_has_its_defaults():
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
def test_a_boolean_flag_may_be_written_in_several_ways(flags):
    read = load(Example, [*flags, "--steps", "5"])
    assert read.dry_run and read.steps == 5


def test_a_negative_number_is_a_value_and_not_a_flag():
    assert load(Example, ["--optim.lr", "-1"]).optim.lr == -1


def test_a_string_that_looks_like_a_number_stays_a_string(yaml):
    read = load(Example, ["--out", "001", "--note=1e3", "--loss", "no"])
    assert (read.out, read.note, read.loss) == ("001", "1e3", "no")
    assert load(Example, ["--config", yaml("note: x\n"), "--note", "null"]).note is None


def test_tuple_options_are_read_as_tuples():
    read = load(Example, ["--optim.betas", "[0.5, 0.9]", "--sizes=[4]", "--words", "[a, b]"])
    assert (read.optim.betas, read.sizes, read.words) == ((0.5, 0.9), (4,), ("a", "b"))


def test_a_flag_sets_one_key_of_a_dict_and_keeps_the_others(yaml):
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
        (["--zzz", "1"], "--zzz: zzz is unknown; --help shows all keys"),
        (["steps=1"], "'steps' is no flag; write --key value"),
        (["--dry-run", "now"], "'now' is no flag"),
        (["--steps"], "--steps: needs a value"),
        (["--steps", "--dry-run"], "--steps: needs a value"),
        (["--steps", "2", "--steps=3"], "--steps is given twice, and the first value would be lost"),
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
        (["--config", "no/such.yaml"], "no/such.yaml: not found; give --config the path of a YAML file"),
        (["--config", "."], ".: cannot be read as YAML"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_sentence(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(Example, flags)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(Example, ["--config", yaml(text)])
    assert "run.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(yaml):
    assert load(Example, ["--config", yaml("# all as it is\n")]) == Example()


def test_a_key_without_a_default_must_be_given():
    assert load(Strict, ["--out", "x"]) == Strict(out="x")
    with pytest.raises(ValueError, match="out"):
        load(Strict, [])


def test_the_checks_of_the_schema_give_the_error_message():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        load(Strict, ["--out", "x", "--steps", "0"])


def test_help_prints_a_configuration_file_of_the_defaults(capsys, yaml):
    with pytest.raises(SystemExit, match=r"^0$"):
        load(Example, ["--help"])
    printed = capsys.readouterr().out
    assert "# Train an example." in printed
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
    optim=st.builds(
        Optim,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
    model=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers() | words | st.booleans()),
)


@given(examples)
def test_a_dumped_configuration_is_read_back_equal(tmp_path_factory, example):
    file = tmp_path_factory.mktemp("dump") / "run.yaml"
    file.write_text(dump(example), encoding="utf-8")
    assert load(Example, ["--config", str(file)]) == example


@given(examples, st.booleans())
def test_flags_and_a_file_give_the_same_configuration(example, joined):
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
    assert done.stderr == "error: --step: step is unknown; did you mean steps? --help shows all keys\n"


def test_run_passes_the_configuration_on_and_keeps_exit_codes(capsys):
    seen = []
    config.run(seen.append, Example, ["--steps", "7"])
    assert seen == [Example(steps=7)]

    def fail(_):
        raise ValueError("too few pictures")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^2$"):
        config.run(fail, Example, [])
    assert capsys.readouterr().err == "error: too few pictures\n"
    with pytest.raises(SystemExit, match=r"^130$"):
        config.run(stop, Example, [])


COLOURS = Registry("colour", {"red": 1, "blue": 2})


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: str = option("red", "of the wall", choices=COLOURS)
    coats: int = option(1, minimum=1, maximum=9)
    shares: dict[str, float] = option({"red": 1.0, "blue": 0.5}, "colour -> share", keys=COLOURS, minimum=0)
    betas: tuple[float, float] = option((0.0, 0.9), minimum=0, below=1)
    number: str = option("17", "of the wall", check=int)


@dataclass(frozen=True, kw_only=True)
class Brush:
    """Paint."""

    steps: int = option(3, "of a brush", minimum=1)
    mode: Literal["whole", "rolling"] = option("whole", "how it is moved")
    paint: Paint = option(Paint(), "how to paint")
    rope: dict[str, Any] = option({}, "the scheme", fill={"scheme": "rope-tv"})
    walls: dict[str, Paint] = option({}, "by name")
    start: str = option("", "from where")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A schema with rows."""

    rows: dict[str, dict[str, Any]] = option({}, "by name")


@dataclass(frozen=True, kw_only=True)
class Painters:
    """A schema with rows that are groups of keys."""

    rows: dict[str, Brush] = option({}, "by name")


def test_a_given_dict_replaces_the_default_and_a_single_key_of_it_does_not(yaml):
    file = yaml("paint: {shares: {blue: 2.0}}\n")
    assert load(Brush, ["--config", file]).paint.shares == {"blue": 2.0}
    assert load(Brush, ["--paint.shares", "{}"]).paint.shares == {}
    assert load(Brush, ["--paint.shares.blue", "3.0"]).paint.shares == {"red": 1.0, "blue": 3.0}
    assert load(Brush, ["--paint", "{shares: {blue: 2.0}}"]).paint.shares == {"blue": 2.0}
    assert load(Brush, ["--paint", "{shares: {}}"]).paint.shares == {}
    second = yaml("paint: {shares: {red: 4.0}}\n", "second.yaml")
    assert load(Brush, ["--config", file, "--config", second]).paint.shares == {"red": 4.0}


def test_null_removes_a_row_of_a_table_and_a_row_that_is_not_there_is_named(yaml):
    file = yaml("rows: {one: {x: 1}, two+r1: {x: 2}, three: {}}\n")
    assert load(Table, ["--config", file, "--rows.two+r1", "null"]).rows == {"one": {"x": 1}, "three": {}}
    assert load(Table, ["--config", file, "--rows.one.x", "null"]).rows["one"] == {"x": None}
    with pytest.raises(
        ValueError, match=r"rows\.four is not there to be removed; rows has one, two\+r1, three"
    ):
        load(Table, ["--config", file, "--rows.four", "null"])
    with pytest.raises(ValueError, match=r"rows\.one is not there to be removed; rows has no rows"):
        load(Table, ["--rows.one", "null"])
    with pytest.raises(
        ValueError, match=r"rows has the row one without keys; `rows\.one: null` removes a row"
    ):
        load(Table, ["--rows", "{one: null}"])
    with pytest.raises(ValueError, match=r"--rows: rows must be dict.*, not 5"):
        load(Table, ["--rows", "5"])
    with pytest.raises(ValueError, match=r"--rows\.one null removes the row that --rows\.one\.x is for"):
        load(Table, ["--config", file, "--rows.one", "null", "--rows.one.x", "3"])
    assert "--key.row null " in usage(Table)


def test_a_row_of_keys_with_types_is_removed_and_a_wrong_value_below_it_named_with_its_type(yaml):
    file = yaml("rows: {one: {paint: {shares: {red: 2.0}}}, two: {}}\n")
    assert list(load(Painters, ["--config", file, "--rows.one", "null"]).rows) == ["two"]
    with pytest.raises(ValueError, match=r"rows\.one\.paint\.shares\.red must be float, not None"):
        load(Painters, ["--config", file, "--rows.one.paint.shares.red", "null"])


def test_an_entry_that_a_dict_needs_is_filled_in_and_shown():
    assert load(Brush, []).rope == {"scheme": "rope-tv"}
    theta = load(Brush, ["--rope", "{theta: 5}"])
    assert theta.rope == {"scheme": "rope-tv", "theta": 5} and "scheme: rope-tv" in dump(theta)
    assert load(Brush, ["--rope", "{scheme: grid}"]).rope == {"scheme": "grid"}


def test_a_configuration_made_of_the_defaults_shares_no_dict_with_them():
    Paint().shares["red"] = 5.0
    assert Paint().shares == {"red": 1.0, "blue": 0.5}
    assert Brush().paint is not Brush().paint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--paint", "{sharess: {}}"], "--paint: paint.sharess is unknown; did you mean paint.shares?"),
        (["--paint.coats", "10"], "paint.coats must be at least 1 and at most 9, not 10"),
        (["--paint.colour", "rde"], "paint.colour: colour 'rde' is unknown; did you mean 'red'?"),
        (["--paint.shares.red", "-1.0"], "paint.shares.red must be at least 0, not -1.0"),
        (["--paint.shares", "{green: 1.0}"], "paint.shares: colour 'green' is unknown"),
        (["--paint.shares.red", ".inf"], "paint.shares.red must be at least 0, not inf"),
        (["--paint.betas", "[0.0, 1.0]"], "paint.betas must be at least 0 and below 1, not 1.0"),
        (["--paint.number", "x"], "paint.number: invalid literal for int() with base 10: 'x'"),
        (["--walls.north", "{coats: 0}"], "walls.north.coats must be at least 1 and at most 9, not 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_its_key(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(Brush, flags)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_was_made_in_python_is_checked_the_same():
    with pytest.raises(ValueError, match=r"optim\.coats must be at least 1 and at most 9, not 0"):
        check_options(Paint(coats=0), "optim.")
    check_options(Brush())


def test_nested_values_replace_those_of_a_configuration():
    changed = override(Brush(), {"paint": {"shares": {"red": 7.0}}, "steps": 4}, "rows.mine")
    assert (changed.steps, changed.paint.shares, changed.paint.coats) == (4, {"red": 7.0}, 1)
    with pytest.raises(ValueError, match=r"rows\.mine: stesp is unknown; did you mean steps"):
        override(Brush(), {"stesp": 4}, "rows.mine")


def test_an_old_key_is_refused_with_its_new_name(yaml):
    @dataclass(frozen=True, kw_only=True)
    class Renamed:
        global_batch_size: int = 1

    with pytest.raises(ValueError, match="--batch: batch is now called global_batch_size"):
        load(Renamed, ["--batch", "2"])
    with pytest.raises(ValueError, match=r"run\.yaml: batch is now called global_batch_size"):
        load(Renamed, ["--config", yaml("batch: 2\n")])
    assert load(Brush, ["--start", "here"]).start == "here"  # a key of today is no old one


TRAIN = Path(__file__).parents[2] / "train"
SCRIPTS = sorted(path.stem for path in TRAIN.glob("*.py") if path.stem != "bench")


def schema_of(script):
    return getattr(import_module(script), script.title().replace("_", ""))


def test_every_old_key_has_a_new_one_in_some_script():
    known = set().union(*(known_keys(schema_of(script)) for script in SCRIPTS))
    assert [old for old, new in OLD_KEYS.items() if not known.intersection(new)] == []


def test_help_says_what_each_key_means_and_allows():
    lines = usage(Brush).splitlines()
    assert "steps: 3  # of a brush; at least 1" in lines
    assert "  colour: red  # of the wall; one of red, blue" in lines
    assert "mode: whole  # how it is moved; one of whole, rolling" in lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_is_a_file_of_its_defaults_and_explains_every_key(script, tmp_path):
    schema = schema_of(script)
    (tmp_path / "help.yaml").write_text(usage(schema), encoding="utf-8")
    assert load(schema, ["--config", str(tmp_path / "help.yaml")]) == load(schema, [])
    assert [key for key, text in config.help_of(schema).items() if not text] == []


def test_a_flag_below_a_dict_of_names_keeps_its_dashes():
    assert list(load(Brush, ["--walls.north-west", "{coats: 2}"]).walls) == ["north-west"]
    assert load(Brush, ["--rope.layout-name", "x"]).rope["layout_name"] == "x"  # a dict of fields
