"""The store's table held against the one that an engine's layer expects: the same hash, rows, dim and bytes, or none.

Input: an open store, what the layer expects, and rows of the checkpoint as the engine loads it. Output: the table.
Errors: `EngineMismatchError`, which says what differs, where, both sides, and what to do.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np

from tierstore.store.store import Store
from tierstore.store.table import Table

from .gate import EngineMismatchError

SAMPLE_BYTES = 32 << 20  # of a table, for each row that is compared
SAMPLES_MIN = 32
_REMEDY = "build the store from the checkpoint that the engine loads, or give the engine that checkpoint"


@dataclass(frozen=True)
class ExpectedTable:
    """What a layer of an engine expects of its table.

    Attributes:
        name: The table's, such as "layers.1".
        num_rows: Rows, padding included.
        dim: Values a row.
        row_bytes: Bytes of a row as stored, scales included.
        codecs: Names of codecs that hold these bytes, without a scale behind "*".
        fingerprint: Of the engine's hash, as `TableSpec.fingerprint`.
    """

    name: str
    num_rows: int
    dim: int
    row_bytes: int
    codecs: tuple[str, ...]
    fingerprint: str


def matching_table(store: Store, expected: ExpectedTable, layer: str) -> Table:
    """Returns the store's table if it is the one that a layer expects; reads nothing.

    Args:
        store: An open store.
        expected: What the layer expects.
        layer: The layer's name in the engine, for the message.

    Raises:
        EngineMismatchError: There is no such table, or it differs.
    """
    if expected.name not in store.tables:
        raise EngineMismatchError(
            f"{layer}: {store.name} has no table {expected.name}; it has {', '.join(sorted(store.tables))}: {_REMEDY}"
        )
    table = store.tables[expected.name]
    spec = table.spec
    if spec.is_slice:
        raise EngineMismatchError(
            f"{layer}: {store.name} has rows {spec.row_start} to {spec.row_end} of the {spec.num_rows} of table "
            f"{spec.name}, and the engine asks for all; connect to all slices at once, or join them: tierstore reslice"
        )
    sides = (
        ("rows", spec.num_rows, expected.num_rows),
        ("values a row", spec.dim, expected.dim),
        ("bytes a row", spec.row_bytes, expected.row_bytes),
        ("hash fingerprint", spec.fingerprint, expected.fingerprint),
    )
    for what, stored, wanted in sides:
        if stored != wanted:
            raise EngineMismatchError(
                f"{layer}: {what} of table {spec.name} in {store.name}: {stored}, the engine expects {wanted}; "
                f"{_REMEDY}"
            )
    if spec.codec.partition("*")[0] not in expected.codecs:
        raise EngineMismatchError(
            f"{layer}: table {spec.name} in {store.name} holds {spec.codec}, the engine expects "
            f"{' or '.join(expected.codecs)}; {_REMEDY}"
        )
    return table


def sample_offsets(table_rows: int, start_row: int, num_rows: int, row_bytes: int) -> np.ndarray:
    """Returns which rows of a checkpoint's tensor to compare, int64, counted from its first row.

    One for each `SAMPLE_BYTES` of the table, at least `SAMPLES_MIN` of a whole table, at odd places.

    Args:
        table_rows: Rows of the whole table.
        start_row: The tensor's first row in the table.
        num_rows: Rows of the tensor.
        row_bytes: Bytes of a row in the tensor.
    """
    step = max(1, min(SAMPLE_BYTES // row_bytes, table_rows // SAMPLES_MIN))
    first = -(-start_row // step) * step
    regular = np.arange(first, start_row + num_rows, step, dtype=np.int64)
    spread = np.minimum(regular + regular // step * 7919 % step, start_row + num_rows - 1)
    return np.unique(spread - start_row)


def rows_at(tensor: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns rows of a checkpoint's tensor, uint8 [N, width], by their offsets, as a copy.

    Of a mapped file, their pages are read and none around them: some disks read megabytes ahead of each fault.
    """
    start = tensor.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.ctypes.data + tensor.nbytes - start
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, num_bytes, mmap.MADV_RANDOM)  # a hint: of memory that is no file's, it changes nothing
    rows: np.ndarray = tensor[offsets]
    return rows


def check_rows(table: Table, row_ids: np.ndarray, found: np.ndarray, bytes_start: int, layer: str) -> None:
    """Compares rows of the checkpoint with the store's; raises `EngineMismatchError` for one that differs. Blocks.

    Args:
        table: The store's table.
        row_ids: int64 [R].
        found: The checkpoint's bytes of these rows, uint8 [R, width].
        bytes_start: Where in a stored row these bytes lie.
        layer: The layer's name in the engine, for the message.
    """
    stored = table.rows(row_ids)[:, bytes_start : bytes_start + found.shape[1]]
    different = np.flatnonzero((stored != found).any(axis=1))
    if len(different):
        row = int(row_ids[different[0]])
        raise EngineMismatchError(
            f"{layer}: row {row} of table {table.spec.name} in the store is not row {row} of the checkpoint that the "
            f"engine loads ({len(different)} of {len(row_ids)} compared rows differ): the weights are others; {_REMEDY}"
        )


def check_compared(table: Table, num_rows: int, load_format: str, layer: str) -> None:
    """Raises `EngineMismatchError` if no row of a loaded checkpoint was compared: nothing says that it is the store's.

    Args:
        table: The store's table.
        num_rows: Rows that `check_rows` has compared.
        load_format: The engine's; "dummy" loads no checkpoint.
        layer: The layer's name in the engine, for the message.
    """
    if not num_rows and load_format != "dummy":
        raise EngineMismatchError(
            f"{layer}: the checkpoint that the engine loads has no row of table {table.spec.name} to compare with the "
            f"store's (0 of {table.spec.num_rows}), which may be another training's; {_REMEDY}"
        )


def served(table: Table, store: Store, mode: str, layer: str, num_rows: int) -> str:
    """Returns the line that says where a layer's rows come from; num_rows: that `check_rows` has compared."""
    spec = table.spec
    return (
        f"tierstore serves {layer}: table {spec.name} of {store.name}, {spec.num_rows} rows of {spec.row_bytes} bytes, "
        f"mode {mode}, {num_rows} rows compared with the checkpoint"
    )
