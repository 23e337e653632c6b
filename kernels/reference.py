"""Every kernel in NumPy: the oracle that the compiled ones are tested against, and the fallback where there are none.

Same functions, arguments and results as `kernels.__init__` documents. Slow by design of being plain: about 90 MB/s checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TRAILER = np.dtype([("page_number", "<u8"), ("version", "<u4"), ("checksum", "<u4")])
PAGE_GOOD, PAGE_OTHER_VERSION, PAGE_OTHER_NUMBER, PAGE_BAD_CHECKSUM = range(4)

_POLYNOMIAL = 0x82F63B78  # CRC32C, Castagnoli, reflected: RFC 3720, appendix B.4


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _byte_table()


def _crc32c_of_columns(columns: np.ndarray, seed: int) -> np.ndarray:
    """CRC32C of n messages at once: columns is uint8 [message_bytes, n], one byte of every message a row."""
    state = np.full(columns.shape[1], ~np.uint32(seed), dtype=np.uint32)
    for column in columns:
        state = (state >> np.uint32(8)) ^ _TABLE[(state ^ column) & np.uint32(0xFF)]
    return ~state


def crc32c(data: Any, seed: int = 0) -> int:
    message = np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8)
    return int(_crc32c_of_columns(message[:, None], seed)[0])


def _checksums(pages: np.ndarray, seed: int) -> np.ndarray:
    return _crc32c_of_columns(np.ascontiguousarray(pages[:, :-4].T), seed)


def seal_pages(
    planes: Sequence[np.ndarray], out: np.ndarray, rows_per_page: int, page_start: int, version: int, seed: int
) -> None:
    num_rows = len(planes[0])
    row_bytes = sum(plane.shape[1] for plane in planes)
    num_pages, page_bytes = out.shape
    if any(plane.ndim != 2 or len(plane) != num_rows for plane in planes) or page_start < 0 or rows_per_page < 1:
        raise ValueError("planes must be [rows, width], of equally many rows")
    if row_bytes * rows_per_page + TRAILER.itemsize > page_bytes or num_pages != -(-num_rows // rows_per_page):
        raise ValueError("rows_per_page rows and the trailer must fit in a page, and out must have a page for the rows")
    rows = np.zeros((num_pages * rows_per_page, row_bytes), dtype=np.uint8)
    rows[:num_rows] = np.concatenate(planes, axis=1)
    out[:] = 0
    out[:, : rows_per_page * row_bytes] = rows.reshape(num_pages, rows_per_page * row_bytes)
    trailer = out[:, -TRAILER.itemsize :].view(TRAILER)[:, 0]
    trailer["page_number"] = np.arange(page_start, page_start + num_pages)
    trailer["version"] = version
    trailer["checksum"] = _checksums(out, seed)


def check_pages(pages: np.ndarray, page_numbers: np.ndarray, version: int, seed: int) -> np.ndarray:
    trailer = np.ascontiguousarray(pages[:, -TRAILER.itemsize :]).view(TRAILER)[:, 0]
    status = np.full(len(pages), PAGE_GOOD, dtype=np.uint8)
    status[trailer["page_number"] != page_numbers.astype(np.uint64)] = PAGE_OTHER_NUMBER
    status[trailer["version"] != version] = PAGE_OTHER_VERSION
    status[trailer["checksum"] != _checksums(pages, seed)] = PAGE_BAD_CHECKSUM
    return status
