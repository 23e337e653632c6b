"""What a disk would hold if the power went at any moment: recorded operations, replayed up to there.

Input: what a program does to the files below a folder, recorded by durable_calls.c from below libc, LMDB's own writes
included. Output: folders as a disk may leave them: writes and names that were not synced are all there, all lost, or
torn at 512 bytes. Errors: CalledProcessError, with the program's words.

What is durable: bytes of a file that was synced after they were written, or written with O_DSYNC; names that a sync of
their folder came after. Names come back in the order in which they were given, as journals keep them.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cpp_programs import digest, made
from .repository import SUPPORT, TESTS

CREATE, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, SYNC_FOLDER, MARK = range(1, 9)
SECTOR_BYTES = 512
PROGRAM_S = 300
_RECORD = struct.Struct("<IIIIQQQ")
SOURCE = SUPPORT / "durable_calls.c"


@dataclass(frozen=True)
class Operation:
    """One operation on a file or a name, below the recorded folder. path: relative to it; of a mark its text."""

    what: int
    path: str
    other: str
    inode: int
    byte_start: int
    data: bytes
    is_synced: bool


def library() -> Path:
    """Compiles durable_calls.c, if it is not there yet."""
    command = [shutil.which("gcc") or "cc", "-shared", "-fPIC", "-O1", str(SOURCE), "-ldl"]
    return made(f"durable-{digest(command, [SOURCE])}.so", command)


def run_recorded(code: str, root: Path, *arguments: str, log: Path | None = None) -> str:
    """Runs a Python program whose operations below `root` go through durable_calls.c; returns its output.

    It can import `support`, and call `ctypes.CDLL(None).durable_mark(b"text")`.
    """
    environment = os.environ | {"LD_PRELOAD": str(library()), "DURABLE_ROOT": f"{root}/"}
    environment |= {"DURABLE_LOG": str(log)} if log else {}
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{code}", str(root), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_log(log: Path, root: Path) -> list[Operation]:
    """Reads what was recorded, in order."""
    data, at, found = log.read_bytes(), 0, []
    prefix = len(str(root)) + 1
    while at < len(data):
        what, path_bytes, other_bytes, is_synced, inode, byte_start, num_bytes = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        path, other = (
            data[a:b].decode() for a, b in ((at, at + path_bytes), (at + path_bytes, at + path_bytes + other_bytes))
        )
        at += path_bytes + other_bytes
        written = data[at : at + num_bytes] if what == WRITE else b""
        at += len(written)
        shown = path if what == MARK else path[prefix:]
        found.append(Operation(what, shown, other[prefix:], inode, byte_start, written, bool(is_synced)))
    return found


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # byte, and what was written; None: cut there

    def sync(self) -> None:
        for start, data in self.pending:
            _apply(self.durable, start, data)
        self.pending.clear()


class Disk:
    """A disk under recorded operations, and what a loss of power leaves of it."""

    def __init__(self, before: Path) -> None:
        """before: a copy of the folder as it was when the recording began, all of it durable."""
        self._files: dict[int, _File] = {}  # by a number of ours: inodes are given again
        self._numbers: dict[int, int] = {}  # by inode
        self._names: dict[str, int] = {}
        self._pending: list[tuple[str, int | None]] = []  # names: given (to a number), or taken (None)
        self._seen: dict[str, int] = {}  # names as the program sees them
        for number, path in enumerate(path for path in sorted(before.rglob("*")) if path.is_file()):
            name = str(path.relative_to(before))
            self._files[number] = _File(bytearray(path.read_bytes()))
            self._names[name] = self._seen[name] = number

    def apply(self, operation: Operation) -> None:
        """Does what the program did."""
        if operation.what == MARK:
            return
        if operation.what in (WRITE, TRUNCATE):
            self._write(operation)
        elif operation.what == SYNC:
            self._file(operation).sync()
        elif operation.what == SYNC_FOLDER:
            self._sync_folder(operation.path)
        elif operation.what == CREATE:
            number = self._numbers[operation.inode] = len(self._files)
            self._files[number] = _File()
            self._give(operation.path, number)
        elif operation.what == RENAME:
            number = self._seen.pop(operation.path)
            self._pending.append((operation.path, None))
            self._give(operation.other, number)
        elif operation.what == UNLINK:
            self._seen.pop(operation.path, None)
            self._pending.append((operation.path, None))

    def _file(self, operation: Operation) -> _File:
        if operation.path in self._seen:
            return self._files[self._seen[operation.path]]
        return self._files[self._numbers[operation.inode]]  # its name is gone

    def _write(self, operation: Operation) -> None:
        file = self._file(operation)
        change = operation.byte_start, operation.data if operation.what == WRITE else None
        if operation.is_synced:
            _apply(file.durable, *change)
        else:
            file.pending.append(change)

    def _give(self, name: str, number: int) -> None:
        self._seen[name] = number
        self._pending.append((name, number))

    def _sync_folder(self, folder: str) -> None:
        left = []
        for name, number in self._pending:
            if str(Path(name).parent) == (folder or "."):
                _set(self._names, name, number)
            else:
                left.append((name, number))
        self._pending = left

    def leave(self, folder: Path, rng: random.Random | None, *, lost: bool) -> None:
        """Writes what is left to an empty folder.

        lost: nothing that was not synced is there. Else, without rng, everything; with rng, some of the names in order,
        and some sectors of each write.
        """
        names = dict(self._names)
        num_names = 0 if lost else rng.randint(0, len(self._pending)) if rng else len(self._pending)
        for name, number in self._pending[:num_names]:
            _set(names, name, number)
        for name, number in names.items():
            file = self._files[number]
            content = bytearray(file.durable)
            for start, data in [] if lost else file.pending:
                _apply(content, start, data, rng)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _set(names: dict[str, int], name: str, number: int | None) -> None:
    if number is None:
        names.pop(name, None)
    else:
        names[name] = number


def _apply(content: bytearray, start: int, data: bytes | None, rng: random.Random | None = None) -> None:
    """Writes data, or some of its sectors; None cuts or extends the file to `start`."""
    if data is None:
        content[:] = content[:start].ljust(start, b"\0")
        return
    for at in range(0, len(data), SECTOR_BYTES) if rng else (0,):
        part = data[at : at + SECTOR_BYTES] if rng else data
        if rng is None or rng.random() < 0.5:
            if len(content) < start + at:
                content.extend(bytes(start + at - len(content)))
            content[start + at : start + at + len(part)] = part


def crashes(
    before: Path,
    operations: Sequence[Operation],
    work: Path,
    num_torn: int = 1,
    seed: int = 0,
    moments: Collection[int] | None = None,
) -> Iterator[tuple[int, str, Path]]:
    """Yields (operations done, how, folder) for a loss of power after each; the folder is there until the next one.

    moments: numbers of operations done that are looked at; None: all, 0 and the last among them.
    """
    disk, rng = Disk(before), random.Random(seed)
    ways: list[tuple[str, random.Random | None]] = [("lost", None), ("kept", None)]
    ways += [(f"torn {i}", rng) for i in range(num_torn)]
    for done in range(len(operations) + 1):
        for how, random_bits in ways if moments is None or done in moments else ():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            disk.leave(work, random_bits, lost=how == "lost")
            yield done, how, work
        if done < len(operations):
            disk.apply(operations[done])
