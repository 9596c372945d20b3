"""Configuration of a script: defaults of a dataclass < --config FILE (repeatable) < --key.path VALUE.

A field is declared by `option`, which carries its help text, its range and the names it may take. So the
help, the checks and the defaults of a key are written once:

    @dataclass(frozen=True, kw_only=True)
    class Train:
        steps: int = option(1_000, "optimizer steps", minimum=1)
        loss: str = option("rpgan", "adversarial loss", choices=GAN_LOSSES)

    config = load(Train)                # from sys.argv; --help prints a YAML file of the defaults
"""

import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, field, fields, is_dataclass, replace
from functools import reduce
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import omegaconf
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rope_mm.registry import Registry
from rope_mm.training.config_keys import check_key, describe, hint_of, is_dict, is_table, known_keys
from rope_mm.training.folder_lock import locked
from rope_mm.training.signals import KILLED

Schema = TypeVar("Schema")
Entry = tuple[str, str, Any]  # where it was given, dotted key, value
OPEN = "???"  # in a file: the key must be given
YES_NO = ("true", "false", "yes", "no", "on", "off")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Registry | None = None,
    keys: Registry | None = None,
    fill: Mapping[str, Any] | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a configuration, for the right side of `name: type = option(...)`.

    Args:
        default: the value; a list, dict or dataclass is copied for every configuration. Without one the key
            must be given.
        help: what the key means, one line.
        minimum: smallest number allowed, that of a list or dict too.
        above: the number must be larger than this.
        maximum: largest number allowed.
        below: the number must be smaller than this.
        choices: the names that the value may take.
        keys: the names that the keys of a dict may take.
        fill: entries of a dict that are added where they are not given.
        check: raises a ValueError for a value that is not allowed; the message then names the key.
    """
    metadata = {
        **{"help": help, "minimum": minimum, "above": above, "maximum": maximum, "below": below},
        **{"choices": choices, "keys": keys, "fill": fill, "check": check},
    }
    if default is MISSING:
        return field(metadata=metadata)
    if is_dataclass(default) or isinstance(default, list | dict):
        make = replace if is_dataclass(default) else type(default)  # type: ignore
        return field(default_factory=lambda: make(default), metadata=metadata)  # type: ignore
    return field(default=default, metadata=metadata)


def run(
    main: Callable[[Schema], Any],
    schema: type[Schema],
    argv: Sequence[str] | None = None,
    lock: bool = False,
) -> None:
    """Call main with the configuration of the command line; an error ends in one line and an exit code.

    The code is 2 for a ValueError, 1 for an OSError such as a full disk, 128 + n after signal n, and 0 after
    a SIGTERM that left time to save. `python -X dev script.py` shows the traceback instead.

    Args:
        main: the script.
        schema: dataclass of its configuration.
        argv: the command line, sys.argv[1:] by default.
        lock: whether no other command may write to `output_dir` meanwhile.
    """
    try:
        config = load(schema, argv)
        with locked(Path(cast(Any, config).output_dir)) if lock else nullcontext():
            main(config)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except KeyboardInterrupt as stopped:
        raise SystemExit((stopped.args or (KILLED + signal.SIGINT,))[0]) from None


def load(schema: type[Schema], argv: Sequence[str] | None = None) -> Schema:
    """The configuration of files and then flags; `--help` prints the defaults and exits.

    Args:
        schema: a dataclass.
        argv: the command line, sys.argv[1:] by default.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, a file that cannot be read.
    """
    argv, known = sys.argv[1:] if argv is None else argv, known_keys(schema)
    if "--help" in argv or "-h" in argv:
        print(usage(schema))
        raise SystemExit(0)
    paths, flags = read_flags(argv, known)
    entries = [entry for path in paths for entry in read_file(path, known)] + flags
    return resolve(OmegaConf.structured(schema), entries, known)


def override(config: Schema, values: Mapping[str, Any], source: str) -> Schema:
    """A configuration in which nested values replace those of the same keys.

    Args:
        config: what to start from; it stays as it is.
        values: nested, such as {"steps": 5, "data": {"size": 16}}.
        source: what messages name as their origin.

    Raises:
        ValueError: as `load`.
    """
    known = known_keys(type(config))
    return resolve(OmegaConf.structured(config), list(flatten(dict(values), known, source)), known)


def resolve(config: Any, entries: Sequence[Entry], known: dict[str, Any]) -> Any:
    """The dataclass of a structured configuration with these entries, checked.

    Args:
        config: structured configuration of OmegaConf.
        entries: (source, dotted key, value), later ones replace earlier ones.
        known: dotted key -> declared type.
    """
    last = {key: (source, value) for source, key, value in entries}
    for key, (source, _) in ((key, entry) for key, entry in last.items() if entry[1] == OPEN):
        means = help_of(cast(type, OmegaConf.get_type(config))).get(key, "")
        raise ValueError(f"{source} leaves {key} open; give --{key} VALUE{means and f': {means}'}")
    check_removed(entries, known)
    for source, key, value in (entry for entry in entries if entry[2] != OPEN):
        try:
            config = set_key(config, key, value, known)
        except (OmegaConfBaseException, TypeError):
            raise ValueError(
                f"{source}: {key} must be {describe(hint_of(key, known))}, not {value!r}"
            ) from None
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    resolved = fill_defaults(resolved)
    check_options(resolved)
    return resolved


def check_removed(entries: Sequence[Entry], known: dict[str, Any]) -> None:
    """Refuse flags that remove a row and set a key of it.

    Args:
        entries: (source, dotted key, value).
        known: dotted key -> declared type.
    """
    flags = {key: value for source, key, value in entries if source.startswith("--")}
    for key in (
        key for key, value in flags.items() if value is None and is_table(known.get(key.rpartition(".")[0]))
    ):
        if other := next((name for name in flags if name.startswith(f"{key}.")), None):
            raise ValueError(f"--{key} null removes the row that --{other} is for; give one of them")


def set_key(config: Any, key: str, value: Any, known: dict[str, Any]) -> Any:
    """The configuration with one dotted key set; a dict that is given replaces the one that was there.

    null removes a row of a table, as of a comparison.

    Args:
        config: structured configuration of OmegaConf.
        key: dotted key.
        value: of the key.
        known: dotted key -> declared type.
    """
    table, _, entry = key.rpartition(".")
    if value is None and is_table(known.get(table)):
        rows = OmegaConf.select(config, table)
        if entry not in rows:
            raise ValueError(f"{key} is not there to be removed; {table} has {', '.join(rows) or 'no rows'}")
        return set_key(config, table, {name: row for name, row in rows.items() if name != entry}, known)
    given = value.items() if is_table(known.get(key)) and isinstance(value, dict) else ()
    if empty := [name for name, row in given if row is None]:
        raise ValueError(f"{key} has the row {empty[0]} without keys; `{key}.{empty[0]}: null` removes a row")
    if is_dict(known.get(key)) and isinstance(value, dict):
        parent = OmegaConf.select(config, table) if table else config
        with omegaconf.read_write(parent):
            OmegaConf.update(config, key, {}, merge=False)
    nested = reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)
    return OmegaConf.unsafe_merge(config, nested)  # `merge` copies the whole configuration for every key


def fill_defaults(config: Any) -> Any:
    """The same configuration, dicts completed by the `fill` of their options."""
    changes = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            changes[entry.name] = fill_defaults(value)
        elif entry.metadata.get("fill"):
            changes[entry.name] = {**entry.metadata["fill"], **value}
    return replace(config, **changes)


def check_options(config: Any, prefix: str = "") -> None:
    """Refuse values that the options of a configuration do not allow.

    Args:
        config: a dataclass with fields made by `option`.
        prefix: what stands before the names of its keys in messages, such as "loss.".

    Raises:
        ValueError: with the key, its value and what fits.
    """
    for entry in fields(config):
        key, value = prefix + entry.name, getattr(config, entry.name)
        if is_dataclass(value):
            check_options(value, f"{key}.")
            continue
        for name, part in parts_of(key, value):
            if is_dataclass(part):
                check_options(part, f"{name}.")
            elif isinstance(part, int | float) and not isinstance(part, bool):
                check_number(name, part, entry.metadata)
        for option_name, names in (("choices", [value]), ("keys", value)):
            if (registry := entry.metadata.get(option_name)) is not None:
                for name in names:
                    check_value(key, name, registry.__getitem__)
        if (check := entry.metadata.get("check")) is not None:
            check_value(key, value, check)


def parts_of(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, each part with the key that messages name."""
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((key, part) for part in value)
    else:
        yield key, value


def check_number(key: str, number: float, limits: Mapping[str, Any]) -> None:
    """Refuse a number outside of its limits, and one that is not finite.

    Args:
        key: that the message names.
        number: the value.
        limits: `minimum`, `above`, `maximum`, `below`, as far as there are any.
    """
    low, over = limits.get("minimum"), limits.get("above")
    high, under = limits.get("maximum"), limits.get("below")
    fits = math.isfinite(number) and (low is None or number >= low) and (over is None or number > over)
    fits = fits and (high is None or number <= high) and (under is None or number < under)
    if not fits:
        raise ValueError(f"{key} must be {describe_range(limits) or 'a finite number'}, not {number}")


def describe_range(limits: Mapping[str, Any]) -> str:
    """The numbers that limits allow, in words."""
    low, over, high, under = (limits.get(name) for name in ("minimum", "above", "maximum", "below"))
    lower = f"at least {low}" if low is not None else f"above {over}" if over is not None else ""
    upper = f"at most {high}" if high is not None else f"below {under}" if under is not None else ""
    return " and ".join(filter(None, [lower, upper]))


def check_value(key: str, value: Any, check: Callable[[Any], Any]) -> None:
    """Refuse a value that a function refuses; the message names the key.

    Args:
        key: that the message names.
        value: of the key.
        check: raises a ValueError for a value that is not allowed.
    """
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def dump(config: Any) -> str:
    """The resolved YAML of a configuration; `load` reads it back to the same one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def usage(schema: type) -> str:
    """The help of a script: a YAML file of the defaults, with each key's help as a comment."""
    flags = [
        "--config FILE    read such a file; of several, the later ones win",
        "--key.path 1     set one key, whatever the files say; a switch needs no value",
        "--key.row null   remove a row of a table",
    ]
    about = [*cleandoc(schema.__doc__ or "").splitlines(), "", *flags, "", "The defaults:"]
    return "\n".join(f"# {line}".rstrip() for line in about) + "\n" + annotate(dump(schema), help_of(schema))


def help_of(schema: type, prefix: str = "") -> dict[str, str]:
    """The help of each dotted key: its text, names and range."""
    hints, texts = get_type_hints(schema), {}
    for entry in fields(schema):
        key, hint = prefix + entry.name, hints[entry.name]
        said = [entry.metadata.get("help"), describe_range(entry.metadata)]
        if get_origin(hint) is Literal:
            said.append(describe(hint))
        for names in ("choices", "keys"):
            if (registry := entry.metadata.get(names)) is not None:
                said.append(f"one of {', '.join(registry)}" if names == "choices" else ", ".join(registry))
        texts[key] = "; ".join(filter(None, said))
        if is_dataclass(hint):
            texts |= help_of(cast(type, hint), f"{key}.")
    return texts


def annotate(text: str, said: dict[str, str]) -> str:
    """A YAML text, indented by 2, with the help of each dotted key after its line."""
    path, lines = [], []
    for line in text.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            line = "  # ".join(filter(None, [line, said.get(".".join(path))]))
        lines.append(line)
    return "\n".join(lines) + "\n"


def read_file(path: str, known: dict[str, Any]) -> Iterator[Entry]:
    """The entries of a YAML file."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; give --config the path of a YAML file") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a list, but a configuration is made of keys, `key: value`")
    yield from flatten(values, known, path)


def flatten(values: dict[Any, Any], known: dict[str, Any], source: str, prefix: str = "") -> Iterator[Entry]:
    """The entries of nested values; a value that is no group of the schema stays whole.

    Args:
        values: nested keys.
        known: the keys of the schema, as `known_keys` finds them.
        source: what messages name as their origin.
        prefix: what stands before these keys, with its dot.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        check_key(key, known, source)
        if is_dataclass(known.get(key)) and isinstance(value, dict):
            yield from flatten(value, known, source, f"{key}.")
        else:
            yield source, key, value


def read_flags(argv: Sequence[str], known: dict[str, Any]) -> tuple[list[str], list[Entry]]:
    """The files of `--config FILE`, and the entries of `--a.b 1`, `--a.b=1` and the bare `--switch`."""
    left, files, entries, given = list(argv), [], [], set()
    while left:
        flag, equals, text = left.pop(0).partition("=")
        key = spell_key(flag.removeprefix("--"), known)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no flag; write --key value")
        if key != "config":
            check_key(key, known, flag)
            if key in given:
                raise ValueError(f"{flag} is given twice, and the first value would be lost; give it once")
            given.add(key)
        if not equals and known.get(key) is bool and not (left and left[0].lower() in YES_NO):
            text = "true"
        elif not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"{flag}: needs a value; write {flag} VALUE")
            text = left.pop(0)
        if key == "config":
            files.append(text)
            continue
        value = read_value(text, known.get(key), flag)
        if is_dataclass(known.get(key)) and isinstance(value, dict):
            entries += flatten(value, known, flag, f"{key}.")
        else:
            entries.append((flag, key, value))
    return files, entries


def spell_key(key: str, known: dict[str, Any]) -> str:
    """The key of a flag: "-" stands for "_", but not in names below a dict, such as one-centred."""
    name = key.replace("-", "_")
    for group, hint in known.items():
        if is_dict(hint) and get_args(hint)[1:] != (Any,) and name.startswith(f"{group}."):
            return group + key[len(group) :]
    return name


def read_value(text: str, hint: Any, flag: str) -> Any:
    """The value of a flag: YAML, but left as text where the schema declares text.

    Args:
        text: after the flag.
        hint: declared type.
        flag: that the message names.
    """
    if not text and str in get_args(hint):
        return text
    spelled = [choice for choice in get_args(hint) if str(choice) == text]
    if hint is str or spelled:
        return spelled[0] if spelled else text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"it={text}"]), resolve=False)["it"]  # pyright: ignore
    except (YAMLError, OmegaConfBaseException):
        raise ValueError(f"{flag}: {text!r} is no value; quote what YAML reads as punctuation") from None
    optional = get_origin(hint) in (Union, UnionType) and str in get_args(hint)
    return text if optional and value is not None else value
