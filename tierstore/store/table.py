"""One table of an open store: checks what callers give, and hands it to the engine that answers.

Input: keys or row ids, a buffer for the rows perhaps. Output: rows. Errors: `TypeError` and `ValueError` for arrays of
other types, shapes and ranges than the table has. Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kernels
from ..spec import TableSpec
from ..tiers.engine import Engine, in_one_version

KEYS_END = 1 << 63


class Table:
    """One table of an open store, which it keeps open. Lookups may come from any number of threads at once."""

    def __init__(self, engine: Engine, index: int, spec: TableSpec, opened: object = None) -> None:
        """opened: what closes the store when it is dropped."""
        self.index = index
        self._opened = opened
        self._spec = spec
        self._rows_shape = (spec.num_heads, spec.row_bytes)
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        """Sends lookups through `engine` from now on."""
        self._engine = engine
        self._try_lookup = engine.try_lookup

    def __repr__(self) -> str:
        spec = self._spec
        return (
            f"<tierstore.Table {spec.name}: {spec.num_rows} rows of {spec.row_bytes} bytes, orders {list(spec.orders)}>"
        )

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            f"table {self._spec.name} of an open store cannot be pickled, as starting a process by spawn or forkserver "
            f"does; open the store in each worker, or start workers by fork, which share its memory"
        )

    @property
    def spec(self) -> TableSpec:
        """What the table is: rows, codec, address map, fingerprint. Frozen."""
        return self._spec

    def lookup(
        self,
        keys: np.ndarray,
        out: np.ndarray | None = None,
        sources: np.ndarray | None = None,  # not keyword-only, which would cost the shortest lookup 3 % of its time
        timeout_s: float | None = None,
    ) -> np.ndarray:
        """Looks up the rows of keys, on the caller's thread. Blocks on the disk for what no tier holds.

        A signal handler that raises ends it.

        Args:
            keys: int64 [N, O], any strides; key -1 gives zero rows. They may lie where out does.
            out: uint8 [N, O * H, row_bytes], any strides, filled and returned; None: a new array.
            sources: uint8 [N, O], contiguous; filled with what answered each key, an index into `kernels.SOURCES`.
            timeout_s: the longest that it waits; None: as long as the disk answers.

        Returns:
            The rows, uint8 [N, O * H, row_bytes].

        Raises:
            TypeError: keys are not int64, out is not uint8.
            ValueError: a wrong shape, keys below -1.
            CorruptPageError: a row cannot be read as it was built.
            StoreNotReadyError: the store is closed.
            TimeoutError: timeout_s is over. After any error out is undefined, and nothing is written to it any more (by
                `connect` over gRPC, an answer on its way still is).
        """
        if sources is None and timeout_s is None:
            rows = out
            if rows is None and isinstance(keys, np.ndarray) and keys.ndim == 2:
                rows = np.empty((keys.shape[0], *self._rows_shape), dtype=np.uint8)
            # Nearly always all; what follows would be felt in the shortest lookup.
            if self._try_lookup(self.index, keys, rows) and rows is not None:
                return rows
        # Something is out of the ordinary: arguments to refuse or to copy, a closed store, a limit.
        keys, out = self.checked(keys, out)
        if sources is not None:
            _check_sources(sources, keys.shape)
        flat = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
        self._engine.lookup(self.index, keys, flat, sources, timeout_s)
        if flat is not out:
            out[...] = flat
        return out

    def explain(self, keys: np.ndarray) -> np.ndarray:
        """Returns what would answer each key now: int64 [N, O] -> str [N, O]. Looks nothing up and counts nothing.

        "hbm": a GPU's memory; "static" and "recency": the dram tier; "resident": a table that it holds whole; "record":
        one NVMe read of the placement file; "pages": NVMe reads of pages; "none": key -1. Raises like `lookup`.
        """
        return np.array(kernels.SOURCES)[self.locate(keys)]

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Returns what `explain` does, as uint8 [N, O]: places in `kernels.SOURCES`."""
        keys, _ = self.checked(keys, None)
        sources = np.empty(keys.shape, dtype=np.uint8)
        self._engine.locate(self.index, keys, sources)
        return sources

    def rows(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns rows by row id: int64 [...] -> uint8 [..., row_bytes]; row id -1 gives a zero row.

        Where the last axis holds all row ids of a token ([..., O * H]), tokens whose ids belong together go through the
        caches by their keys, which the ids give back; other ids are read one by one. Blocks and raises like `lookup`.
        """
        spec = self._spec
        row_ids = _checked_ids(row_ids, "row_ids").copy()  # ours: what is checked is what is read
        outside = kernels.find_out_of_range(row_ids, spec.num_rows)
        if outside >= 0:
            bad = row_ids.reshape(-1)[outside]
            raise ValueError(f"table {spec.name}: row id {bad} is outside -1 to {spec.num_rows - 1}")
        out = _checked_out(out, (*row_ids.shape, spec.row_bytes))
        flat = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
        # Whole tokens and single rows are two lookups: swapped between them, the store would answer from two versions.
        in_one_version(self._engine, lambda: self._gather_rows(row_ids, flat), f"table {spec.name}")
        if flat is not out:
            out[...] = flat
        return out

    def _gather_rows(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Answers `rows`: whole tokens by their keys, other ids one by one."""
        spec = self._spec
        flat_ids, flat_out = row_ids.reshape(-1), out.reshape(-1, spec.row_bytes)
        whole = np.zeros(0, dtype=bool)
        of_tokens = spec.is_plain or (row_ids.ndim > 0 and row_ids.shape[-1] == spec.num_heads)
        if of_tokens and self._engine.is_resident(self.index):
            self._engine.rows(self.index, flat_ids.reshape(-1, spec.num_heads), flat_out)
            return
        if of_tokens:
            keys, whole = spec.keys_of_row_ids(flat_ids.reshape(-1, spec.num_heads))
            tokens_out = out.reshape(-1, *self._rows_shape)
            if whole.all():
                self._engine.lookup(self.index, keys, tokens_out)
                return
            if whole.any():
                part = np.empty((int(whole.sum()), *self._rows_shape), dtype=np.uint8)
                self._engine.lookup(self.index, keys[whole], part)
                tokens_out[whole] = part
        if not whole.any():
            self._engine.rows(self.index, flat_ids, flat_out)
            return
        single = np.flatnonzero(~np.repeat(whole, spec.num_heads))
        part = np.empty((len(single), spec.row_bytes), dtype=np.uint8)
        self._engine.rows(self.index, flat_ids[single], part)
        flat_out[single] = part

    def checked(self, keys: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Checks a request; returns a copy of its keys, contiguous, and the buffer for its rows.

        The copy is what is checked and looked up, whatever another thread, or the output, does to the caller's keys.
        """
        spec = self.spec
        keys = _checked_ids(keys, "keys").copy()
        if keys.ndim != 2 or keys.shape[1] != len(spec.orders):
            raise ValueError(
                f"table {spec.name}: keys are {list(keys.shape)}, expected [N, {len(spec.orders)}]: one for each order"
            )
        outside = kernels.find_out_of_range(keys, spec.num_rows if spec.is_plain else KEYS_END)
        if outside >= 0:
            bad = keys.reshape(-1)[outside]
            if bad < -1:
                raise ValueError(
                    f"table {spec.name}: key {bad} is below -1; keys are 0 to 2^63 - 1, or -1 for zero rows"
                )
            raise ValueError(f"table {spec.name}: key {bad} is outside its {spec.num_rows} rows")
        out = _checked_out(out, (len(keys), spec.num_heads, spec.row_bytes))
        return keys, out


def _checked_ids(ids: np.ndarray, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype != np.int64:
        raise TypeError(f"{what} are {ids.dtype}, expected int64; convert them: {what}.astype(numpy.int64)")
    return ids


def _checked_out(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
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


def _check_sources(sources: np.ndarray, shape: tuple[int, ...]) -> None:
    if not isinstance(sources, np.ndarray) or sources.dtype != np.uint8:
        raise TypeError(
            f"sources is {getattr(sources, 'dtype', type(sources).__name__)}, expected a NumPy array of uint8"
        )
    if sources.shape != shape or not (sources.flags.c_contiguous and sources.flags.writeable):
        raise ValueError(
            f"sources is {list(sources.shape)}, expected {list(shape)}, one for each key, contiguous and writable"
        )
