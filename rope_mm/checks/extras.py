"""Optional packages: the core needs torch alone; a missing one is named with the line that installs it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# what code imports of the extra `train`
TRAIN = ("transformers", "accelerate", "datasets", "omegaconf", "PIL", "scipy", "sklearn", "tqdm", "yaml")


class MissingPackage(ImportError, ValueError):
    """A package of an extra is not installed; the message has the line that installs it.

    Args:
        package: its name.
        extra_name: the extra that has it.
    """

    def __init__(self, package: str, extra_name: str):
        line = f"pip install 'rope-mm[{extra_name}]'"
        super().__init__(f"{package} is not installed; run: {line}", name=package)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Stands around imports that need an extra of this package.

    Args:
        name: of the extra, as in `pip install 'rope-mm[name]'`.

    Raises:
        MissingPackage: a package that cannot be imported, and how to install it.
    """
    try:
        yield
    except MissingPackage:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "a package").split(".")[0]
        if package.startswith("rope_mm"):
            raise
        raise MissingPackage(package, name) from error


def require(extra_name: str, *packages: str) -> None:
    """Refuse to go on without the packages of an extra, and import none of them.

    Args:
        extra_name: the extra.
        packages: what must be there, by the names that code imports.

    Raises:
        MissingPackage: the first that is not installed, and how to install it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingPackage(package, extra_name)


def import_name(room: str, homes: Mapping[str, str], name: str, extra_name: str) -> Any:
    """A public name of a package whose modules need an extra, imported when it is first asked for.

    Args:
        room: the package.
        homes: the module of the package that each of its public names is in.
        name: the name.
        extra_name: the extra that the modules need.

    Raises:
        AttributeError: a name that the package does not have.
        MissingPackage: a package of the extra that is not installed.
    """
    if name not in homes:
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    with extra(extra_name):
        return getattr(import_module(f"{room}.{homes[name]}"), name)
