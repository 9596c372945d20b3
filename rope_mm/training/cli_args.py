"""YAML files and flags -> (source, dotted key, value), every key one that the configuration knows."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Entry = tuple[str, str, Any]
YES_NO = ("true", "false", "yes", "no", "on", "off")


def known_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass, groups included, with its declared type."""
    hints, known = get_type_hints(schema), {}
    for name in (field.name for field in fields(schema)):
        known[prefix + name] = hints[name]
        if is_dataclass(hints[name]):
            known |= known_keys(hints[name], f"{prefix}{name}.")
    return known


def check_key(key: str, known: dict[str, Any], source: str) -> None:
    """Refuse a key that the schema lacks, naming the nearest; below a free dict every key will do."""
    free = (name for name, hint in known.items() if hint is Any or dict in (hint, get_origin(hint)))
    if key in known or any(key.startswith(f"{name}.") for name in free):
        return
    namesakes = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    near = namesakes or get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    raise ValueError(f"{source}: {key} is unknown; {hint}")


def read_file(path: str, known: dict[str, Any]) -> Iterator[Entry]:
    """The entries of a YAML file."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a list, but a configuration is made of keys, `key: value`")
    yield from flatten(values, known, path)


def flatten(values: dict[Any, Any], known: dict[str, Any], source: str, prefix: str = "") -> Iterator[Entry]:
    """The entries of nested values, down to what is no group of the schema."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        check_key(key, known, source)
        if is_dataclass(known.get(key)) and isinstance(value, dict):
            yield from flatten(value, known, source, f"{key}.")
        else:
            yield source, key, value


def read_flags(argv: Sequence[str], known: dict[str, Any]) -> tuple[list[str], list[Entry]]:
    """The files of `--config FILE`, and the entries of `--a.b 1`, `--a.b=1` and the bare `--switch`."""
    words, files, entries = list(argv), [], []
    while words:
        flag, equals, text = words.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no flag; write --key value")
        if key != "config":
            check_key(key, known, flag)
        if not equals and known.get(key) is bool and not (words and words[0].lower() in YES_NO):
            text = "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"{flag}: needs a value; write {flag} VALUE")
            text = words.pop(0)
        if key == "config":
            files.append(text)
        else:
            entries.append((flag, key, read_value(text, known.get(key), flag)))
    return files, entries


def read_value(text: str, hint: Any, flag: str) -> Any:
    """The value of a flag: YAML, but left as text where the schema declares text."""
    spelled = [choice for choice in get_args(hint) if str(choice) == text]
    if hint is str or spelled:
        return spelled[0] if spelled else text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"it={text}"]), resolve=False)["it"]  # pyright: ignore
    except (YAMLError, OmegaConfBaseException):
        raise ValueError(f"{flag}: {text!r} is no value; quote what YAML reads as punctuation") from None
    optional = get_origin(hint) in (Union, UnionType) and str in get_args(hint)
    return text if optional and value is not None else value
