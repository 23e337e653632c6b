"""The geometry of a store: how a table's rows lie in pages and shards, and how large an entry's record is.

Input: a table's spec, or what a catalog says of it. Output: frozen layouts and sizes, computed without any I/O.
Errors: `FormatError` for numbers that are missing or contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from . import kernels
from .errors import FormatError
from .spec import TableSpec

UNIT_BYTES = 4096  # pages, heads, indexes and records begin at multiples of it, and reads are of whole ones
SEED_MAX = (1 << 32) - 1  # of checksums
PAGE_UNITS_MAX = 64
PAGE_WASTE_FRACTION = 0.1  # a page may leave so much of itself unused
TRAILER_BYTES = kernels.TRAILER.itemsize
BUCKET_KEYS = 3.5  # keys a bucket of 5 slots: 18 bytes of index an entry, and hardly a key displaced


@dataclass(frozen=True)
class PageShape:
    """How a table's rows lie in pages: row r is row r % rows_per_page of page r // rows_per_page."""

    page_bytes: int
    rows_per_page: int
    row_bytes: int

    @classmethod
    def of_rows(cls, row_bytes: int) -> PageShape:
        """Returns the smallest page of whole 4 KiB units that wastes at most a tenth, else the least wasteful one."""
        candidates = []
        for units in range(1, PAGE_UNITS_MAX + 1):
            page_bytes = units * UNIT_BYTES
            rows_per_page = (page_bytes - TRAILER_BYTES) // row_bytes
            waste = 1 - rows_per_page * row_bytes / page_bytes
            if waste <= PAGE_WASTE_FRACTION:
                return cls(page_bytes, rows_per_page, row_bytes)
            candidates.append((waste, page_bytes, rows_per_page))
        _, page_bytes, rows_per_page = min(candidates)
        return cls(page_bytes, rows_per_page, row_bytes)

    def num_pages(self, num_rows: int) -> int:
        """Returns how many pages hold `num_rows` rows."""
        return -(-num_rows // self.rows_per_page)

    def rows_of(self, pages: np.ndarray) -> np.ndarray:
        """Returns the rows of pages, uint8 [P, page_bytes], as uint8 [P, rows_per_page, row_bytes]; no copy."""
        return pages[:, : self.rows_per_page * self.row_bytes].reshape(-1, self.rows_per_page, self.row_bytes)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its file (relative to the store), length and SHA-256 (hex)."""

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PlacementRecord:
    """A published placement: its number, its file (relative to the store) and length."""

    epoch: int
    file: str
    num_bytes: int


@dataclass(frozen=True)
class TableLayout:
    """A table and how it lies on disk; page p is page p % pages_per_shard of shard p // pages_per_shard.

    `spec` is the engine's: of a slice, row ids count from its first row. `public_spec` is what callers see.
    """

    spec: TableSpec
    page_bytes: int
    rows_per_page: int
    num_pages: int
    pages_per_shard: int
    seed: int
    folder: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.spec.local)

    @property
    def public_spec(self) -> TableSpec:
        """The table's spec, whose row ids are the table's own."""
        return self.spec.public or self.spec

    @property
    def shape(self) -> PageShape:
        """The pages' geometry."""
        return PageShape(self.page_bytes, self.rows_per_page, self.spec.row_bytes)

    @property
    def num_shards(self) -> int:
        """How many shards the table has when it is finished."""
        return -(-self.num_pages // self.pages_per_shard)

    @property
    def store_bytes(self) -> int:
        """Bytes of all shards."""
        return self.num_pages * self.page_bytes

    def shard_file(self, shard_index: int) -> str:
        """Returns the shard's path, relative to the store."""
        return f"{self.folder}/{shard_index:05d}.shard"

    def shard_pages(self, shard_index: int) -> tuple[int, int]:
        """Returns the half-open range of pages that a shard holds."""
        page_start = shard_index * self.pages_per_shard
        return page_start, min(page_start + self.pages_per_shard, self.num_pages)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a JSON-able dict."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return record | {"spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TableLayout:
        """Reads what `to_dict` wrote; raises `FormatError` if numbers are missing or contradict each other."""
        spec = TableSpec.from_dict(record.get("spec", {}))
        numbers: dict[str, Any] = {
            n: record.get(n) for n in ("page_bytes", "rows_per_page", "num_pages", "pages_per_shard", "seed")
        }
        if not all(type(value) is int and value >= 0 for value in numbers.values()) or numbers["seed"] > SEED_MAX:
            raise FormatError(f"table {spec.name}: the catalog's layout {numbers} is damaged; restore it or rebuild")
        layout = cls(spec, **numbers, folder=checked_path(record.get("folder"), f"table {spec.name}"))
        fits = layout.rows_per_page == (layout.page_bytes - 16) // spec.row_bytes >= 1
        in_units = layout.page_bytes % UNIT_BYTES == 0 and layout.page_bytes <= UNIT_BYTES * PAGE_UNITS_MAX
        if not fits or not in_units or layout.num_pages != layout.shape.num_pages(layout.spec.num_rows):
            raise FormatError(f"table {spec.name}: the catalog's layout {numbers} contradicts its rows; rebuild")
        if layout.pages_per_shard < 1:
            raise FormatError(f"table {spec.name}: the catalog says {layout.pages_per_shard} pages a shard; rebuild")
        return layout


def round_up(value: int, unit: int) -> int:
    """Returns the least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def record_bytes(entry_bytes: int) -> int:
    """Returns the bytes of a record: the entry, up to a multiple of 8, and its trailer."""
    return round_up(entry_bytes, 8) + kernels.RECORD_TRAILER.itemsize


def checked_path(value: Any, what: str) -> str:
    """Returns a path inside the store, or raises: a catalog must not lead a reader out of its folder."""
    if (
        not isinstance(value, str)
        or not value
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        raise FormatError(f"{what}: the catalog names the file {value!r}, outside the store; rebuild")
    return value
