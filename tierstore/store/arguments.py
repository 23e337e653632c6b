"""What callers give a table, checked and in the form that engines take.

Input: arrays of keys, row ids and rows, ranges of row ids. Output: the same, copied only if it must be. Errors:
`TypeError` and `ValueError` that say what was given and what was expected.
"""

from __future__ import annotations

import operator

import numpy as np

from .. import kernels
from ..spec import TableSpec

KEYS_END = 1 << 63


def checked_rows(
    spec: TableSpec, row_ids: np.ndarray, out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks a request by row id, but for the ids themselves, which the engine checks as it reads them.

    Returns:
        The ids, [R] or [N, K] and contiguous; the buffer for their rows; and that buffer as the engine takes it, which
        is another one if the leading axes of out do not join into one stride.
    """
    ids = checked_ids(row_ids, "row_ids")
    out = checked_out(out, (*ids.shape, spec.row_bytes))
    if not (ids.flags.c_contiguous and ids.flags.aligned):
        ids = ids.copy()
    if 1 <= ids.ndim <= 2:
        return ids, out, out
    ids = ids.reshape((-1, ids.shape[-1]) if ids.size else (0, 1)) if ids.ndim else ids.reshape(1)
    return ids, out, out.reshape(*ids.shape, spec.row_bytes)


def refuse_outside(spec: TableSpec, row_ids: np.ndarray) -> None:
    """Raises `ValueError` that names the first row id outside the table, or the slice, if there is one."""
    outside = kernels.find_out_of_range(row_ids, spec.num_rows)
    if outside >= 0:
        bad = row_ids.reshape(-1)[outside]
        raise ValueError(f"table {spec.name}: row id {bad} is outside -1 to {spec.num_rows - 1}")
    if spec.is_slice:
        others = np.flatnonzero(((row_ids < spec.row_start) & (row_ids >= 0)) | (row_ids >= spec.row_end))
        if len(others):
            raise ValueError(f"row {row_ids.reshape(-1)[others[0]]} {not_in_slice(spec)}")


def not_in_slice(spec: TableSpec) -> str:
    """Returns what an error says of an id that belongs to another slice."""
    return (
        f"of table {spec.name} is not in this slice, rows {spec.row_start} to {spec.row_end} of {spec.num_rows}; ask "
        f"the store that holds it"
    )


def local_ids(spec: TableSpec, row_ids: np.ndarray) -> np.ndarray:
    """Returns row ids as the engine counts them, -1 as it is: the same array, but of a slice. Ids are not checked."""
    return np.where(row_ids < 0, row_ids, row_ids - spec.row_start) if spec.row_start else row_ids


def table_ids(spec: TableSpec, local: np.ndarray) -> np.ndarray:
    """Returns the table's own row ids of those of an engine: what `local_ids` undoes."""
    return np.where(local < 0, local, local + spec.row_start) if spec.row_start else local


def local_rows(
    spec: TableSpec, row_ids: np.ndarray, within: tuple[int, int] | None
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Returns row ids, copied, and a range of them as a slice's engine counts them; refuses ids of other slices."""
    ids = row_ids.copy()
    if within is None:
        refuse_outside(spec, ids)
        return local_ids(spec, ids), None
    return local_ids(spec, ids), (within[0] - spec.row_start, within[1] - spec.row_start)


def checked_keys(spec: TableSpec, keys: np.ndarray) -> np.ndarray:
    """Checks keys; returns a copy of them, contiguous, as the engine takes them."""
    keys = checked_ids(keys, "keys").copy()
    if not spec.orders:
        raise ValueError(
            f"table {spec.name}: rows {spec.row_start} to {spec.row_end} of {spec.num_rows} begin or end inside a "
            "head, or in too many of them, so that no key has its rows here; read them by row id: rows(row_ids)"
        )
    if keys.ndim != 2 or keys.shape[1] != len(spec.orders):
        raise ValueError(
            f"table {spec.name}: keys are {list(keys.shape)}, expected [N, {len(spec.orders)}]: one for each order"
        )
    outside = kernels.find_out_of_range(keys, spec.num_rows if spec.is_plain else KEYS_END)
    if outside >= 0:
        bad = keys.reshape(-1)[outside]
        if bad < -1:
            raise ValueError(f"table {spec.name}: key {bad} is below -1; keys are 0 to 2^63 - 1, or -1 for zero rows")
        raise ValueError(f"table {spec.name}: key {bad} is outside its {spec.num_rows} rows")
    if spec.is_slice and spec.is_plain:
        refuse_outside(spec, keys)
        keys = local_ids(spec, keys)
    return keys


def checked_ids(ids: np.ndarray, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype != np.int64:
        raise TypeError(f"{what} are {ids.dtype}, expected int64; convert them: {what}.astype(numpy.int64)")
    return ids


def checked_out(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=np.uint8)
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8:
        found = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(f"out is {found}, expected a NumPy array of uint8 (of a tensor: tensor.numpy())")
    if out.shape != shape:
        raise ValueError(f"out is {list(out.shape)}, the rows are {list(shape)}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; give a buffer that can be written")
    return out


def checked_range(within: tuple[int, int], spec: TableSpec) -> tuple[int, int]:
    try:
        start, end = map(operator.index, within)
    except (TypeError, ValueError):
        raise TypeError(f"within is {within!r}, expected two ints: (start, end), a range of row ids") from None
    if not spec.row_start <= start <= end <= spec.row_end:
        what = "this slice's" if spec.is_slice else "its"
        raise ValueError(
            f"table {spec.name}: within is {start} to {end}, expected a range of {what} rows, {spec.row_start} to "
            f"{spec.row_end}"
        )
    return start, end


def check_sources(sources: np.ndarray, shape: tuple[int, ...]) -> None:
    if not isinstance(sources, np.ndarray) or sources.dtype != np.uint8:
        raise TypeError(
            f"sources is {getattr(sources, 'dtype', type(sources).__name__)}, expected a NumPy array of uint8"
        )
    if sources.shape != shape or not (sources.flags.c_contiguous and sources.flags.writeable):
        raise ValueError(
            f"sources is {list(sources.shape)}, expected {list(shape)}, one for each key, contiguous and writable"
        )


def check_entries(spec: TableSpec, order_index: np.ndarray, keys: np.ndarray) -> None:
    """Raises `ValueError` unless single keys, int64 [M], and the places of their orders, [M], are the table's."""
    if spec.is_plain:
        raise ValueError(f"table {spec.name} is a plain embedding, whose keys are row ids: use submit_rows")
    if order_index.size and not 0 <= order_index.min() <= order_index.max() < len(spec.orders):
        raise ValueError(f"table {spec.name}: an order index is outside its {len(spec.orders)} orders")
    if (outside := kernels.find_out_of_range(keys, KEYS_END)) >= 0:
        raise ValueError(f"table {spec.name}: key {keys[outside]} is outside -1 to 2^63 - 1")
