"""Which rank answers what of a table that is cut into slices, and where its answers go.

Input: the specs of the ranks' slices, in the order of ranks. Output: for each rank the columns of keys that it is asked
for and the heads that these fill, or, if a slice begins inside a head, the owner of each row. Pure. Errors:
`ConfigError` for slices that are not of one table, overlap, or leave rows out.

Shapes: N tokens, O orders of the whole table, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierstore.errors import ConfigError
from tierstore.lazy import lazy
from tierstore.spec import TableSpec


@dataclass(frozen=True)
class Share:
    """What one rank answers.

    Attributes:
        row_start: The first row of its slice; row_end: the one behind the last.
        columns: Of its own keys, the columns of the whole table's keys.
        head_start: The first of its heads, a place among the whole table's.
        rows_per_key: Its heads for each of its keys.
        num_heads: Heads that it holds whole.
    """

    row_start: int
    row_end: int
    columns: tuple[int, ...]
    head_start: int
    rows_per_key: int
    num_heads: int


@dataclass(frozen=True)
class SliceMap:
    """The shares of all ranks, in the order of ranks.

    Attributes:
        whole: The table that they make up.
        shares: By rank.
        by_key: Whether every slice begins and ends at a head, so that keys can be asked for; else rows are, by row id.
    """

    whole: TableSpec
    shares: tuple[Share, ...]
    by_key: bool

    @classmethod
    def of(cls, specs: Sequence[TableSpec]) -> SliceMap:
        """Returns the map of ranks' slices. Raises `ConfigError` unless together they are one whole table."""
        whole = specs[0].whole or specs[0]
        for rank, spec in enumerate(specs):
            other = spec.whole or spec
            if other != whole:
                raise ConfigError(
                    f"rank {rank} has a slice of another table than rank 0: {_described(other)}, and "
                    f"{_described(whole)}; give every rank its slice of one build"
                )
        _check_rows(whole, specs)
        shares = tuple(_share(whole, spec) for spec in specs)
        by_key = not whole.is_plain and all(share.num_heads for share in shares)
        return cls(whole, shares, by_key and sum(share.num_heads for share in shares) == whole.num_heads)

    @lazy
    def _owners(self) -> tuple[np.ndarray, np.ndarray]:
        """The first rows of slices, int64 [W], ascending, and the rank of each."""
        ranks = np.array(sorted(range(len(self.shares)), key=lambda rank: self.shares[rank].row_start), dtype=np.int64)
        return np.array([self.shares[rank].row_start for rank in ranks], dtype=np.int64), ranks

    def owners(self, row_ids: np.ndarray) -> np.ndarray:
        """Returns the rank that holds each row, int64 [R] -> int64 [R]. Row ids must be the table's."""
        starts, ranks = self._owners
        found: np.ndarray = ranks[np.searchsorted(starts, row_ids, side="right") - 1]
        return found


def _share(whole: TableSpec, spec: TableSpec) -> Share:
    """Returns a slice's share; without heads if those that it holds do not stand side by side."""
    heads = [
        place
        for place, (modulus, offset) in enumerate(zip(whole.moduli, whole.offsets, strict=True))
        if spec.row_start <= offset and offset + modulus <= spec.row_end
    ]
    if not spec.orders or len(heads) != spec.num_heads or heads != list(range(heads[0], heads[0] + len(heads))):
        return Share(spec.row_start, spec.row_end, (), 0, 1, 0)
    columns = tuple(int(column) for column in spec.columns(whole.orders))
    return Share(spec.row_start, spec.row_end, columns, heads[0], spec.rows_per_key, spec.num_heads)


def _check_rows(whole: TableSpec, specs: Sequence[TableSpec]) -> None:
    """Raises `ConfigError` unless the slices hold every row once."""
    end = 0
    for rank, spec in sorted(enumerate(specs), key=lambda each: each[1].row_start):
        if spec.row_start != end:
            what = "are in no rank's slice" if spec.row_start > end else "are in two ranks' slices"
            low, high = sorted((end, spec.row_start))
            raise ConfigError(
                f"table {whole.name}: rows {low} to {high} of {whole.num_rows} {what}, rank {rank} has "
                f"{spec.row_start} to {spec.row_end}; give rank I of {len(specs)} the slice I/{len(specs)}"
            )
        end = spec.row_end
    if end != whole.num_rows:
        raise ConfigError(
            f"table {whole.name}: rows {end} to {whole.num_rows} are in no rank's slice; give rank I of {len(specs)} "
            f"the slice I/{len(specs)}"
        )


def _described(spec: TableSpec) -> str:
    return f"table {spec.name} of {spec.num_rows} rows of {spec.row_bytes} bytes, hash {spec.fingerprint[:16]}..."
