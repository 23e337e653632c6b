"""Lookups from the device: keys on the device in, values on the device out,
the host left out unless a tier below is needed.

Flows in: keys that a kernel has written to `keys`, or keys that the host knows. Flows out: values in the caller's
tensor. Two halves, so that reads go on while earlier layers run: `start` copies what slots and page-locked DRAM hold
and posts the rest in a mailbox, which a native thread serves; `finish` waits on the device for the answer, at most
WAIT_S, and puts the late entries in their places. Both only launch kernels, so that they may be captured in a CUDA
graph. Errors are the host's to raise: `check`. Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import numpy as np
import torch

from ... import kernels
from ...errors import ConfigError, StoreNotReadyError, TierStoreError
from ...kernels.gpu.await_answer import await_answer
from ...kernels.gpu.codecs import RowCodec
from ...kernels.gpu.gather import gather_entries
from ...kernels.gpu.lookup import lookup_entries
from ...kernels.gpu.misses import MissList, StepState, post_misses
from ...kernels.gpu.row_ids import row_ids_of_keys
from ...kernels.gpu.rows import gather_rows
from ...kernels.gpu.scatter import scatter_entries
from ...spec import TableSpec, codec_scale
from ..engine import Pending
from .device import is_capturing, spins_in
from .tier import HbmTier
from .times import DeviceTimes, LookupTimes

STATUS_CLOSED = 3  # kClosed of kernels/cpu/mailbox.h
WAIT_S = 60.0  # how long the device waits for the host, about
ANSWER_PAUSE_S = 1e-4  # between two looks whether the host has answered


class DeviceLookup:
    """Fixed buffers for lookups of up to `tokens_max` tokens of one table, one at a time,
    whichever threads they come from.

    outside: int64 [1] on the device, where the caller's kernel notes 1 + the place of a token id that has no keys;
    `start` takes it away, and `take_outside` sees it when the step is done. A captured graph uses these buffers: keep
    this while it lives.
    """

    @torch.inference_mode(False)  # or nobody could write to its tensors outside that mode
    def __init__(
        self,
        what: str,
        tier: HbmTier,
        engine: Any,
        mailboxes: kernels.MailboxServer,
        index: int,
        tokens_max: int,
        times: DeviceTimes,
    ) -> None:
        """engine: the one below the tier, which answers the mailbox. times: of the store's lookups from the device.
        Raises `BudgetError`: no page-locked memory is left.

        Not while a graph is captured: it would set the step's number back at each replay,
        and old answers were new ones.
        """
        if is_capturing(tier.device):
            raise ConfigError(
                f"{what}: a lookup's buffers cannot be made while a graph is captured; "
                "call with as many tokens once before"
            )
        self._what, self._tier, self._engine, self._mailboxes, self._index = what, tier, engine, mailboxes, index
        self._table = tier.tables[index]
        spec = self._table.spec
        self._num_orders = len(spec.orders)
        self.tokens_max = tokens_max
        pairs_max = tokens_max * self._num_orders
        self._codec = row_codec(spec)
        self._times = times
        self._timed: LookupTimes | None = None  # of what is started, if it is timed
        self.outside = torch.zeros(1, dtype=torch.int64, device=tier.device)
        if tier.row_addresses[index]:
            self._row_ids = torch.empty((tokens_max, spec.num_heads), dtype=torch.int64, device=tier.device)
            self._moduli, self._offsets = (
                torch.tensor(numbers, dtype=torch.int64, device=tier.device) for numbers in (spec.moduli, spec.offsets)
            )
        self._places = torch.full((tokens_max, self._num_orders), -1, dtype=torch.int32, device=tier.device)
        words = torch.zeros(7, dtype=torch.int64, device=tier.device)
        self._state = StepState(words[0:1], words[1:2], words[2:3], words[3:4], words[4:5], words[5:7])
        what_for = f"a lookup of {tokens_max} tokens of table {spec.name} from the device"
        self._block = tier.pinned.take(kernels.mailbox_bytes(pairs_max, spec.entry_bytes), what_for)
        keys_at = kernels.MAILBOX_STARTS["keys"]
        self._words = self._block[:keys_at].view(np.int64)
        pairs_at, entries_at = kernels.mailbox_pairs_start(pairs_max), kernels.mailbox_entries_start(pairs_max)
        self._pairs = self._block[pairs_at : pairs_at + 4 * pairs_max].view(np.int32)
        self._entries = self._block[entries_at : entries_at + pairs_max * spec.entry_bytes]
        address = self._block.ctypes.data
        self._address, self._entries_address = address, address + entries_at
        self._misses = MissList(self._state.count, address + keys_at, address + pairs_at, pairs_max)
        self._spins_max = spins_in(tier.device, WAIT_S)
        self._mailbox = mailboxes.add(index, self._block, pairs_max)
        self._lock = threading.RLock()  # of all launches; reentered by `finish`
        self._closed = False
        self._captured = self._started_in_capture = False  # ever, in a graph; and what is started now
        self._started: tuple[torch.Tensor, Pending | None, bool] | None = None
        self._reading: Pending | None = None  # what writes to the buffers, or did
        self._scattered = torch.cuda.Event() if tier.device.type == "cuda" else None

    def start(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """Launches the first half for keys on the device, int64 [n, O], n at most tokens_max; out: their values,
        [n, O * H, dim].

        Both contiguous; out of the table's float type. On the current stream. What a start before it began is finished
        first. Raises `StoreNotReadyError` where the store was closed.
        """
        with self._lock:
            self._end_started()
            self._end_reads()
            if self._scattered is not None and not self._notes_capture():
                torch.cuda.current_stream(self._tier.device).wait_event(self._scattered)
            self._timed = None if self._captured else self._times.begin()
            with self._half():
                self._start(keys, out)
            if self._started is None:  # nothing comes late
                self._end_timed()

    def _half(self) -> contextlib.AbstractContextManager[None]:
        """Around a half of a lookup that may be timed."""
        return contextlib.nullcontext() if self._timed is None else self._timed.half()

    def _end_timed(self) -> None:
        timed, self._timed = self._timed, None
        self._times.end(timed)

    def _start(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        num_tokens = self._checked(len(keys))
        values = self._flat(out, num_tokens)
        table = self._table
        by_row_id = self._tier.row_addresses[self._index] != 0
        with self._tier.lock:  # no version changes between what slots hold and what the host is asked for
            lookup_entries(
                keys, table.index, table.sources, self._codec, values, None if by_row_id else self._misses,
                table.counts, self._places[:num_tokens],
            )  # fmt: skip
            if by_row_id:
                self._gather_rows(keys, values)
            post_misses(self._state, self._address, self._misses.pairs_max, self.outside)
        if not by_row_id:  # nothing comes late
            self._started, self._started_in_capture = (values, None, False), is_capturing(self._tier.device)

    def start_known(self, keys: np.ndarray, out: torch.Tensor) -> None:
        """The same for keys that the host knows, int64 [n, O], n at most tokens_max: reads start before the first
        kernel does.

        Waits until the device has done with the buffers. `finish` then blocks until the reads have ended, and raises
        what they raise.
        """
        with self._lock:
            self._end_started()
            self._end_reads()
            if self._notes_capture():
                raise ConfigError(
                    f"{self._what}: ids of table {self._table.spec.name} that the host holds cannot be looked up in a "
                    f"captured graph, which would read the same rows at each replay; have them on {self._tier.device}"
                )
            if self._captured:  # a replay may be under way, of which no event tells
                self._tier.synchronize()
            elif self._scattered is not None:
                self._scattered.synchronize()
            self._end_answer()
            self._timed = None  # the engine below times its reads
            self._start_known(keys, out)

    def _start_known(self, keys: np.ndarray, out: torch.Tensor) -> None:
        num_tokens = self._checked(len(keys))
        values = self._flat(out, num_tokens)
        table = self._table
        with self._tier.lock:  # no epoch changes between the look at the index and the launch
            places = table.find(keys)
            by_row_id = self._tier.row_addresses[self._index] != 0
            missed = np.flatnonzero((places.reshape(-1) < 0) & (keys.reshape(-1) >= 0) & (not by_row_id))
            self._pairs[: len(missed)] = missed
            entries = self._entries[: len(missed) * table.entry_bytes].reshape(len(missed), table.entry_bytes)
            missed_keys = keys.reshape(-1)[missed]
            pending = self._engine.submit_pairs(self._index, missed_keys, self._pairs[: len(missed)], entries)
            self._reading = pending
            keys_there = torch.from_numpy(keys).to(self._tier.device)
            self._places[:num_tokens].copy_(torch.from_numpy(places.astype(np.int32)))
            gather_entries(self._places[:num_tokens], keys_there, table.sources, self._codec, values)
            if by_row_id:
                self._gather_rows(keys_there, values)
            table.count_known(keys, places)
        self._state.step.add_(1)
        self._state.posted.fill_(len(missed))
        self._started, self._started_in_capture = (values, pending, True), False

    def _end_started(self) -> None:
        """Finishes what was started before. Not in a captured graph,
        which would write to the values of then at each replay."""
        if self._started is not None and self._notes_capture() and not self._started_in_capture:
            raise ConfigError(
                f"{self._what}: a lookup of table {self._table.spec.name} was started before the graph's capture and "
                f"not finished; finish it first"
            )
        self.finish()

    def _notes_capture(self) -> bool:
        """Returns whether a graph is captured on the current stream;
        it is known from then on that one may be replayed."""
        capturing = is_capturing(self._tier.device)
        if capturing and not self._captured:
            self._captured, self._timed = True, None
            self._mailboxes.time(self._mailbox)  # replays are launched without us
        return capturing

    def _end_reads(self) -> None:
        """Waits for reads of known keys that somebody gave up: they write to the buffers until they have ended."""
        if self._reading is not None and not self._reading.done():
            with contextlib.suppress(TierStoreError, OSError):  # was for who gave them up
                self._reading.wait(WAIT_S)
            if not self._reading.done():
                raise TimeoutError(
                    f"{self._what}: reads of a lookup before this one, of table {self._table.spec.name}, have not "
                    f"ended within {WAIT_S:.0f} s more; the disk has stopped answering"
                )
        self._reading = None

    def _end_answer(self) -> None:
        """The same for a request of the device that it gave up: the host writes to the buffers until it has
        answered."""
        asked, answered = (kernels.MAILBOX_STARTS[name] // 8 for name in ("requested", "answered"))
        deadline = time.monotonic() + WAIT_S
        while self._words[asked] != self._words[answered]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._what}: step {self._words[asked]} of table {self._table.spec.name}, which the device gave "
                    f"up, has not been answered within {WAIT_S:.0f} s more; the disk has stopped answering"
                )
            time.sleep(ANSWER_PAUSE_S)

    def _gather_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Of a table that DRAM holds whole, where the device reads it: what neither slots nor records hold,
        by row id."""
        row_ids = self._row_ids[: len(keys)]
        row_ids_of_keys(keys, self._moduli, self._offsets, row_ids)
        address = self._tier.row_addresses[self._index]
        rows = values.view(row_ids.numel(), values.shape[-1] // (1 if values.ndim == 3 else self._codec.rows_per_entry))
        gather_rows(row_ids.view(-1), address, self._table.spec.num_rows, self._codec, rows, self._places[: len(keys)])

    def finish(self) -> None:
        """Launches the second half of what was started, if anything: the device waits for the host's answer, then has
        the values.

        On the current stream, which must come after that of `start`. Of known keys it blocks, and raises as
        `Store.submit` does. Raises `StoreNotReadyError` where the store was closed.
        """
        with self._lock:
            self._check_open()
            if self._started is not None:
                if self._timed is not None and self._notes_capture():
                    self._timed = None
                with self._half():
                    self._finish()
                self._end_timed()

    def _finish(self) -> None:
        assert self._started is not None
        values, pending, known = self._started
        self._started = None
        if known:
            if pending is not None:
                pending.wait(WAIT_S)
        else:
            await_answer(self._state, self._address, self._spins_max)
        scatter_entries(
            self._state, self._misses.pairs_address, self._entries_address, self._codec, self._misses.pairs_max, values
        )
        if self._scattered is not None and not self._notes_capture():
            self._scattered.record(torch.cuda.current_stream(self._tier.device))

    def close(self, timeout_s: float) -> bool:
        """Refuses launches from now on, and forgets what was started; returns whether no launch is under way any more.

        Waits for one that is. The device may still be in what was launched.
        """
        if not self._lock.acquire(timeout=timeout_s):
            return False
        try:
            self._forget()
        finally:
            self._lock.release()
        return True

    def disown(self) -> None:
        """The same in a forked child, which has neither the device nor the threads that might hold the lock."""
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._closed, self._started = True, None
        self._block = self._words = self._pairs = self._entries = np.empty(0, dtype=np.uint8)

    def _check_open(self) -> None:
        """Raises `StoreNotReadyError` where the memory that kernels would use is there no more."""
        if self._closed:
            raise StoreNotReadyError(
                f"{self._what} is closed, as it is when nobody holds it, or this process was forked from the one that "
                f"has the device; open it again"
            )

    def check(self) -> None:
        """Raises what went wrong in a step that the device has done: it left NaN in place of late values. Does not wait
        for any.

        `TimeoutError`: the host did not answer. What the host's reads raised: as for `Store.submit`. Token ids outside
        the vocabulary are the caller's to name: `take_outside`. `StoreNotReadyError`: the store was closed.
        """
        with self._lock:
            self._check_open()
            failed, timed_out = self._take("failed"), self._take("timed_out")
        if not failed:
            return
        spec, fault = self._table.spec, self._mailboxes.fault(self._mailbox)
        if fault is not None:
            self._engine.check(fault)
        if timed_out:
            raise TimeoutError(
                f"{self._what}: the device waited {WAIT_S:.0f} s, in step {timed_out}, for entries of table "
                f"{spec.name}; the disk or the host has stopped answering"
            )
        if self._words[kernels.MAILBOX_STARTS["status"] // 8] == STATUS_CLOSED:
            self._engine.check(False)
        raise TierStoreError(
            f"{self._what}: the host did not understand what the device asked for in step {failed} of table "
            f"{spec.name}: its memory was written by somebody else; look for a kernel that writes out of bounds, "
            "and open the store again"
        )

    def take_outside(self) -> int:
        """Returns 1 + the place of a token id outside the vocabulary in a step that the device has done; once; 0: none
        was."""
        with self._lock:
            self._check_open()
            return self._take("invalid_token_position")

    def _take(self, name: str) -> int:
        """Returns a word that the device writes where something is wrong, and clears it."""
        at = kernels.MAILBOX_STARTS[name] // 8
        word = int(self._words[at])
        if word:
            self._words[at] = 0
        return word

    def steps_without_miss(self) -> int:
        """Returns how many steps asked the host for nothing; it counts the others. Blocks on the device."""
        return int(self._state.batch_counts[1])

    def num_asked(self) -> int:
        """Returns how often the device has asked the host for what a step missed."""
        self._check_open()
        return int(self._mailboxes.served(self._mailbox))

    def _checked(self, num_tokens: int) -> int:
        if num_tokens > self.tokens_max:
            raise ValueError(f"{num_tokens} tokens for a lookup of at most {self.tokens_max}; look up fewer at once")
        self._check_open()
        return num_tokens

    def _flat(self, out: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Returns out by pairs, as the kernels take it."""
        num_pairs = num_tokens * self._num_orders
        if self._codec.kind == "bytes":
            return out.view(torch.uint8).view(num_pairs, self._table.entry_bytes)
        return out.view(num_pairs, self._codec.rows_per_entry, self._codec.dim)


def row_codec(spec: TableSpec) -> RowCodec:
    """Returns how the kernels make values of a table's rows: fp8 is decoded, other rows are values as they lie."""
    base = spec.codec.partition("*")[0]
    kind = base if base.startswith("fp8") else "bytes"
    return RowCodec(kind, spec.rows_per_key, spec.row_bytes, spec.dim, codec_scale(spec.codec))
