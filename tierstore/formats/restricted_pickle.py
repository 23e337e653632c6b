"""Pickles read as data: only classes that a format names, each as a plain stand-in, and never an import.

Input: the bytes of a pickle, and the stand-ins by module and name. Output: the object. Errors: `PickleError` for a
class that is not named, and for bytes that are no pickle; the caller says which file it was.

An unpickler takes memory for the numbers that a pickle states, before it looks at what is there: ten bytes may ask for
64 GiB of memo. So `_check_claims` walks the opcodes first (https://docs.python.org/3/library/pickletools.html).
"""

from __future__ import annotations

import io
import pickle
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[tuple[str, str], Any]

MEMO_FREE = 1 << 20  # places of the memo, some 50 MB, that may be named before as many things were put there
# Opcodes without bytes of their own, or with so many; and those behind whose name lines follow.
_PLAIN = re.compile(
    rb"(?:[]Nt)(}{aelsudbRo012\x81\x85-\x89\x8f-\x94\x97\x98Q]|[Khq\x80].|M..|[Jj]....|[G\x95].{8}|r..[\0-\x0f]\0"
    rb"|[IgLFSVP][^\n]*\n|[ci][^\n]*\n[^\n]*\n){1,1000}",
    re.DOTALL,
)
_LENGTH_BYTES = {
    **dict.fromkeys(b"\x8aUC\x8c", 1), **dict.fromkeys(b"\x8bTBX", 4), **dict.fromkeys(b"\x8e\x96\x8d", 8)
}  # fmt: skip
_STOP, _PUT, _LONG_BINPUT = b".pr"


class PickleError(ValueError):
    """Bytes that are no pickle of this format."""


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
        PickleError: Another global, or no pickle.
    """
    _check_claims(data)
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


def _check_claims(data: bytes) -> None:
    """Raises `PickleError` for lengths beyond the end, for places of the memo beyond what was put there, and for the
    registered numbers of classes, which would not come by their names."""
    at, num_put = 0, 0
    while at < len(data):
        if plain := _PLAIN.match(data, at):
            at = plain.end()
            continue
        code, at = data[at], at + 1
        if code == _STOP:
            return
        if code in _LENGTH_BYTES:
            begin = at + _LENGTH_BYTES[code]
            at = begin + int.from_bytes(data[at:begin], "little")
        elif code in (_PUT, _LONG_BINPUT):
            line = data[at : data.find(b"\n", at) + 1 or len(data)]
            text = line.strip()
            place = int.from_bytes(data[at : at + 4], "little") if code == _LONG_BINPUT else _number(text)
            at += 4 if code == _LONG_BINPUT else len(line)
            num_put += 1
            if place > MEMO_FREE + 2 * num_put:
                raise PickleError(f"it puts something at place {place} of its memo, where {num_put} things are")
        else:
            raise PickleError(f"it is damaged (opcode {code:#x} at byte {at - 1})")
    raise PickleError(f"it is damaged (it ends at byte {len(data)}, without its last opcode)")


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 20 else 1 << 64


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
