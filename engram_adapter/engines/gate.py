"""The gate: an engine that is not the one the plug-in was written for is refused at start, by name.

Input: a package, the versions that were tested; classes and the parameters that their methods must have. Output: none.
Errors: `EngineMismatchError`, which says what differs, where, both sides, and what to do.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping

from tierstore.errors import ConfigError

logger = logging.getLogger("tierstore")

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+.*)?$")  # a release; others are builds between releases


class EngineMismatchError(ConfigError):
    """The engine, or the table that it expects, is not the one that the plug-in or the store was made for."""


def check_version(package: str, tested: tuple[str, str], *, forced: bool = False) -> str:
    """Returns the version of an engine's package if it is within the tested range.

    Args:
        package: Its import name; its `__version__` counts, since builds for other machines have other names.
        tested: The first version that was tested, and the first that was not: ("0.32", "0.34").
        forced: Whether another version is tried all the same, with a warning.

    Raises:
        EngineMismatchError: The version is outside the range, or no release, and not forced.
    """
    version = str(getattr(importlib.import_module(package), "__version__", "unknown"))
    start, end = tested
    release = _release(version)
    if release is not None and _numbers(start) <= release < _numbers(end):
        return version
    message = (
        f"{package} {version} is not among the versions that this tierstore was tested with, {start} up to and "
        f"without {end}"
    )
    if not forced:
        raise EngineMismatchError(
            f"{message}: install one of these, or another tierstore; to try this one, set strict to false"
        )
    logger.warning("forced: %s; the rows may be wrong if its internals changed", message)
    return version


def check_signatures(owner: type, expected: Mapping[str, Iterable[str]], engine: str) -> None:
    """Checks that a class of the engine has methods of these parameters, in this order, `self` left out.

    Args:
        owner: The class.
        expected: Names of parameters by the method's name.
        engine: Its package and version, for the message.

    Raises:
        EngineMismatchError: A method is missing or has other parameters.
    """
    for name, parameters in expected.items():
        where = f"{owner.__module__}.{owner.__qualname__}.{name}"
        method = inspect.getattr_static(owner, name, None)
        if method is None:
            raise EngineMismatchError(f"{engine}: {where} is missing, which tierstore replaces; {_REMEDY}")
        found, wanted = _parameters(getattr(owner, name)), tuple(parameters)
        if found != wanted:
            raise EngineMismatchError(
                f"{engine}: {where} takes ({', '.join(found)}), tierstore was written for ({', '.join(wanted)}); "
                f"{_REMEDY}"
            )


def check_attributes(owner: object, names: Iterable[str], engine: str) -> None:
    """Checks that a module, a class or an object of the engine has these attributes; raises `EngineMismatchError`."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise EngineMismatchError(f"{engine}: {where} has no {', '.join(missing)}, which tierstore uses; {_REMEDY}")


_REMEDY = "install a version of the engine that this tierstore was tested with, or a newer tierstore"


def _parameters(method: Callable[..., object]) -> tuple[str, ...]:
    """Returns a method's parameters without `self`; *args and **kwargs keep their stars."""
    parameters = inspect.signature(method).parameters.values()
    return tuple(_starred(each) for each in parameters if each.name not in ("self", "cls"))


def _starred(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    return f"**{parameter.name}" if parameter.kind is inspect.Parameter.VAR_KEYWORD else parameter.name


def _release(version: str) -> tuple[int, ...] | None:
    match = _RELEASE.match(version)
    return _numbers(match[1]) if match else None


def _numbers(version: str) -> tuple[int, ...]:
    """Returns a release's numbers, at least three, so that 0.33 equals 0.33.0."""
    numbers = tuple(int(part) for part in version.split("."))
    return numbers + (0,) * (3 - len(numbers))
