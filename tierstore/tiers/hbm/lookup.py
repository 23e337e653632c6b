"""Lookups from the device: keys on the device in, values on the device out,
the host left out unless a tier below is needed.

Input: keys that a kernel has written on the device, or keys that the host knows. Output: values in the caller's tensor.
Errors: what went wrong in a step is the host's to raise, in `check`.

A lookup has two halves, so that reads go on while earlier layers run. `start` copies what slots and page-locked DRAM
hold and posts the rest in a mailbox, which a native thread serves. `finish` has the device wait for the answer, at most
WAIT_S, and puts those entries in their places. Both only launch kernels, so that they can be captured in a CUDA graph.

`launches`: the kernels and their buffers · `stream_order`: whose turn it is · `mailbox`: requests to the host, and
their faults · `known_reads`: reads that the host starts · `times`: how long it took. Shapes: N tokens, O orders, H rows
per key.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ... import kernels
from ...errors import ConfigError, StoreNotReadyError
from ..engine import Pending
from .device import is_capturing
from .known_reads import KnownReads
from .launches import LookupLaunches
from .mailbox import WAIT_S, Mailbox
from .stream_order import StreamOrder
from .tier import HbmTier
from .times import DeviceTimes, LookupTimer


def _nothing() -> None:
    """Nothing comes behind."""


class _Started(NamedTuple):
    """The lookup that was started and not finished.

    values: where its entries go; pending: the host's reads for known keys, if there are any; then: launches what comes
    behind the last entry, in the same turn.
    """

    values: torch.Tensor
    pending: Pending | None
    is_known: bool
    in_capture: bool
    then: Callable[[], None] = _nothing


class DeviceLookup:
    """Fixed buffers for lookups of one table, one at a time, from any threads.

    A captured graph uses these buffers: keep this while the graph lives.

    Attributes:
        tokens_max: The most tokens of one lookup.
        invalid_token_position: int64 [1] on the device. The caller's kernel notes there 1 + the position of a token id
            without keys, `start` takes it away, and `take_invalid_token_position` returns it when the step is done.
    """

    _launches_type: type[LookupLaunches] = LookupLaunches

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
        """Makes the buffers.

        Args:
            what, index: The store and the table, as errors and engines call them.
            tier, engine: The hbm tier, and the engine below it, whose reads answer the mailbox.
            mailboxes: Serves the mailbox, of tokens_max tokens.
            times: Of all lookups of the store from the device.

        Raises:
            BudgetError: There is not enough page-locked memory left.
            ConfigError: A graph is being captured: each of its replays would set the step's number back to 0, and an
                old answer of the host would pass for a new one.
        """
        if is_capturing(tier.device):
            raise ConfigError(
                f"{what}: a lookup's buffers cannot be made while a graph is captured; "
                "call with as many tokens once before"
            )
        self._what, self._tier, self._engine = what, tier, engine
        self._table = tier.tables[index]
        self.tokens_max = tokens_max
        self._timer = LookupTimer(times)
        self._mailbox = Mailbox(what, tier, mailboxes, index, tokens_max, self._launches_type.by_row_id)
        self._launches = self._launches_type(tier, index, tokens_max, self._mailbox)
        self.invalid_token_position = self._launches.invalid_token_position
        self._reads = KnownReads(what, self._table.spec.name, engine, index, self._mailbox)
        self._order = StreamOrder(tier, self._begin_graph)
        self._lock = threading.RLock()  # guards all above and below; reentrant, because `start` calls `finish`
        self._closed = False
        self._started: _Started | None = None

    def start(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """Launches the first half of a lookup, on the current stream. One that was started before is finished first.
        Raises `StoreNotReadyError` if the store was closed.

        Args:
            keys: int64 [N, O] on the device, contiguous, N at most tokens_max.
            out: The values, [N, O * H, dim] of the table's float type, contiguous.
        """
        with self._lock:
            values = self._launches.flat(len(keys), out)
            self._start(lambda: self._launches.look_up(keys, values), values, _nothing)

    def _start(self, look_up: Callable[[], None], values: torch.Tensor, then: Callable[[], None]) -> None:
        """Launches the first half, look_up; then: see `_Started`. The lock is held."""
        self._end_started()
        self._reads.end()
        self._order.wait_on_stream()
        self._timer.begin(is_timed=not self._order.was_captured)
        with self._timer.half():
            with self._tier.lock:  # no version changes between what slots hold and what the host is asked for
                look_up()
            if not self._launches.asks_host:  # there is no second half
                then()
                self._order.end()
        if self._launches.asks_host:
            self._started = _Started(values, None, False, is_capturing(self._tier.device), then)
        else:
            self._timer.end()

    def start_known(self, keys: np.ndarray, out: torch.Tensor) -> None:
        """The same for keys that the host knows, int64 [N, O]: reads start before the first kernel does.

        Blocks until the device has done with the buffers. `finish` then blocks until the reads have ended.
        Raises `ConfigError` while a graph is captured.
        """
        with self._lock:
            self._end_started()
            self._reads.end()
            if self._order.notes_capture():
                raise ConfigError(
                    f"{self._what}: ids of table {self._table.spec.name} that the host holds cannot be looked up in a "
                    f"captured graph, which would read the same rows at each replay; have them on {self._tier.device}"
                )
            self._order.wait_on_host()
            self._mailbox.wait_for_answer()
            self._timer.begin(is_timed=False)  # the engine below times its reads
            self._start_known(keys, out)

    def _start_known(self, keys: np.ndarray, out: torch.Tensor) -> None:
        values, flat_keys = self._launches.flat(len(keys), out), keys.reshape(-1)
        with self._tier.lock:  # no epoch changes between the look at the index and the launch
            places = self._table.find(keys)
            missed = np.flatnonzero((places.reshape(-1) < 0) & (flat_keys >= 0) & self._launches.asks_host)
            pending = self._reads.begin(flat_keys, missed)  # before the kernels: the disk works while they are launched
            self._launches.gather(keys, places, len(missed), values)
            self._table.count_known(keys, places)
        self._started = _Started(values, pending, is_known=True, in_capture=False)

    def finish(self) -> None:
        """Launches the second half of what was started, if anything was: the device waits for the host's answer.

        On the current stream, which must come after that of `start`. Of known keys it blocks, and raises as
        `Store.submit` does. Raises `StoreNotReadyError` if the store was closed."""
        with self._lock:
            self._check_open()
            started, self._started = self._started, None
            if started is None:
                return
            if self._timer.is_timed and self._order.notes_capture():
                self._timer.forget()
            with self._timer.half():
                if not started.is_known:
                    self._launches.await_answer()
                elif started.pending is not None:
                    started.pending.wait(WAIT_S)
                self._launches.scatter(started.values)
                started.then()
                self._order.end()
            self._timer.end()

    def _end_started(self) -> None:
        """Finishes what was started before. Not in a captured graph, whose replays would write to the old values."""
        if self._started is not None and self._order.notes_capture() and not self._started.in_capture:
            raise ConfigError(
                f"{self._what}: a lookup of table {self._table.spec.name} was started before the graph's capture and "
                f"not finished; finish it first"
            )
        self.finish()

    def _begin_graph(self) -> None:
        """A launch is captured for the first time: replays are launched without us, so that the server times them."""
        self._timer.forget()
        self._mailbox.time_replays()

    def close(self, timeout_s: float) -> bool:
        """Refuses launches from now on, and forgets what was started. Blocks while one is under way, timeout_s at most.
        Returns False if one still is. The device may still be in what was launched."""
        if not self._lock.acquire(timeout=timeout_s):
            return False
        try:
            self._forget()
        finally:
            self._lock.release()
        return True

    def abandon_in_child(self) -> None:
        """The same in a forked child, which has neither the device nor the threads that might hold the lock."""
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._closed, self._started = True, None
        self._mailbox.release()

    def check(self) -> None:
        """Raises what went wrong in a step that the device has done, whose missing values are NaN. Waits for none.
        Token ids outside the vocabulary are the caller's to name. Raises `TimeoutError` if the host did not answer,
        `StoreNotReadyError` if the store was closed, and what the host's reads raised, as `Store.submit` does.
        """
        with self._lock:
            self._check_open()
            self._mailbox.check()

    def take_invalid_token_position(self) -> int:
        """Returns 1 + the position of an id outside the vocabulary, of a step that is done, once; 0: there was none."""
        with self._lock:
            self._check_open()
            return self._mailbox.take("invalid_token_position")

    def steps_without_miss(self) -> int:
        """Returns how many steps asked the host for nothing; it counts the others. Blocks on the device."""
        return self._launches.steps_without_miss()

    def num_requests(self) -> int:
        """Returns how often the device has asked the host for what a step missed."""
        self._check_open()
        return self._mailbox.num_requests()

    def _check_open(self) -> None:
        """Raises `StoreNotReadyError` if the memory that kernels would use is gone."""
        if self._closed:
            raise StoreNotReadyError(
                f"{self._what} is closed, as it is when nobody holds it, or this process was forked from the one that "
                f"has the device; open it again"
            )
