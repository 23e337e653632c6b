"""A table from scratch: its rows are values that a counter gives, and take no disk until training touches them.

Input: how values are drawn, or what a catalog says of it. Output: `InitialLayout`s, which have no pages and no shards.
Errors: `FormatError` for records that contradict themselves, `ConfigError` for numbers that draw nothing.

The value of (seed, table, row, column) is a function of these four (Philox, kernels/cpu/philox.h), so that a row has
the same first values whenever, and by whomever, it is first touched. FORMAT.md has the record.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ConfigError, FormatError
from ..layout import SEED_MAX, PageShape, TableLayout
from ..spec import TableSpec

INITIALIZER_SEED_MAX = 2**64 - 1
TABLE_NUMBER_MAX = 2**32 - 1
NORMAL = "normal"


@dataclass(frozen=True)
class Initializer:
    """How the values of a table are drawn: normally, with mean 0 and a standard deviation.

    Attributes:
        seed: Of all tables of a store.
        table: A number that keeps the tables of one seed apart.
        deviation: The standard deviation; 0 makes all values 0.
        kind: "normal".
    """

    seed: int
    table: int
    deviation: float
    kind: str = NORMAL

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= INITIALIZER_SEED_MAX:
            raise ConfigError(f"seed {self.seed}, must be 0 to {INITIALIZER_SEED_MAX}")
        if not 0 <= self.table <= TABLE_NUMBER_MAX:
            raise ConfigError(f"table number {self.table}, must be 0 to {TABLE_NUMBER_MAX}")
        if not math.isfinite(self.deviation) or self.deviation < 0:
            raise ConfigError(f"standard deviation {self.deviation}, must be 0 or a finite number above it")

    @classmethod
    def from_dict(cls, record: Any, table_name: str) -> Initializer:
        """Reads the record of a catalog; raises `FormatError`."""
        found = record if isinstance(record, dict) else {}
        values = [found.get(name) for name in ("seed", "table", "deviation", "kind")]
        seed, table, deviation, kind = values
        if type(seed) is int and type(table) is int and isinstance(deviation, float) and kind == NORMAL:
            try:
                return cls(seed, table, deviation)
            except ConfigError as error:
                raise _damaged(table_name, str(error)) from error
        raise _damaged(table_name, f"{found}")


@dataclass(frozen=True)
class InitialLayout(TableLayout):
    """A table whose rows an initializer gives. It has no shards; its pages are ranges of rows that nobody wrote."""

    initializer: Initializer = field(kw_only=True)

    @property
    def num_shards(self) -> int:
        """None."""
        return 0

    @property
    def store_bytes(self) -> int:
        """None."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a JSON-able dict."""
        return {"spec": self.spec.to_dict(), "seed": self.seed, "initializer": asdict(self.initializer)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> InitialLayout:
        """Reads what `to_dict` wrote; raises `FormatError` if numbers are missing or contradict each other."""
        spec = TableSpec.from_dict(record.get("spec", {}))
        seed = record.get("seed")
        if type(seed) is not int or not 0 <= seed <= SEED_MAX:
            raise _damaged(spec.name, f"seed {seed}")
        return lay_out_initial(spec, seed, Initializer.from_dict(record.get("initializer"), spec.name))


def lay_out_initial(spec: TableSpec, seed: int, initializer: Initializer) -> InitialLayout:
    """Returns a table's layout. seed: of the checksums of its training records."""
    shape = PageShape.of_rows(spec.row_bytes)
    num_pages = shape.num_pages(spec.own_rows)
    return InitialLayout(
        spec, shape.page_bytes, shape.rows_per_page, num_pages, num_pages, seed, "training", initializer=initializer
    )


def _damaged(table_name: str, what: str) -> FormatError:
    return FormatError(f"table {table_name}: the catalog's record of its initializer, {what}, is damaged; restore it")
