"""Key traces: accesses that a running store saw, all those of a sample of its keys.

Input: accesses in the order of their lookups. Output: the same, streamed; what a trace is about is known without
reading its data. Errors: `FormatError` for files of columns that are not a key trace or whose numbers contradict each
other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import FormatError
from .columns import ColumnReader, ColumnWriter
from .trace import BLOCK_VALUES, KEYS, TRACE_KIND, open_trace

KEY_COLUMNS = {"table": "uint16", "order_index": "uint8", "keys": "int64", "batch": "int64"}


@dataclass(frozen=True)
class TracedTable:
    """A table of a key trace: what its keys can be compared with."""

    name: str
    fingerprint: str
    orders: tuple[int, ...]


@dataclass(frozen=True)
class KeyTraceInfo:
    """What a key trace is about.

    sample_rate: share of all keys of which every access was kept. num_batches: lookups while it was recorded.
    num_dropped: keys of those lookups that the recorder had no time for, counted before sampling.
    """

    path: Path
    tables: tuple[TracedTable, ...]
    sample_rate: float
    num_accesses: int
    num_batches: int
    num_dropped: int


class KeyBlock(NamedTuple):
    """Accesses in order, [A] each: index of the table in the trace's tables, of the order in its orders,
    key, lookup."""

    table: np.ndarray
    order_index: np.ndarray
    keys: np.ndarray
    batch: np.ndarray


class KeyTraceWriter:
    """Writes a key trace; use it with `with`, and `finish` it. One thread at a time."""

    def __init__(self, path: str | os.PathLike[str], *, tables: Sequence[TracedTable], sample_rate: float) -> None:
        """tables: those that accesses may name, by index. sample_rate: share of keys whose accesses are kept,
        0 to 1."""
        assert 0 < sample_rate <= 1, sample_rate
        self.num_accesses = 0
        listed = [[table.name, table.fingerprint, list(table.orders)] for table in tables]
        header = {"trace": KEYS, "tables": listed, "sample_rate": float(sample_rate)}
        self._writer = ColumnWriter(path, TRACE_KIND, header)
        self._block = {name: np.empty(BLOCK_VALUES, dtype=dtype) for name, dtype in KEY_COLUMNS.items()}
        self._filled = 0  # of the block

    def add(self, accesses: KeyBlock) -> None:
        """Appends accesses in order; batches ascend from one to the next. Blocks on the disk when a block is full."""
        for start in range(0, len(accesses.keys), BLOCK_VALUES):
            self._add_part([column[start : start + BLOCK_VALUES] for column in accesses])
        self.num_accesses += len(accesses.keys)

    def _add_part(self, columns: list[np.ndarray]) -> None:
        """Appends accesses that are not more than a block."""
        room = BLOCK_VALUES - self._filled
        for part in ([column[:room] for column in columns], [column[room:] for column in columns]):
            count = len(part[0])
            for mine, values in zip(self._block.values(), part, strict=True):
                mine[self._filled : self._filled + count] = values
            self._filled += count
            if self._filled == BLOCK_VALUES:
                self._write_block()

    def _write_block(self) -> None:
        if self._filled:
            self._writer.write_block(KEYS, {name: column[: self._filled] for name, column in self._block.items()})
        self._filled = 0

    def finish(self, *, num_batches: int, num_dropped: int) -> KeyTraceInfo:
        """Ends the trace, which has its name from then on; the counts are those of `KeyTraceInfo`.
        Blocks on the disk."""
        self._write_block()
        self._writer.finish({"accesses": self.num_accesses, "batches": num_batches, "dropped": num_dropped})
        return read_key_trace_info(self._writer.path)

    def abandon(self) -> None:
        """Removes what was written, unless it is finished."""
        self._writer.abandon()

    def __enter__(self) -> KeyTraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def read_key_trace_info(path: str | os.PathLike[str]) -> KeyTraceInfo:
    """Returns what a key trace is about, without reading its data. Raises `FormatError` if it is not one."""
    with open_trace(path, KEYS) as reader:
        return _key_info(reader)


def read_key_blocks(path: str | os.PathLike[str]) -> Iterator[KeyBlock]:
    """Yields the accesses of a key trace in order, a block at a time. Raises `FormatError` if it is not a whole one."""
    with open_trace(path, KEYS) as reader:
        info = _key_info(reader)
        num_orders = np.array([len(table.orders) for table in info.tables], dtype=np.int64)
        last_batch = 0
        for columns in reader.blocks(KEYS):
            block = KeyBlock(*(columns[name] for name in KEY_COLUMNS))
            if not _is_good(block, num_orders, last_batch, info.num_batches):
                raise FormatError(
                    f"{info.path}: accesses name tables, orders, keys or lookups that it does not have (of "
                    f"{len(num_orders)} tables, {info.num_batches} lookups); record the trace again"
                )
            yield block
            last_batch = int(block.batch[-1]) if len(block.batch) else last_batch


def _is_good(block: KeyBlock, num_orders: np.ndarray, last_batch: int, num_batches: int) -> bool:
    """Whether the columns of a block are of one length, and name only what there is."""
    if len({len(column) for column in block}) != 1 or not (block.table < len(num_orders)).all():
        return False
    batches = np.concatenate([[last_batch], block.batch])  # compared, for differences may wrap round
    return bool(
        (block.order_index < num_orders[block.table]).all()
        and (block.keys >= 0).all()
        and (batches[1:] >= batches[:-1]).all()
        and (not len(block.batch) or block.batch[-1] < num_batches)
    )


def _key_info(reader: ColumnReader) -> KeyTraceInfo:
    reader.require(KEYS, KEY_COLUMNS)
    rate, listed = reader.header.get("sample_rate"), reader.header.get("tables")
    tables = [_traced_table(entry) for entry in listed] if isinstance(listed, list) else [None]
    known = tuple(table for table in tables if table is not None)
    if len(known) != len(tables) or not isinstance(rate, float) or not 0 < rate <= 1:
        raise FormatError(
            f"{reader.path}: tables {listed!r:.200}, sample rate {rate!r:.100}; no trace says that: record it again"
        )
    accesses, found = reader.count("accesses"), reader.num_values(KEYS, "keys")
    if accesses != found:
        raise FormatError(f"{reader.path}: {found} accesses, its footer says {accesses}; record the trace again")
    return KeyTraceInfo(reader.path, known, rate, accesses, reader.count("batches"), reader.count("dropped"))


def _traced_table(entry: object) -> TracedTable | None:
    match entry:
        case [str(name), str(fingerprint), [*orders]]:
            lengths = tuple(order for order in orders if type(order) is int)
            return TracedTable(name, fingerprint, lengths) if len(lengths) == len(orders) else None
    return None
