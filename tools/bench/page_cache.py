"""The state of the page cache before a run: pages of files brought in, dropped, and counted.

Input: files. Output: the share of their pages that memory holds, as mincore counts them. A benchmark that says "cold"
prints that share. Errors: `OSError` from the kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

READ_BYTES = 1 << 24

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def drop(files: Iterable[Path]) -> None:
    """Drops the files' pages from the page cache; those that somebody has mapped or is writing stay. Blocks shortly."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def bring_in(files: Iterable[Path]) -> None:
    """Reads the files front to back, so that the page cache holds them, memory allowing. Blocks on the disk."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(READ_BYTES):
                continue


def residency(files: Iterable[Path]) -> float:
    """Returns the share of the files' pages that the page cache holds, 0 to 1, counted by mincore."""
    held = total = 0
    for file in files:
        count, num_pages = _held(file)
        held, total = held + count, total + num_pages
    return held / total if total else 0.0


def _held(file: Path) -> tuple[int, int]:
    num_bytes = file.stat().st_size
    if not num_bytes:
        return 0, 0
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    held = np.zeros(num_pages, dtype=np.uint8)
    fd = os.open(file, os.O_RDONLY)
    try:
        address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    try:
        if _libc.mincore(address, num_bytes, held.ctypes.data):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    finally:
        _libc.munmap(address, num_bytes)
    return int((held & 1).sum()), num_pages
