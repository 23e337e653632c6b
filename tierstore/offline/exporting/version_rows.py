"""The rows of a published version, for an export: the files of all versions up to it, as a stream.

Input: a catalog at a version. Output: for each table a `VersionStream`. Errors: `FormatError` for files that are not
what the catalog says, `CorruptPageError` for a damaged page.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...errors import CorruptPageError
from ...formats.catalog import CatalogImage
from ...layout import TableLayout
from ...tiers.overlay import VersionFiles
from .record_streams import RecordPiece
from .touched_rows import ROWS

READ_BYTES = 4 << 20  # of rows at once


class VersionStream:
    """The rows of a table in all versions up to an image's, oldest first; keeps the `RecordStream` contract."""

    def __init__(self, image: CatalogImage, table: TableLayout) -> None:
        """Opens the files and checks their heads."""
        self._files = VersionFiles(image, table)
        self._reading = threading.Lock()  # guards the files' buffers: one thread reads, others take what it read

    @property
    def record_bytes(self) -> int:
        """Bytes of a row."""
        return self._files.spec.row_bytes

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        for file in self._files.files:
            yield from self._files.row_ids(file)

    def pieces(self) -> Iterator[RecordPiece]:
        """See `RecordStream`."""
        at_once = max(1, READ_BYTES // self.record_bytes)
        for file in self._files.files:
            place = file.place_start
            for row_ids in self._files.row_ids(file):
                for start in range(0, len(row_ids), at_once):
                    part = row_ids[start : start + at_once]
                    yield RecordPiece(part, partial(self._read, np.arange(place, place + len(part))))
                    place += len(part)

    def _read(self, places: np.ndarray, out: np.ndarray) -> None:
        with self._reading:
            for part, found in self._files.read_places(places):
                if isinstance(found, str):
                    raise CorruptPageError(found)
                out[part] = found

    def close(self) -> None:
        """Closes the files; twice is harmless."""
        self._files.close()


@dataclass(frozen=True)
class KeptRows:
    """Keeps the records of a `VersionStream`, which are rows already; keeps the `Rounding` contract."""

    row_bytes: int

    @property
    def widths(self) -> Mapping[str, int]:
        """See `Rounding`."""
        return {ROWS: self.row_bytes}

    def fill_before(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """Rows are as they are, whatever was before."""

    def __call__(self, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        """See `Rounding`."""
        del before
        return {ROWS: np.ascontiguousarray(records)}
