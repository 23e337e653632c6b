"""Verifies what of a store in place lies outside it: the checkpoint's files, their blocks, and their rows.

Input: a catalog, tables in place, perhaps a reader of what their rows must be. Output: parts of a verification, each a
function that returns a report. Errors: none; what is wrong is a fault.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from ..errors import CorruptPageError, TierStoreError
from ..formats.catalog import CatalogImage
from ..formats.in_place import InPlaceFile, InPlaceLayout
from ..formats.table_source import PlaneReader
from ..formats.tensor_files import read_tensor_file
from ..tiers.in_place import InPlaceFiles, open_file, rebuild_command
from .verify_report import CHUNK_BYTES, FAULTS_PER_SHARD_MAX, VerifyReport, check_not_stopped

PART_BYTES = 256 << 20  # of rows that one part checks

Part = Callable[[threading.Event], VerifyReport]


def parts_of_files(image: CatalogImage) -> list[Part]:
    """Returns a part for each file that rows lie in: whether it is the one that the store was built over."""
    return [partial(_verify_file, image, file) for file in image.files]


def parts_of_rows(
    image: CatalogImage, table: InPlaceLayout, reader: PlaneReader | None, sampled: np.ndarray | None
) -> list[Part]:
    """Returns parts that check the blocks of all rows, or of the sampled pages, and compare rows with a reader's."""
    pages = np.arange(table.num_pages) if sampled is None else sampled
    step = max(1, PART_BYTES // (table.rows_per_page * table.spec.row_bytes))
    return [
        partial(_verify_rows, image, table, reader, pages[start : start + step]) for start in range(0, len(pages), step)
    ]


def _verify_file(image: CatalogImage, file: InPlaceFile, _: threading.Event) -> VerifyReport:
    report = VerifyReport()
    try:
        path, fd = open_file(image, file)
        os.close(fd)
        if file.header_sha256 and read_tensor_file(path).header_digest != file.header_sha256:
            report.faults.append(
                f"{path}: its header is not the one that the store was built over; put the checkpoint's own file back, "
                f"or build again: {rebuild_command(image.path)}"
            )
    except (TierStoreError, OSError) as error:
        report.faults.append(str(error))
    return report


def _verify_rows(
    image: CatalogImage, table: InPlaceLayout, reader: PlaneReader | None, pages: np.ndarray, stop: threading.Event
) -> VerifyReport:
    report = VerifyReport()
    try:
        files = InPlaceFiles(image, table, direct=False)
    except TierStoreError:
        return report  # `_verify_file` and the checks of shards say why
    try:
        check = _RowsCheck(files, reader, report)
        step = max(1, CHUNK_BYTES // (table.rows_per_page * table.spec.row_bytes))
        for start in range(0, len(pages), step):
            check_not_stopped(stop)
            check.check(pages[start : start + step])
        check.finish()
    except (OSError, TierStoreError) as error:
        report.faults.append(f"table {table.spec.name}: its rows cannot be compared: {error}")
    finally:
        files.close()
    return report


class _RowsCheck:
    """What a part has found so far. Faults beyond the first FAULTS_PER_SHARD_MAX of a kind are only counted."""

    def __init__(self, files: InPlaceFiles, reader: PlaneReader | None, report: VerifyReport) -> None:
        self._files, self._reader, self._report = files, reader, report
        self._blocks: dict[str, None] = {}  # what is wrong with each; two pages may share one
        self._num_rows = 0
        self._rows: list[str] = []

    def check(self, pages: np.ndarray) -> None:
        """Checks pages, int64 [P]: together, and if one is bad each by itself."""
        try:
            rows = self._files.read_rows(pages, np.empty(0, dtype=np.uint8))
        except CorruptPageError as error:
            if len(pages) == 1:
                self._blocks[str(error)] = None
                return
            for half in np.array_split(pages, 2):
                self.check(half)
            return
        self._report.blocks_checked += self._files.blocks_of(pages)
        if self._reader is not None:
            self._compare(pages, rows)

    def _compare(self, pages: np.ndarray, rows: np.ndarray) -> None:
        assert self._reader is not None
        per_page, num_rows = self._files.table.rows_per_page, self._files.table.spec.num_rows
        breaks = np.flatnonzero(np.diff(pages) != 1) + 1
        for i, j in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pages)], strict=True):
            row_start, row_end = int(pages[i]) * per_page, min((int(pages[j - 1]) + 1) * per_page, num_rows)
            found = rows[i:j].reshape(-1, rows.shape[2])[: row_end - row_start]
            expected = np.concatenate(self._reader.read(row_start, row_end), axis=1)
            differ = np.flatnonzero((found != expected).any(axis=1)) + row_start
            differ += self._files.table.public_spec.row_start
            self._report.rows_compared += row_end - row_start
            self._num_rows += len(differ)
            name = self._files.table.spec.name
            room = FAULTS_PER_SHARD_MAX - len(self._rows)
            self._rows += [f"row {row} of table {name} differs from the checkpoint's" for row in differ[:room].tolist()]

    def finish(self) -> None:
        """Adds what was found to the report."""
        blocks = list(self._blocks)
        for faults, count, what in ((blocks, len(blocks), "blocks"), (self._rows, self._num_rows, "rows")):
            self._report.faults += faults[:FAULTS_PER_SHARD_MAX]
            if count > FAULTS_PER_SHARD_MAX:
                name = self._files.table.spec.name
                self._report.faults.append(f"table {name}: and {count - FAULTS_PER_SHARD_MAX} more {what}")
