"""What must be fast, behind one face: compiled (kernels/cpu, C++) where it was built, else the NumPy reference.

Imports nothing of tierstore's. `native` says which one serves. All functions release the interpreter lock when native, may
be called from any thread, and check the bounds of what they are given (`ValueError`).
"""

from __future__ import annotations

import errno
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import reference
from .reference import PAGE_BAD_CHECKSUM, PAGE_GOOD, PAGE_OTHER_NUMBER, PAGE_OTHER_VERSION, TRAILER

__all__ = [
    "PAGE_BAD_CHECKSUM",
    "PAGE_GOOD",
    "PAGE_OTHER_NUMBER",
    "PAGE_OTHER_VERSION",
    "TRAILER",
    "Engine",
    "check_pages",
    "crc32c",
    "crc32c_backend",
    "native",
    "probe_process_madvise",
    "probe_uring",
    "seal_pages",
]

_serving: Any = reference
try:
    _serving = importlib.import_module("._cpu", __name__)
except ImportError as error:
    warnings.warn(
        f"tierstore runs without its compiled kernels ({error}): checks and builds are ten times slower or more; "
        f"install gcc or clang and run: pip install --force-reinstall tierstore",
        RuntimeWarning,
        stacklevel=2,
    )

native: bool = _serving is not reference


def probe_uring() -> int:
    """Returns 0 where this process may use io_uring as the native reader does, else the errno that says why not."""
    return _serving.probe_uring() if native else errno.ENOSYS


def probe_process_madvise() -> int:
    """Returns 0 where this process may call process_madvise on itself, else the errno that says why not."""
    return _serving.probe_process_madvise() if native else errno.ENOSYS


# The lookup path of a store (kernels/cpu/engine.h), None where it was not compiled; `tierstore.tiers.native` is its user.
Engine: Any = _serving.Engine if native else None


def crc32c_backend() -> str:
    """Returns what computes CRC32C here: "sse4.2", "armv8-crc", "table" (compiled), or "numpy"."""
    return _serving.crc32c_backend() if native else "numpy"


def crc32c(data: Any, seed: int = 0) -> int:
    """Returns the CRC32C (RFC 3720) of a contiguous buffer; `seed` continues: crc32c(b, crc32c(a)) == crc32c(a + b)."""
    return _serving.crc32c(data, seed)


def seal_pages(
    planes: Sequence[np.ndarray], out: np.ndarray, rows_per_page: int, page_start: int, version: int, seed: int
) -> None:
    """Interleaves planes into rows and rows into sealed pages. Costs one copy and one checksum of `out`.

    planes: uint8 [rows, width_bytes] each, side by side in a row; out: uint8 [ceil(rows / rows_per_page), page_bytes],
    overwritten whole: rows, zero padding, trailer. Pages are numbered from `page_start` on.
    """
    _serving.seal_pages(
        [np.ascontiguousarray(plane) for plane in planes], out, rows_per_page, page_start, version, seed
    )


def check_pages(pages: np.ndarray, page_numbers: np.ndarray, version: int, seed: int) -> np.ndarray:
    """Checks that pages, uint8 [n, page_bytes] contiguous, are whole and bear page_numbers, int64 [n].

    Returns uint8 [n]: PAGE_GOOD, PAGE_BAD_CHECKSUM, PAGE_OTHER_VERSION or PAGE_OTHER_NUMBER. A wrong checksum is reported
    before the other two, whose numbers cannot be trusted then.
    """
    return _serving.check_pages(pages, page_numbers, version, seed)
