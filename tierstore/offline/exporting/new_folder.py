"""A folder that appears whole: made beside its place under another name, which it loses when all is in it and synced.

Input: the path that it shall have. Output: the folder to fill. Errors: `ConfigError` for a path that holds something,
and for one that another process is making. Killed anywhere, it leaves nothing at the path; what it leaves beside it,
the next making of the same path removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...causes import NEW_SUFFIX
from ...durable import sync_folder
from ...errors import ConfigError

MARK = ".tierstore-unfinished"  # in the folder while it is made: it is ours, and may be removed


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that becomes `path` in one step, durably, if the body ends; else it is removed again."""
    path = path.absolute()
    check_free(path)
    unfinished = path.with_name(path.name + NEW_SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftover(unfinished)
    unfinished.mkdir()  # fails if another process makes it at the same time
    mark: int | None = None
    try:
        mark = os.open(unfinished / MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield unfinished
        sync_folder(unfinished)
        check_free(path)
        _take_name(unfinished, path)
        (path / MARK).unlink()
        sync_folder(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if mark is not None:
            os.close(mark)


def check_free(path: Path) -> None:
    """Raises `ConfigError` unless `path` is an empty folder, or nothing."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path} is a file or a link; give a new folder")
    num_files = len(list(path.iterdir())) if path.exists() else 0
    if num_files:
        raise ConfigError(f"{path} holds {num_files} files already, expected none; give a new folder")


def _take_name(unfinished: Path, path: Path) -> None:
    try:
        unfinished.rename(path)  # takes the place of an empty folder
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise ConfigError(f"{path} is where a disk is mounted; give a new folder in it") from error
        raise


def _remove_leftover(unfinished: Path) -> None:
    """Removes what a killed run left; raises `ConfigError` for a folder of somebody else, or of a run that goes on."""
    if not os.path.lexists(unfinished):
        return
    try:
        mark = os.open(unfinished / MARK, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        if unfinished.is_dir() and not unfinished.is_symlink() and not any(unfinished.iterdir()):
            unfinished.rmdir()  # killed before it had its mark
            return
        raise ConfigError(
            f"{unfinished} is in the way: the folder is made under that name first; move it, or give another path"
        ) from None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(unfinished)
    except BlockingIOError:
        raise ConfigError(
            f"another process is writing {unfinished.name.removesuffix(NEW_SUFFIX)} in {unfinished.parent}; wait for "
            f"it, or end it and run again"
        ) from None
    finally:
        os.close(mark)
