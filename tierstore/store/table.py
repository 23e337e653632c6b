"""One table of an open store: checks what callers give, and hands it to the engine that answers.

Input: keys or row ids, a buffer for the rows perhaps. Output: rows, or a ticket for them. Errors: `TypeError` and
`ValueError` for arrays of other types, shapes and ranges than the table has. Shapes: N tokens, O orders, H rows per
key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kernels
from ..spec import TableSpec
from ..tiers.engine import Engine
from .arguments import (
    check_entries,
    check_sources,
    checked_keys,
    checked_out,
    checked_range,
    checked_rows,
    local_rows,
    refuse_outside,
)
from .ticket import Ticket, handed_out


class Table:
    """One table of an open store, which it keeps open. Lookups may come from any number of threads at once."""

    def __init__(self, engine: Engine, index: int, spec: TableSpec, opened: object = None) -> None:
        """opened: what closes the store when it is dropped."""
        self.index = index
        self._opened = opened
        self._spec = spec
        self._rows_shape = (spec.num_heads, spec.row_bytes)
        # A slice's keys are not the engine's if they are row ids, or if it has none.
        self._takes_keys = not (spec.is_slice and spec.local.is_plain)
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        """Sends lookups through `engine` from now on."""
        self._engine = engine
        self._try_lookup = engine.try_lookup if self._takes_keys else _never

    def __repr__(self) -> str:
        spec = self._spec
        rows = f"{_rows_text(spec)} of {spec.row_bytes} bytes"
        return f"<tierstore.Table {spec.name}: {rows}, orders {list(spec.orders)}>"

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
            check_sources(sources, keys.shape)
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

    def rows(
        self,
        row_ids: np.ndarray,
        out: np.ndarray | None = None,
        *,
        within: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> np.ndarray:
        """Returns rows by row id, as an inference engine asks for them. Blocks on the disk for what no tier holds.

        If the last axis holds all row ids of a token ([..., O * H]), tokens whose ids belong together go through the
        caches by their keys, which the ids give back. Other ids are read one by one.

        Args:
            row_ids: int64 [...], any strides; row id -1 gives a zero row. They may lie where out does.
            out: uint8 [..., row_bytes], any strides, filled and returned; None: a new array.
            within: (start, end), a range of row ids. Ids outside of it give zero rows, whatever they are: those of
                padded tokens, or of another rank's rows. Give all ids of a token nevertheless: the key needs them.
                None: every id but -1 must be the table's.
            timeout_s: the longest that it waits; None: as long as the disk answers.

        Returns:
            The rows, uint8 [..., row_bytes].

        Raises:
            TypeError: row_ids are not int64, out is not uint8.
            ValueError: an id outside the table, an out of another shape, a range outside the table. All else as
                `lookup`; after any error out is undefined.
        """
        within = None if within is None else checked_range(within, self._spec)
        ids, out, flat = checked_rows(self._spec, row_ids, out)
        if self._spec.is_slice:
            ids, within = local_rows(self._spec, ids, within)
        try:
            self._engine.rows(self.index, ids, flat, within, timeout_s)
        except ValueError:
            refuse_outside(self._spec, ids)
            raise
        if flat is not out and not np.may_share_memory(flat, out):
            out[...] = flat.reshape(out.shape)
        return out

    def submit_rows(self, row_ids: np.ndarray, out: np.ndarray, *, within: tuple[int, int] | None = None) -> Ticket:
        """Starts what `rows` does, and returns a ticket to wait for.

        What memory holds is copied before this returns, and the reads of the rest are in flight; a thread of the store
        finishes them, whether anybody waits or not. The lookup holds out until its rows are there; leave out alone
        until `Ticket.wait` returns. row_ids are not looked at any more once this has returned. If the leading axes of
        an out of four or more do not join into one stride, this waits for the rows. Otherwise as `Store.submit`:
        wrong arguments raise here, failed reads in `wait`.

        Args:
            row_ids: int64 [...], any strides.
            out: uint8 [..., row_bytes], any strides.
            within: As of `rows`.

        Raises:
            TypeError, ValueError: As `rows`; there is no out.
        """
        if out is None:
            raise TypeError(f"submit_rows: table {self._spec.name} has no out; give a uint8 buffer for its rows")
        within = None if within is None else checked_range(within, self._spec)
        ids, out, flat = checked_rows(self._spec, row_ids, out)
        if self._spec.is_slice:
            ids, within = local_rows(self._spec, ids, within)
        try:
            pending = self._engine.submit_rows(self.index, ids, flat, within)
        except ValueError:
            refuse_outside(self._spec, ids)
            raise
        if flat is out or np.may_share_memory(flat, out):
            return handed_out(pending)
        try:
            if pending is not None:
                pending.wait(None)
            out[...] = flat.reshape(out.shape)
            return handed_out(pending)
        except BaseException:  # nobody has the ticket
            if pending is not None:
                pending.cancel()
            raise

    def submit_entries(self, order_index: np.ndarray, keys: np.ndarray, out: np.ndarray) -> Ticket:
        """Starts a lookup of single keys: out[i] is the entry, the rows, of keys[i] in the order of that index.

        Equal keys are read once, as those of a batch are. keys and order_index are not looked at any more once this has
        returned; otherwise as `Store.submit`. A store reached by gRPC cannot do this: `ConfigError`.

        Args:
            order_index: int32 [M], contiguous; places in `spec.orders`.
            keys: int64 [M], contiguous; key -1 gives zero rows.
            out: uint8 [M, rows_per_key * row_bytes], contiguous.

        Raises:
            TypeError, ValueError: Arrays of another form, an order or a key that the table does not have.
        """
        check_entries(self._spec, order_index, keys)
        return handed_out(self._engine.submit_pairs(self.index, keys, order_index, out))

    def checked(self, keys: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Checks a request; returns a copy of its keys, contiguous, and the buffer for its rows.

        The copy is what is checked and looked up, whatever another thread, or the output, does to the caller's keys.
        """
        keys = checked_keys(self._spec, keys)
        return keys, checked_out(out, (len(keys), *self._rows_shape))


def _never(_index: int, _keys: Any, _out: Any) -> bool:
    """What takes no lookup on the short way."""
    return False


def _rows_text(spec: TableSpec) -> str:
    rows = f"rows {spec.row_start} to {spec.row_end} of {spec.num_rows}, each"
    return rows if spec.is_slice else f"{spec.num_rows} rows"
