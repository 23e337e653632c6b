"""The recorder: what a running store is asked for, as a sampled trace of keys.

Input: the lookups that an engine has done. Output: a key trace, written by a thread. Errors: none for lookups; `stop`
raises what went wrong when the trace was written.

Sampling is by key: all accesses of a sampled key are kept and none of the others, so that reuse distances can be scaled
up (SHARDS: Waldspurger et al., FAST 2015). Lossy under pressure: lookups that find the queue full are counted and not
recorded. Rows of resident tables that are asked for by row id have no keys and are not recorded. While no trace runs,
no engine is wrapped: lookups then cost what they did.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..formats.key_trace import KeyBlock, KeyTraceInfo, KeyTraceWriter, TracedTable
from ..spec import TableSpec
from ..tiers.engine import Engine, EngineWrapper, Pending, Request, RowRange
from .arguments import table_ids

logger = logging.getLogger("tierstore")

QUEUE_KEYS_MAX = 1 << 20  # waiting for the thread, 8 MiB; a single lookup of more is taken when nothing else waits
QUEUE_LOOKUPS_MAX = 1 << 14  # of which each takes a few hundred bytes more
GROUP_KEYS_MAX = 1 << 16  # sampled in one go: a few MiB
POLL_S = 0.05  # how long keys wait for the thread at most, unless half a queue comes earlier
STOP_WAIT_S = 300.0
ABANDON_WAIT_S = 5.0  # for what is being written; a disk that takes longer has the file go with its writer

# Multipliers and shifts of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def is_sampled(table: np.ndarray, order_index: np.ndarray, keys: np.ndarray, share: float) -> np.ndarray:
    """Returns bool [A]: whether each key, int64 [A], of a table, uint16 [A], and order, uint8 [A], is in the sample.

    Depends on nothing else, so that two traces of the same share sample the same keys.
    About `share` of all keys are in it.
    """
    if share >= 1:
        return np.ones(len(keys), dtype=bool)
    salt = (table.astype(np.uint64) << np.uint64(8)) + order_index + np.uint64(1)
    mixed = keys.astype(np.uint64) + salt * _GOLDEN  # sums and products wrap round
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(int(share * 2**64))


_Lookup = tuple[int, int, np.ndarray]  # number of the lookup, table's index, keys [N, O], our own copy


class Recorder:
    """Writes the key trace of one store in a thread of its own.
    `record` may come from any thread and never blocks on it."""

    def __init__(self, path: str | os.PathLike[str], tables: Sequence[TracedTable], share: float) -> None:
        """Prepares: there is neither file nor thread before `start`."""
        self.path = path
        self._share = share
        self._traced = tables
        self._num_orders = [len(table.orders) for table in tables]
        self._writer: KeyTraceWriter | None = None
        # Guards `_queue`, `_queued_keys`, `_num_batches`, `_num_dropped`, `_stopped`.
        self._lock = threading.Lock()
        self._queue: list[_Lookup] = []
        self._queued_keys = 0
        self._num_batches = 0
        self._num_dropped = 0
        self._stopped = False
        self._abandoned = False
        self._wake = threading.Event()
        self._error: Exception | None = None  # set by the thread only
        self._thread = threading.Thread(target=self._run, name="tierstore-recorder", daemon=True)

    def start(self) -> None:
        """Starts the file and the thread. Raises what `KeyTraceWriter` raises, `RuntimeError` (no thread);
        then `abandon`."""
        self._writer = KeyTraceWriter(self.path, tables=self._traced, sample_rate=self._share)
        self._thread.start()

    def abandon(self) -> None:
        """Ends the thread, if there is one, and removes what was written. After an error of `start` or `stop`."""
        with self._lock:
            self._stopped = self._abandoned = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(ABANDON_WAIT_S)
        if self._writer is not None and not self._thread.is_alive():
            self._writer.abandon()

    def record(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Records one lookup: (table's index, keys int64 [N, O]) of each table. Copies the keys;
        does not block on the disk."""
        num_keys = 0
        for _, keys in requests:
            num_keys += keys.size
        with self._lock:
            if self._stopped:
                return
            batch = self._num_batches
            self._num_batches += 1
            queue = self._queue
            if queue and (self._queued_keys + num_keys > QUEUE_KEYS_MAX or len(queue) >= QUEUE_LOOKUPS_MAX):
                self._num_dropped += sum(int((keys >= 0).sum()) for _, keys in requests)
                return
            for table, keys in requests:
                queue.append((batch, table, keys.copy()))
            self._queued_keys += num_keys
            half_full = 2 * self._queued_keys >= QUEUE_KEYS_MAX or 2 * len(queue) >= QUEUE_LOOKUPS_MAX
        if half_full and not self._wake.is_set():
            self._wake.set()

    def tokens_of(self, index: int, keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Returns single pairs, int64 [M] and int32 [M], as keys of whole tokens, int64 [M, O], that have no others."""
        num_orders = self._num_orders[index]
        tokens = np.full((len(keys), num_orders), -1, dtype=np.int64)
        tokens[np.arange(len(keys)), pairs % num_orders] = keys
        return tokens

    def stop(self) -> KeyTraceInfo:
        """Writes what is queued, ends the trace and the thread. Blocks on the disk.

        Raises what the disk raised while it was written, and then there is no trace;
        `TimeoutError` after STOP_WAIT_S.
        """
        with self._lock:
            self._stopped = True
        self._wake.set()
        self._thread.join(STOP_WAIT_S)
        if self._thread.is_alive():
            raise TimeoutError(
                f"{self.path}: the trace was not written within {STOP_WAIT_S} s; the disk does not answer"
            )
        assert self._writer is not None
        with self._writer:
            if self._error is not None:
                raise self._error
            return self._writer.finish(num_batches=self._num_batches, num_dropped=self._num_dropped)

    def _run(self) -> None:
        """The thread: takes what is queued, samples it, and adds it to the trace."""
        stopped = False
        while not stopped:
            self._wake.wait(POLL_S)
            self._wake.clear()
            with self._lock:
                stopped = self._stopped
                lookups, self._queue, self._queued_keys = self._queue, [], 0
            if not lookups or self._error is not None:
                continue
            try:
                assert self._writer is not None
                for group in _groups(lookups):
                    if self._abandoned:
                        break
                    self._writer.add(_sampled(group, self._share))
            except Exception as error:  # lookups must go on; `stop` raises it
                self._error = error
                logger.error("the trace %s cannot be written (%s): no more is recorded; stop it", self.path, error)


def _groups(lookups: Sequence[_Lookup]) -> Iterator[list[_Lookup]]:
    """Yields lookups, large ones in parts, in groups of about GROUP_KEYS_MAX keys."""
    group: list[_Lookup] = []
    num_keys = 0
    for batch, table, keys in lookups:
        step = max(1, GROUP_KEYS_MAX // keys.shape[1])
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            group.append((batch, table, part))
            num_keys += part.size
            if num_keys >= GROUP_KEYS_MAX:
                yield group
                group, num_keys = [], 0
    if group:
        yield group


def _sampled(lookups: Sequence[_Lookup], share: float) -> KeyBlock:
    """Returns the accesses of lookups to sampled keys, in order; sentinels are left out."""
    batches, tables, parts = zip(*lookups, strict=True)
    sizes = [part.size for part in parts]
    keys = np.concatenate([part.reshape(-1) for part in parts])
    table = np.repeat(np.array(tables, dtype=np.uint16), sizes)
    batch = np.repeat(np.array(batches, dtype=np.int64), sizes)
    # Keys of a lookup are [N, O], orders innermost: the index within the lookup, modulo O.
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    num_orders = np.repeat([part.shape[1] for part in parts], sizes)
    order_index = ((np.arange(len(keys)) - starts) % num_orders).astype(np.uint8)
    kept = np.flatnonzero((keys >= 0) & is_sampled(table, order_index, keys, share))
    return KeyBlock(table[kept], order_index[kept], keys[kept], batch[kept])


class RecordingEngine(EngineWrapper):
    """An engine with a recorder beside it: every lookup by keys that it takes is recorded. See `Engine`."""

    def __init__(self, engine: Engine, recorder: Recorder, specs: Sequence[TableSpec]) -> None:
        """engine: does the work, and is there unchanged when the recording ends."""
        super().__init__(engine)
        self.engine, self.recorder, self._specs = engine, recorder, specs
        self._has_slices = any(spec.is_slice for spec in specs)
        self.try_lookup = self._try_lookup

    @property
    def device(self) -> Any:
        return self.engine.device

    def _try_lookup(self, index: int, keys: Any, out: Any) -> bool:
        done = self.engine.try_lookup(index, keys, out)
        if done:
            self._record([(index, keys)])
        return done

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.engine.lookup(index, keys, out, sources, timeout_s)
        self._record([(index, keys)])

    def submit(self, requests: Sequence[Request]) -> Pending | None:
        pending = self.engine.submit(requests)
        try:
            if requests:
                self._record([(index, keys) for index, keys, _ in requests])
            return pending
        except BaseException:  # nobody has the lookup
            if pending is not None:
                pending.cancel()
            raise

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        ids = row_ids.copy()
        self.engine.rows(index, ids, out, within, timeout_s)
        self._record_rows(index, ids, within)

    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        ids = row_ids.copy()
        pending = self.engine.submit_rows(index, ids, out, within)
        try:
            self._record_rows(index, ids, within)
            return pending
        except BaseException:  # nobody has the lookup
            if pending is not None:
                pending.cancel()
            raise

    def _record(self, lookups: Sequence[tuple[int, np.ndarray]]) -> None:
        """Records keys as callers know them: of a slice of a plain table, the table's own row ids."""
        if self._has_slices:
            specs = self._specs
            plain = [
                (index, table_ids(specs[index], keys) if specs[index].is_plain else keys) for index, keys in lookups
            ]
            lookups = [(index, keys) for index, keys in plain if specs[index].orders]
        if lookups:
            self.recorder.record(lookups)

    def _record_rows(self, index: int, row_ids: np.ndarray, within: RowRange | None) -> None:
        """Records the keys of the whole tokens among row ids."""
        spec = self._specs[index].local
        if self.engine.is_resident(index) or not (spec.is_plain or row_ids.shape[1:] == (spec.num_heads,)):
            return
        keys, is_whole = spec.keys_of_row_ids(row_ids.reshape(-1, spec.num_heads), within)
        if is_whole.any():
            self._record([(index, keys[is_whole])])

    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> Pending | None:
        pending = self.engine.submit_pairs(index, keys, pairs, out)
        try:
            self._record([(index, self.recorder.tokens_of(index, keys, pairs))])
            return pending
        except BaseException:  # nobody has the lookup
            if pending is not None:
                pending.cancel()
            raise
