"""What a pickle would cost, before it is unpickled: memory for the numbers that it states, and hashing of its keys.

Input: the bytes of a pickle. Output: none; nothing of it is built (https://docs.python.org/3/library/pickletools.html).
Errors: `PickleError` for what would take memory, time or stack without limit, and for bytes that are no pickle.

Forty opcodes make a tuple of two that are the same tuple of two, and so on: as a value it takes a kilobyte, as a key
2^40 steps. So `check_keys` walks with a stack and a memo that hold, for each tuple, what its hash costs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

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

DEPTH_MAX = 100  # of tuples within a key: hashing recurs
HASHED_FREE = 1 << 20  # values in keys that any pickle may have hashed
HASHED_PER_BYTE = 8  # and for each byte of it

_FIXED_BYTES = {
    **dict.fromkeys(b"Khq\x80", 1), **dict.fromkeys(b"M", 2), **dict.fromkeys(b"Jrj", 4), **dict.fromkeys(b"G\x95", 8)
}  # fmt: skip
_LINES = {**dict.fromkeys(b"IgLFSVPp", 1), **dict.fromkeys(b"ci", 2)}
_PUSHES = frozenset(b"NIJKMLGFSTUVXBCP\x8a\x8b\x88\x89\x8c\x8d\x8e\x96\x97}])\x8fc")
_POPS = {  # opcodes that take so many values of the stack; the others take all from the mark on
    **dict.fromkeys(b"ab0Q\x85", 1), **dict.fromkeys(b"sR\x81\x93\x86", 2), **dict.fromkeys(b"\x92\x87", 3)
}  # fmt: skip
_MAKES = frozenset(b"QR\x81\x93\x92\x85\x86\x87tldio\x91")  # put something else there instead
# Bytes of an opcode with its own; 0: `_end` says.
_BYTES = [0 if code in _LINES or code in _LENGTH_BYTES else 1 + _FIXED_BYTES.get(code, 0) for code in range(256)]
_MARK, _DUP, _POP, _MEMOIZE, _BINGET, _LONG_BINGET, _BUILD = b"(20\x94hjb"
_GETS, _PUTS, _IDLE = frozenset(b"hjg"), frozenset(b"qrp"), frozenset(b"\x80\x95\x98")
_TUPLES, _SETS, _HASHES = frozenset(b"t\x85\x86\x87"), frozenset(b"\x90\x91"), frozenset(b"sud\x90\x91")


class PickleError(ValueError):
    """Bytes that are no pickle of this format."""


def check_claims(data: bytes) -> None:
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
            place = int.from_bytes(data[at : at + 4], "little") if code == _LONG_BINPUT else _decimal(text)
            at += 4 if code == _LONG_BINPUT else len(line)
            num_put += 1
            if place > MEMO_FREE + 2 * num_put:
                raise PickleError(f"it puts something at place {place} of its memo, where {num_put} things are")
        else:
            raise PickleError(f"it is damaged (opcode {code:#x} at byte {at - 1})")
    raise PickleError(f"it is damaged (it ends at byte {len(data)}, without its last opcode)")


class _Cost(NamedTuple):
    """What hashing a tuple takes: values, and tuples within each other."""

    values: int
    depth: int


_NONE = None  # of what is no tuple
_FLAT = tuple(_Cost(length + 1, 1) for length in range(9))
_VALUES_MAX = 1 << 62  # of a cost, which would double with every opcode


class _Walk:
    """The stack and the memo of an unpickler, with costs for values."""

    def __init__(self, hashed_max: int) -> None:
        self.stack: list[_Cost | None] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Cost | None] = {}
        self._left = self._max = hashed_max

    def take(self, code: int) -> None:
        """Does what an opcode does that pops values or copies one."""
        stack = self.stack
        if code == _DUP:
            stack.append(stack[-1])
        elif code == _POP and self.marks and self.marks[-1] == len(stack):
            self.marks.pop()
        else:
            count = _POPS.get(code)
            start = self.marks.pop() if count is None else len(stack) - count
            taken = stack[start:]
            del stack[start:]
            if any(taken) and code in _HASHES:
                self._hash(taken if code in _SETS else taken[::2])
            if code in _MAKES:
                is_tuple = code in _TUPLES
                stack.append(_cost_of(taken, is_tuple) if is_tuple or any(taken) else _NONE)

    def _hash(self, keys: list[_Cost | None]) -> None:
        for key in filter(None, keys):
            self._left -= key.values
            if key.depth > DEPTH_MAX or self._left < 0:
                raise PickleError(
                    f"it has keys of tuples within tuples, {key.depth} deep, of {key.values} values; at most "
                    f"{DEPTH_MAX} deep, and {self._max} values in all keys, are read"
                )


def _cost_of(parts: list[_Cost | None], is_tuple: bool) -> _Cost:
    """What is made of some parts costs at most as much as they, and as a tuple one more for each."""
    if len(parts) < len(_FLAT) and not any(parts):
        return _FLAT[len(parts)]
    values, depth = len(parts) + 1, 0
    for part in filter(None, parts):
        values, depth = values + part.values, max(depth, part.depth)
    return _Cost(min(values, _VALUES_MAX), depth + is_tuple)


def check_keys(data: bytes) -> None:
    """Raises `PickleError` for a pickle that has more hashed than its length allows."""
    walk = _Walk(HASHED_FREE + HASHED_PER_BYTE * len(data))
    stack, memo, at = walk.stack, walk.memo, 0
    try:
        while (code := data[at]) != _STOP:
            start, fixed = at + 1, _BYTES[code]
            at = at + fixed if fixed else _end(data, code, start)
            if code in _PUSHES:
                stack.append(_NONE)
            elif code == _BINGET:
                stack.append(memo[data[start]])
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _MARK:
                walk.marks.append(len(stack))
            elif code == _BUILD:
                stack.pop()
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[start:at], "little")])
            elif code in _GETS:
                stack.append(memo[_number(data[start:at], code)])
            elif code in _PUTS:
                memo[_number(data[start:at], code)] = stack[-1]
            elif code not in _IDLE:
                walk.take(code)
    except (IndexError, KeyError):
        raise PickleError(f"it is damaged (what the opcode before byte {at} takes is not there)") from None


def _end(data: bytes, code: int, at: int) -> int:
    """Returns where an opcode's own bytes end, which begin at `at`, if their number is not fixed."""
    if code in _LENGTH_BYTES:
        begin = at + _LENGTH_BYTES[code]
        return begin + int.from_bytes(data[at:begin], "little")
    for _ in range(_LINES.get(code, 0)):
        at = data.find(b"\n", at) + 1 or len(data)
    return at


def _number(data: bytes, code: int) -> int:
    return _decimal(data.strip()) if code in b"gp" else int.from_bytes(data, "little")


def _decimal(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 20 else 1 << 64
