"""A catalog's records: named bytes in the LMDB file `catalog.mdb`, changed by one durable transaction at a time.

Input: records, each a key and bytes. Output: the records of one committed transaction, each checked by the CRC32C,
bound to its key, that it ends in. Errors: `FormatError` for damage, `ConfigError` and `BudgetError` for what the system
refuses, and for another writer that does not end.

What the records mean is in catalog.py and training_records.py. Readers never map the file (lmdb_pages.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb

from .. import kernels
from ..causes import system_error
from ..errors import BudgetError, ConfigError, FormatError
from .lmdb_pages import FILE_BYTES_MAX, read_lmdb_records

CATALOG_FILE = "catalog.mdb"
MAP_BYTES = FILE_BYTES_MAX  # the most that the catalog can grow to; LMDB takes disk only for what is used

# Guards the open environment: LMDB allows one a file and process, so each write opens, works and closes under it.
_environment_lock = threading.Lock()


def _renew_lock() -> None:
    global _environment_lock
    _environment_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)

WRITER_WAIT_S = 60.0  # for another process to end its transaction, which takes milliseconds
WRITER_POLL_S = 0.01

_of_thread = threading.local()  # folders: those that this thread holds by `changing`


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keeps every other writer out of a catalog, so that what is read meanwhile is still so when it is written.

    Blocks for another one, at most WRITER_WAIT_S; raises `ConfigError` then. `write_records` does this by itself, and
    may be called within. Readers are not kept out.
    """
    mine: set[Path] = _of_thread.__dict__.setdefault("folders", set())
    if folder in mine:
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + WRITER_WAIT_S
        while not _locked(fd):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{folder}: another process has been changing its catalog for {WRITER_WAIT_S:.0f} s; wait for it, "
                    "or end it, and run again"
                )
            time.sleep(WRITER_POLL_S)
        mine.add(folder)
        yield
    finally:
        mine.discard(folder)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor, too
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def as_json(value: Any) -> bytes:
    """Returns a value as a record: JSON, keys sorted."""
    return json.dumps(value, sort_keys=True).encode()


def from_json(records: Mapping[str, bytes], key: str, path: Path, kind: type = dict) -> Any:
    """Returns the value of a JSON record. Raises `FormatError` if it is missing, or not a `kind`."""
    try:
        value = json.loads(records[key])
    except (KeyError, ValueError) as error:
        raise FormatError(
            f"{path}: catalog record {key!r} is missing or no JSON; restore the catalog or rebuild"
        ) from error
    if not isinstance(value, kind):
        raise FormatError(f"{path}: catalog record {key!r} is not a {kind.__name__}; restore the catalog or rebuild")
    return value


def write_records(file: Path, records: Mapping[str, bytes], removed: Sequence[str] = ()) -> None:
    """Commits records, each with its checksum, and takes others out, in one durable transaction.

    Checks an existing file first: LMDB would follow a wrong number in it.
    """
    try:
        with _environment(file) as environment, environment.begin(write=True) as transaction:
            for key, value in records.items():
                key_bytes = key.encode()
                checksum = kernels.crc32c(value, kernels.crc32c(key_bytes))
                transaction.put(key_bytes, value + struct.pack("<I", checksum))
            for key in removed:
                transaction.delete(key.encode())
    except lmdb.MemoryError as error:
        raise BudgetError(
            f"{file} cannot be mapped ({error}): LMDB reserves {MAP_BYTES} bytes of address space to write it; raise "
            f"the process's limit (ulimit -v)"
        ) from error
    except lmdb.Error as error:
        if refused := system_error(error, file):
            raise refused from error
        raise ConfigError(f"cannot write the catalog {file}: {error}; is the path writable?") from error


def read_records(path: Path) -> dict[str, bytes]:
    """Returns all records of the newest transaction, each checked and without its checksum."""
    file = path / CATALOG_FILE
    try:
        return {key.decode(): _unsealed(key, value, path) for key, value in read_lmdb_records(file)}
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is damaged ({error}); restore it from a copy or rebuild") from error
    except MemoryError as error:
        file_bytes = file.stat().st_size
        raise BudgetError(
            f"{file}: {file_bytes} bytes do not fit in this process's memory; raise the limit (ulimit -v, "
            "the container's)"
        ) from error


def _unsealed(key: bytes, value: bytes, path: Path) -> bytes:
    body, checksum = value[:-4], value[-4:]
    if len(value) < 4 or struct.pack("<I", kernels.crc32c(body, kernels.crc32c(key))) != checksum:
        raise FormatError(f"{path}: catalog record {key!r} has a wrong checksum; restore the catalog or rebuild")
    return body


@contextlib.contextmanager
def _environment(file: Path) -> Iterator[lmdb.Environment]:
    """Opens the environment for writing, alone on this machine."""
    with changing(file.parent), _environment_lock:
        if file.exists():
            read_lmdb_records(file)
        environment = lmdb.open(os.fsencode(file), subdir=False, max_dbs=0, map_size=MAP_BYTES, readahead=False)
        try:
            yield environment
        finally:
            environment.close()
