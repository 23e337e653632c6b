"""The lock of a store's folder: one build, one repair, or one making of a placement at a time.

Input: the store's path. Output: a folder that is there and locked. Errors: `ConfigError` if another process has the
lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from ..formats.catalog import LOCK_FILE


@contextlib.contextmanager
def locked_store(path: Path) -> Iterator[list[Path]]:
    """Makes the store's folder and holds its lock: one build, or one making of a placement, at a time.

    Yields what it made, the lock last; what is still in the list when the body raises is removed again.
    """
    lock = path / LOCK_FILE
    made = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
    lock_file, is_ours = None, False
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not lock.exists():
            made.append(lock)
        # A file object: if an interrupt keeps it from being named, it is closed, and with it goes the lock.
        lock_file = lock.open("ab", buffering=0)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock_file.fileno()), lock.stat()):
                raise FileNotFoundError  # a build that refused has just removed the lock, and this is not the new one
            is_ours = True
        except (BlockingIOError, FileNotFoundError):
            made.clear()  # it is the other build's
            raise ConfigError(
                f"another build or plan of {path} is running; wait for it, or end it and run again"
            ) from None
        yield made
    except BaseException:
        for entry in reversed(made):
            with contextlib.suppress(OSError):  # somebody uses the folder meanwhile
                if entry != lock:
                    entry.rmdir()
                elif is_ours:
                    entry.unlink()
        raise
    finally:
        if lock_file is not None:
            lock_file.close()
