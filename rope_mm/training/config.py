"""Configuration of a run: defaults of a frozen dataclass < --config FILE, repeatable < --key.path value."""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from inspect import cleandoc
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rope_mm.training.cli_args import known_keys, read_file, read_flags
from rope_mm.training.help_text import annotate, describe, read_comments
from rope_mm.training.signals import KILLED

Schema = TypeVar("Schema")


def run(main: Callable[[Schema], Any], schema: type[Schema], argv: Sequence[str] | None = None) -> None:
    """Call main with the configuration of the command line; its errors end in one line and an exit code.

    2 for a ValueError, 1 for an OSError such as a full disk, 128 + n where signal n stopped it, except for a
    SIGTERM after which it could save: 0.
    `python -X dev script.py` shows the traceback instead.
    """
    try:
        main(load(schema, argv))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except KeyboardInterrupt as stopped:
        raise SystemExit((stopped.args or (KILLED + signal.SIGINT,))[0]) from None


def load(schema: type[Schema], argv: Sequence[str] | None = None) -> Schema:
    """The schema filled from files, then flags; `--help` prints what it says of itself, and exits.

    Raises:
        ValueError: an unknown key, a value of the wrong type, a file that cannot be read.
    """
    argv, known = sys.argv[1:] if argv is None else argv, known_keys(schema)
    if "--help" in argv or "-h" in argv:
        print(usage(schema))
        raise SystemExit(0)
    paths, flags = read_flags(argv, known)
    config = OmegaConf.structured(schema)
    for source, key, value in [entry for path in paths for entry in read_file(path, known)] + flags:
        nested = reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)
        try:
            config = OmegaConf.merge(config, nested)
        except (OmegaConfBaseException, TypeError):
            raise ValueError(f"{source}: {key} must be {describe(known.get(key))}, not {value!r}") from None
    try:
        return cast(Schema, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def dump(config: Any) -> str:
    """The resolved YAML of a configuration; `load` reads it back to the same one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def at_least(least: int, config: Any, *names: str) -> None:
    """Refuse smaller numbers.

    Raises:
        ValueError: with the key and its value.
    """
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def usage(schema: type) -> str:
    """The help of a script: a YAML file of the defaults, with comments that say what they are."""
    flags = [
        "--config FILE    read such a file; of several, the later ones win",
        "--key.path 1     set one key, whatever the files say; a switch needs no value",
    ]
    about = [*cleandoc(schema.__doc__ or "").splitlines(), "", *flags, "", "The defaults:"]
    return (
        "\n".join(f"# {line}".rstrip() for line in about)
        + "\n"
        + annotate(dump(schema), read_comments(schema))
    )
