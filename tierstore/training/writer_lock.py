"""The lock of a store's one training writer.

Input: the store's path. Output: a lock, held until it is closed; files that no commit names are removed when it is
taken and when it is given back. Errors: `ConfigError` if somebody has it, by its process id.
"""

from __future__ import annotations

import fcntl
import io
import os
from pathlib import Path

from ..causes import naming
from ..errors import ConfigError
from .commits import remove_unnamed

LOCK_FILE = "training.lock"

_files: set[io.FileIO] = set()  # of this process's writers


def _close_files() -> None:
    """A forked child holds no lock: its parent's would outlive the parent."""
    for file in list(_files):
        file.close()


os.register_at_fork(after_in_child=_close_files)


class WriterLock:
    """Free at first: `take` it, `close` it, or use `with`. One thread at a time uses it."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._file: io.FileIO | None = None
        self._is_held = False

    def take(self) -> None:
        """Takes the lock, without waiting. Raises `ConfigError` with the process id of whoever has it."""
        path = self._store / LOCK_FILE
        with naming(path, path, writing=True):
            # A file object: if an interrupt keeps it from being named, it is closed, and with it goes the lock.
            self._file = io.FileIO(path, "rb+", opener=_open)
        _files.add(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(self._refusal()) from None
        self._is_held = True
        with naming(path, path, writing=True):
            os.pwrite(self._file.fileno(), f"{os.getpid():<20}".encode(), 0)
        remove_unnamed(self._store)

    def close(self) -> None:
        """Gives the lock back. Any number of times: one that was interrupted is called again."""
        file = self._file
        if file is None:
            return
        try:
            if self._is_held and not file.closed:  # a forked child has closed it
                self._is_held = False  # what cannot be removed now is the next writer's
                remove_unnamed(self._store)
        finally:
            if not file.closed:
                fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked just now may not have closed it yet
                file.close()
            _files.discard(file)

    def _refusal(self) -> str:
        assert self._file is not None, "it was opened"
        holder = os.pread(self._file.fileno(), 20, 0).decode(errors="replace").strip() or "unknown"
        remedy = "close the training that is open here" if holder == str(os.getpid()) else "end that one"
        return (
            f"{self._store} is being trained by process {holder}: a store has one training at a time; {remedy}, or "
            "copy the store"
        )

    def __enter__(self) -> WriterLock:
        try:
            self.take()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
