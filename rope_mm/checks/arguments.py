"""Arguments whose names differ between versions of transformers, and arguments that a forward refuses.

An argument that is read by one name out of keyword arguments looks absent once a new version renames it. So
it is read by all of its names, and a cache under any other name is an error.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from rope_mm.registry import Registry

ALIASES = {
    # transformers from 5.24; before it; models without attention
    "cache": ("cache", "past_key_values", "cache_params"),
}

Function = TypeVar("Function", bound=Callable[..., Any])


def read_parameters(cls: type, method: str = "forward") -> tuple[str, ...]:
    """Names of a method's parameters, without self."""
    return tuple(inspect.signature(getattr(cls, method)).parameters)[1:]


parameters_of = cache(read_parameters)  # to read them at each token would take a layer's time


def bind_positional(module: object, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module by their names, positional ones too.

    Raises:
        TypeError: as Python's for a call: more positional arguments than it has, one given twice.
    """
    if not args:
        return dict(kwargs)
    # torch.compile warns of a cache, and needs none
    names = (read_parameters if torch.compiler.is_compiling() else parameters_of)(type(module))
    if len(args) > len(names):
        raise TypeError(f"{type(module).__name__} takes {len(names)} arguments, not {len(args)}")
    given = dict(zip(names, args, strict=False))
    if twice := [name for name in given if name in kwargs]:
        raise TypeError(f"{type(module).__name__} got the argument {twice[0]} twice")
    return given | dict(kwargs)


def spelling(function: Callable[..., Any], argument: str) -> str | None:
    """The name by which a function takes an argument of ALIASES; None if it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in ALIASES[argument] if name in parameters), None)


def read(arguments: Mapping[str, Any], argument: str) -> Any:
    """The value of an argument of ALIASES among keyword arguments, whichever name it has; None if absent.

    Raises:
        ValueError: two names with a value each.
    """
    given = {name: arguments[name] for name in ALIASES[argument] if arguments.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are one argument; give one of them")
    return next(iter(given.values()), None)


def refuse_unknown_cache(arguments: Mapping[str, Any]) -> None:
    """Refuse a cache under a name that is not known: ignored, it would change every later token in silence.

    Raises:
        ValueError: a cache under a name that ALIASES does not have.
    """
    for name, value in arguments.items():
        if hasattr(value, "get_seq_length") and name not in ALIASES["cache"]:
            raise ValueError(
                f"the argument {name} holds a cache, but only {', '.join(ALIASES['cache'])} are read; "
                "give it by one of these names"
            )


def cache_of(output: Any) -> Any:
    """The cache that a model's output brings, by whichever name; None where it brings none.

    Older names are read only where the newer ones are absent: newer versions warn of them.
    """
    name = next((name for name in ALIASES["cache"] if hasattr(output, name)), None)
    return None if name is None else getattr(output, name)


def refuse_unknown(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keyword arguments that a function does not have and would ignore.

    Raises:
        ValueError: with the nearest of the known names.
    """
    names = Registry("argument", dict.fromkeys(known))
    for name in arguments:
        names[name]


def refuse_arrays(**arguments: Any) -> None:
    """Refuse lists, tuples and numpy arrays where tensors are meant.

    Raises:
        ValueError: with the argument's name.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor) or not (isinstance(value, list | tuple) or hasattr(value, "__array__")):
            continue
        kind = type(value).__name__
        raise ValueError(f"{name} must be a tensor, not a {kind}; torch.as_tensor makes one of it")


def takes_any_name(function: Function) -> Function:
    """Let a function take each argument of ALIASES by all of its names, and say so in its signature."""
    own = {argument: spelling(function, argument) for argument in ALIASES}

    @wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        refuse_unknown_cache(kwargs)
        for argument, name in own.items():
            value = read(kwargs, argument)
            for alias in ALIASES[argument]:
                kwargs.pop(alias, None)
            if name is not None and value is not None:
                kwargs[name] = value
        return function(*args, **kwargs)

    renamed.__signature__ = with_aliases(inspect.signature(function))  # pyright: ignore
    return renamed  # pyright: ignore[reportReturnType]


def with_aliases(signature: inspect.Signature) -> inspect.Signature:
    """A signature that has every name of each argument of ALIASES: callers look there for theirs."""
    own = signature.parameters
    missing = [alias for names in ALIASES.values() if own.keys() & set(names) for alias in names]
    more = [inspect.Parameter(alias, inspect.Parameter.KEYWORD_ONLY, default=None) for alias in missing]
    parameters = [*own.values(), *(p for p in more if p.name not in own)]
    return signature.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))
