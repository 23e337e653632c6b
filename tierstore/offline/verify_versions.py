"""verify, of versions: every file of rows, its digest, head, pages and row ids; and how many rows versions have.

Input: a catalog. Output: parts of a verification, each a report. Errors: none; what is wrong is in the reports. Memory:
some MiB a file, and the index of a table's rows, 18 bytes each.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from .. import kernels
from ..decisions.budget import overlay_bytes
from ..errors import CorruptPageError, FormatError, TierStoreError
from ..formats.catalog import CatalogImage
from ..formats.version_rows import REMEDY, RowsFile, read_row_ids, read_rows_head, read_version_pages
from ..formats.versions import VersionTable
from ..layout import TableLayout
from ..tiers.memory import allocate
from ..tiers.overlay import TableOverlay
from ..tiers.version_files import VersionFiles
from .verify_report import CHUNK_BYTES, FAULTS_PER_SHARD_MAX, VerifyReport, check_not_stopped

Part = Callable[[threading.Event], VerifyReport]


def parts_of_versions(image: CatalogImage) -> list[Part]:
    """Returns what there is to check of a store's versions: each file, and each table's rows together."""
    parts: list[Part] = []
    for version in image.used_versions:
        before = 0 if version.folded is not None else version.number - 1
        identity = image.at_version(before).identity
        for name, table in version.tables.items():
            spec, seed = image.tables[name].spec, image.tables[name].seed
            head = RowsFile(version.number, name, spec.row_bytes, table.num_rows, identity, seed)
            parts.append(partial(_verify_file, Path(image.path) / table.file, table, head, spec.num_rows))
    return parts + [partial(_verify_count, image, image.tables[name]) for name in image.touched]


def _verify_file(
    file: Path, table: VersionTable, wanted: RowsFile, table_rows: int, stop: threading.Event
) -> VerifyReport:
    """Checks one file of rows: its length, head, pages, row ids and SHA-256."""
    report = VerifyReport()
    fd = -1
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError(f"{file}: it is no regular file; {REMEDY}")
        if (sha256 := _sha256(fd, stop)) != table.sha256:
            report.faults.append(f"{file}: SHA-256 {sha256[:16]}..., the catalog says {table.sha256[:16]}...; {REMEDY}")
        if read_rows_head(file, fd) != wanted:
            raise FormatError(f"{file}: its head is not that of this version and store; {REMEDY}")
        _verify_pages(file, fd, wanted, report, stop)
        for _ in read_row_ids(file, fd, wanted, table_rows):
            check_not_stopped(stop)
    except OSError as error:
        report.faults.append(f"{file}: {error.strerror}; {REMEDY}")
    except TierStoreError as error:
        report.faults.append(str(error))
    finally:
        if fd >= 0:
            os.close(fd)
    return report


def _verify_pages(file: Path, fd: int, head: RowsFile, report: VerifyReport, stop: threading.Event) -> None:
    """Checks every page of rows; of those that are bad, names the first few."""
    step = max(1, CHUNK_BYTES // head.shape.page_bytes)
    num_bad = 0
    for start in range(0, head.num_pages, step):
        check_not_stopped(stop)
        numbers = np.arange(start, min(start + step, head.num_pages))
        report.pages_checked += len(numbers)
        try:
            read_version_pages(file, fd, head, numbers)
            continue
        except CorruptPageError:
            pass
        for number in numbers:
            try:
                read_version_pages(file, fd, head, np.array([number]))
            except CorruptPageError as error:
                num_bad += 1
                if num_bad <= FAULTS_PER_SHARD_MAX:
                    report.faults.append(str(error))
    if num_bad > FAULTS_PER_SHARD_MAX:
        report.faults.append(f"{file}: and {num_bad - FAULTS_PER_SHARD_MAX} more pages")


def _sha256(fd: int, stop: threading.Event) -> str:
    sha256, at = hashlib.sha256(), 0
    while data := os.pread(fd, CHUNK_BYTES, at):
        check_not_stopped(stop)
        sha256.update(data)
        at += len(data)
    return sha256.hexdigest()


def _verify_count(image: CatalogImage, layout: TableLayout, _: threading.Event) -> VerifyReport:
    """Checks that versions have as many rows of a table as the catalog says: readers make room for so many."""
    report, name = VerifyReport(), layout.spec.name
    try:
        files = VersionFiles(image, layout)
    except (OSError, TierStoreError):
        return report  # the check of the files says why
    try:
        overlay = TableOverlay.within(files, allocate(overlay_bytes(files.num_touched)))
        overlay.load_index()
        found = int((overlay.buckets.view(kernels.INDEX_BUCKET)["keys"] >= 0).sum())
        if found != files.num_touched:
            report.faults.append(
                f"table {name}: versions have {found} rows, the catalog says {files.num_touched}; restore the catalog"
            )
    except (OSError, TierStoreError):
        return report  # as above
    finally:
        files.close()
    return report
