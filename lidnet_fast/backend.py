"""Which implementation of the ops runs.

"reference" (plain PyTorch) is the only one in this build. The choice is, in this order, what `use` was last given, the
environment variable LIDNET_FAST_BACKEND, the default.
"""

import os
from types import ModuleType

_VARIABLE = "LIDNET_FAST_BACKEND"
_DEFAULT = "reference"
_AVAILABLE = ("reference",)
_NOT_IN_THIS_BUILD = ("fused",)

_used: str | None = None


def available() -> tuple[str, ...]:
    """Names of the implementations that can run here."""
    return _AVAILABLE


def use(name: str | None) -> None:
    """Choose the implementation for this process.

    Args:
        name: One of `available()`, or None to go back to the environment variable or the default.

    Raises:
        ValueError: If `name` is unknown or not available here.
    """
    global _used
    if name is not None:
        _check(name, "backend.use")
    _used = name


def current() -> str:
    """Name of the implementation that the ops run on.

    Raises:
        ValueError: If LIDNET_FAST_BACKEND names one that is unknown or not available here.
    """
    if _used is not None:
        return _used
    name = os.environ.get(_VARIABLE) or _DEFAULT
    _check(name, _VARIABLE)
    return name


def reason() -> str:
    """Why `current()` is what it is, in words."""
    if _used is not None:
        return "chosen by lidnet_fast.backend.use"
    return f"chosen by the environment variable {_VARIABLE}" if os.environ.get(_VARIABLE) else "the default"


def implementation() -> ModuleType:
    """The module that holds the chosen implementation of every op.

    Raises:
        ValueError: As `current`.
    """
    current()
    # Imported at the first use: it brings torchvision, which takes seconds, and `import lidnet_fast` stays light.
    from lidnet_fast import reference

    return reference


def _check(name: str, source: str) -> None:
    if name in _AVAILABLE:
        return
    names = ", ".join(_AVAILABLE)
    if name in _NOT_IN_THIS_BUILD:
        raise ValueError(f"{source}: backend {name!r} isn't available in this build (available: {names})")
    raise ValueError(f"{source}: unknown backend {name!r} (available: {names})")
