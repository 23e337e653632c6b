"""Pickles read as data: only classes that a format names, each as a plain stand-in, and never an import.

Input: the bytes of a pickle, and the stand-ins by module and name. Output: the object. Errors: `PickleError` for a
class that is not named, and for bytes that are no pickle; the caller says which file it was.

An unpickler takes memory for the numbers that a pickle states, and hashes its keys, before it looks at what is there:
ten bytes may ask for 64 GiB of memo, a kilobyte for 2^40 steps. So `pickle_checks` walks the opcodes first. What it
says of keys holds for stand-ins that hash nothing themselves and make no tuple of a list.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from .pickle_checks import PickleError, check_claims, check_keys

Names = Mapping[tuple[str, str], Any]


class Record:
    """Stands in for a class: its attributes as the pickle gives them. Nothing of the real class runs."""

    def __init__(self, *_: Any) -> None:
        """Takes whatever the real class takes."""

    def __setstate__(self, state: Any) -> None:
        """Keeps a dict of attributes as such; any other state as `state`."""
        if isinstance(state, dict) and all(type(key) is str for key in state):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state

    def of(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Returns an attribute; raises `PickleError` if it is missing or of another type."""
        value = self.__dict__.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise PickleError(f"{type(self).__name__}.{name} is {type(value).__name__}")
        return value


class Word(str):
    """Stands in for an object of which only the name counts, such as torch.float32."""

    __slots__ = ()


def word(name: Any) -> Word:
    """Stands in for a function of a name; raises `PickleError` for anything else."""
    if type(name) is not str:
        raise PickleError(f"a name that is {type(name).__name__}")
    return Word(name)


def size(values: Any) -> tuple[Any, ...]:
    """Stands in for torch.Size, which is pickled as a tuple."""
    if type(values) is not tuple:
        raise PickleError(f"a size that is {type(values).__name__}")
    return values


def shown(value: Any) -> str:
    """Returns what a pickle held, for a message: short, however deep it lies within itself."""
    return reprlib.repr(value)[:80]


def named_records(module: str, *names: str) -> dict[tuple[str, str], type[Record]]:
    """Returns a stand-in for each class of a module."""
    return {(module, name): type(name, (Record,), {}) for name in names}


def load(data: bytes, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Returns the object that a pickle describes.

    Args:
        data: The pickle.
        names: What stands for each global, by module and name. Others are refused.
        persistent: What stands for a persistent id; None: the pickle has none.

    Raises:
        PickleError: Another global, keys that would be hashed without end, or no pickle.
    """
    check_claims(data)
    check_keys(data)
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.names, unpickler.persistent = names, persistent
    try:
        return unpickler.load()
    except PickleError:
        raise
    except MemoryError:
        raise PickleError("it asks for more memory than there is") from None
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly any type
        raise PickleError(f"it is damaged ({type(error).__name__}: {error})") from error


class _Unpickler(pickle.Unpickler):
    names: Names
    persistent: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in of a global; imports nothing."""
        found = self.names.get((module, name), self.names.get((module, "*")))
        if found is None:
            raise PickleError(f"it names {module}.{name}, which is none of this format's classes")
        return Word(name) if found is Word else found

    def persistent_load(self, pid: Any) -> Any:
        """Returns what stands for a persistent id."""
        if self.persistent is None:
            raise PickleError("it refers to objects outside of it")
        return self.persistent(pid)
