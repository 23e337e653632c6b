"""Lookups from the host in a store with an hbm tier: what slots hold is copied from the device, the rest comes from the
engine below.

Input: what the engine contract says. Output: the same rows. Errors: those of the contract. Shapes: N tokens, O orders,
H rows per key.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ... import kernels
from ..engine import EngineWrapper, HostEngine, Pending, Request, RowRange, in_one_version
from .quiet import QuietTimes
from .row_hits import take_row_hits
from .tier import HbmTier

_HBM_SOURCE = kernels.SOURCES.index("hbm")


class HostLookups(EngineWrapper):
    """The lookups of an `HbmEngine`."""

    def __init__(self, what: str, engine: HostEngine, tier: HbmTier) -> None:
        """As of `HbmEngine`."""
        super().__init__(engine)
        self._what = what
        self._host, self._tier = engine, tier  # the first is `_engine`, with what only an engine of this host has
        self._has_device = True
        self._quiet = QuietTimes(what)
        self._counts_lock = threading.Lock()  # guards `_hits`, those of lookups from the host
        self._hits = [np.zeros(len(layout.spec.orders), dtype=np.int64) for layout in engine.layouts]

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        # Of two versions, what slots held would be the old one's rows, and the rest the new one's.
        in_one_version(self._engine, lambda: self._lookup(index, keys, out, sources, timeout_s), self._what)

    def _lookup(
        self, index: int, keys: np.ndarray, out: np.ndarray, sources: np.ndarray | None, timeout_s: float | None
    ) -> None:
        rest, hits, entries = self._take_hits(index, keys)
        self._engine.lookup(index, rest, out, sources, timeout_s)
        _put(out, hits, entries)
        if sources is not None and hits is not None:
            sources[hits] = _HBM_SOURCE

    def submit(self, requests: Sequence[Request]) -> Pending | None:
        return in_one_version(self._engine, lambda: self._submit(requests), self._what)

    def _submit(self, requests: Sequence[Request]) -> Pending | None:
        taken = [self._take_hits(index, keys) for index, keys, _ in requests]
        rests = [(index, rest, out) for (index, _, out), (rest, _, _) in zip(requests, taken, strict=True)]

        def put() -> None:
            for (_, _, out), (_, hits, entries) in zip(requests, taken, strict=True):
                _put(out, hits, entries)

        return _started(self._engine.submit(rests), put)

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        spec, ids = self._host.layouts[index].spec, row_ids.copy()  # ours: looked at more than once

        def look_up() -> None:
            hits = take_row_hits(spec, ids, within, partial(self._take_hits, index))
            self._engine.rows(index, hits.rest, out, within, timeout_s)
            hits.put(out)

        in_one_version(self._engine, look_up, self._what)

    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        spec, ids = self._host.layouts[index].spec, row_ids.copy()

        def start() -> Pending | None:
            hits = take_row_hits(spec, ids, within, partial(self._take_hits, index))
            return _started(self._engine.submit_rows(index, hits.rest, out, within), partial(hits.put, out))

        return in_one_version(self._engine, start, self._what)

    def _take_hits(self, index: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns the keys for the engine below, and what slots hold: which, bool [N, O], and their entries; None:
        nothing."""
        hits = entries = None
        with self._quiet.work_unless_quiet() as may_copy:  # else the engine below reads them from the placement file
            if may_copy and self._has_device:
                hits, entries = self._tier.take_hits(index, keys)
        if hits is None or entries is None or not len(entries):
            return keys, None, None
        with self._counts_lock:
            self._hits[index] += hits.sum(axis=0)
        return np.where(hits, -1, keys), hits, entries

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._engine.locate(index, keys, sources)
        if self._has_device:
            sources[self._tier.in_slots(index, keys)] = _HBM_SOURCE


def _put(out: np.ndarray, hits: np.ndarray | None, entries: np.ndarray | None) -> None:
    """Copies what slots held to its places."""
    if hits is not None and entries is not None:
        out.reshape(hits.size, entries.shape[1])[hits.reshape(-1)] = entries


def _started(pending: Pending | None, put: Callable[[], None]) -> Pending | None:
    """Puts what slots held over what the engine below has written, which is all that it does not read."""
    try:
        put()
        return pending
    except BaseException:  # nobody has the lookup
        if pending is not None:
            pending.cancel()
        raise
