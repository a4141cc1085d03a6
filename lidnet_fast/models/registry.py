"""Looking models up by name or import path, with errors that say what would have worked."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lidnet_fast.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class NetworkConfig:
    """A network by name or import path, with its constructor's options."""

    name: str
    """One of this package's names, or the import path of a class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the network, such as {"channels": 16} for a unet."""


def construct(kind: str, name: str, factory: Callable[..., T], options: Mapping[str, Any]) -> T:
    """Call `factory(**options)`, reporting options that it doesn't take.

    Args:
        kind: what is being made, for messages ("denoiser", "detector").
        name: the name the user gave.
        factory: class or function to call.
        options: keyword arguments the user gave.

    Raises:
        InputError: an option isn't among the factory's parameters, a required one is missing, or the factory fails.
    """
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise InputError(f"{kind} {name!r}: {error}; its options: {known}") from error
    try:
        return factory(**options)
    except InputError:
        raise
    except Exception as error:  # whatever a user's own class raises
        raise InputError(f"{kind} {name!r} can't be made with {dict(options)}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def unknown_name(kind: str, name: str, known: Mapping[str, Any], hint: str = "") -> InputError:
    """The error for a name that isn't in `known`, listing the names and the near matches."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return InputError(f"unknown {kind} {name!r}{guess} Known: {', '.join(known)}{hint}")


def is_import_path(name: str) -> bool:
    """Whether a network is named by import path rather than by one of this package's names."""
    return ":" in name or "." in name


def import_attribute(kind: str, path: str) -> Any:
    """Import what is named by "package.module:name" or "package.module.name".

    A module that isn't installed is looked for in the working directory, where a user's own networks usually lie. That
    folder is on the import path for this import alone, and last, so that no file in it can replace another module.

    Raises:
        InputError: the module can't be imported or has no such attribute.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        with _last_on_path(str(Path.cwd())):
            module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise InputError(f"{kind} {path!r}: can't import module {module_name!r}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"{kind} {path!r}: module {module_name!r} has no {name!r}")
    return found


def import_module_class(kind: str, path: str) -> type[nn.Module]:
    """Import the `nn.Module` class named by "package.module:ClassName" or "package.module.ClassName".

    Raises:
        InputError: as `import_attribute`, or the attribute isn't an `nn.Module` class.
    """
    found = import_attribute(kind, path)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        name = path.replace(":", ".").rpartition(".")[2]
        raise InputError(f"{kind} {path!r}: {name!r} isn't a torch.nn.Module class")
    return found


@contextmanager
def _last_on_path(folder: str) -> Iterator[None]:
    before = list(sys.path)
    sys.path.append(folder)
    importlib.invalidate_caches()  # the folder may have changed since Python last looked
    try:
        yield
    finally:
        sys.path[:] = before


def at_least(kind: str, least: int, **values: int) -> None:
    """Refuse sizes below `least`.

    Raises:
        InputError: names the option and its value.
    """
    for name, value in values.items():
        if value < least:
            raise InputError(f"{kind}: {name} must be at least {least}, got {value}")
