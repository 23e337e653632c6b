"""Exact and durable reads and writes: the one place with loops over short reads and writes, and with replaced files.

Input: descriptors, buffers, paths. Output: all bytes; or a file that is whole and durable as soon as it has its name.
Errors: `FormatError` for files that end early; else `OSError` as the system gives it, which callers name by its cause
(`causes.naming`), because they know what is lost and what is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .causes import NEW_SUFFIX
from .errors import ConfigError, FormatError

WRITE_BYTES_MAX = 64 << 20  # of one system call, so that an interrupt does not wait for more


def read_up_to(
    fd: int, out: np.ndarray, byte_start: int, on_error: Callable[[OSError, int], None] | None = None
) -> int:
    """Fills `out` from `byte_start` of a file on, as far as the file goes. Blocks on the disk.

    Args:
        fd: A descriptor open for reading; with O_DIRECT, `out` and `byte_start` must be aligned.
        out: Contiguous uint8.
        byte_start: In the file; its own position does not move.
        on_error: Called with an error of the disk and the byte at which it came; reading then ends there.

    Returns:
        How many bytes were read: fewer than asked for if the file ends, or the disk failed.

    Raises:
        OSError: The disk failed, and `on_error` is None.
    """
    assert out.flags.c_contiguous, "reshape would fill a copy"
    view = out.reshape(-1).data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], byte_start + done)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error, byte_start + done)
            break
        if count == 0:
            break
        done += count
    return done


def read_exactly(fd: int, out: np.ndarray, byte_start: int, what: str) -> None:
    """Fills `out`, contiguous uint8, from `byte_start` on; raises `FormatError` if the file, `what`, ends early."""
    done = read_up_to(fd, out, byte_start)
    if done < out.nbytes:
        raise FormatError(
            f"{what}: the file ends {out.nbytes - done} bytes early, at byte {byte_start + done}; copy it again"
        )


def write_all(fd: int, data: bytes | np.ndarray, byte_start: int | None = None) -> None:
    """Writes all of `data` (bytes or a contiguous array) at `byte_start`, by default at the descriptor's position."""
    view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)
    done = 0
    while done < len(view):
        piece = view[done : done + WRITE_BYTES_MAX]
        done += os.write(fd, piece) if byte_start is None else os.pwrite(fd, piece, byte_start + done)


@contextlib.contextmanager
def replacing(path: Path, new_path: Path | None = None, mode: int = 0o666) -> Iterator[int]:
    """Yields a descriptor of a new file, which becomes `path` in one step if the body ends: whole, and durable.

    If the body raises, the new file is removed and `path` stays as it was. The same holds for a disk that fails, until
    the file has its name; if only its folder cannot be synced, `path` is the new file, perhaps not durably. A `path`
    that is a device is a `ConfigError`.

    Args:
        path: The file that is made, or replaced.
        new_path: The name meanwhile, in the same folder; by default `path` with NEW_SUFFIX. What a killed writer left
            there is removed.
        mode: Permissions, of which the umask takes some away.
    """
    if path.is_char_device() or path.is_block_device():  # a rename by root would take its place
        raise ConfigError(f"{path} is a device; give the name of a file to write")
    new_path = new_path or path.with_name(path.name + NEW_SUFFIX)
    new_path.unlink(missing_ok=True)
    fd = -1
    try:
        fd = os.open(new_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        yield fd
        os.fsync(fd)  # before the rename: a name must never stand for less than the whole file
        new_path.rename(path)
    except BaseException:
        new_path.unlink(missing_ok=True)
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes, new_path: Path | None = None, mode: int = 0o666) -> None:
    """Makes `data` the content of `path`, all at once and durably. Arguments as of `replacing`."""
    with replacing(path, new_path, mode) as fd:
        write_all(fd, data)


def sync_folder(folder: Path) -> None:
    """Makes renames and new files in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
