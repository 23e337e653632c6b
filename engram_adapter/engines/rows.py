"""The rows of one engine layer: reads start when the row ids are known, and are taken when the layer needs them.

Input: row ids of a step's tokens, on any device. Output: stored bytes in a buffer that stays where it is, so that a
captured graph may read it. Errors: what lookups raise; `TimeoutError` after `WAIT_S`.

Shapes: T tokens of a step, C row ids of a token (orders times heads).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tierstore.errors import TierStoreError
from tierstore.store.store import Store, Ticket

logger = logging.getLogger("tierstore")

WAIT_S = 60.0  # the longest a step waits for its rows; reads of a dying disk can take tens of seconds


@dataclass
class RowCounters:
    """What a layer has taken: steps, tokens and rows, and for how long it waited for them."""

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    wait_ns: int = 0


class EngineRows:
    """One table as an engine's layer sees it. One thread at a time: the engine's worker.

    Attributes:
        stages: Whether steps are better started before the engine's forward, where `start` may wait for a GPU.
        is_staged: Whether the step that comes was started so.
        on_rows: Called with the rows that `finish` returns, before it does.
    """

    stages = True
    on_rows: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self, store: Store, name: str, tokens_max: int, device: torch.device, within: tuple[int, int] | None = None
    ) -> None:
        """Makes the buffers; reads nothing.

        Args:
            store: The open store, held as long as this lives.
            name: The table's.
            tokens_max: Tokens of the largest step.
            device: Where the layer wants the rows. If it is a GPU, the host's buffers are page-locked.
            within: First row id and end of this rank's part; others give zero rows. None: the whole table. Ids that
                lie outside of the table, as padded tokens carry, give zero rows too.
        """
        self.store, self.table = store, store[name]
        spec = self.table.spec
        self.tokens_max, self.device = tokens_max, device
        self.within = (0, spec.num_rows) if within is None else within
        self.counters = RowCounters()
        shape = (tokens_max, spec.num_heads, spec.row_bytes)
        self._on_gpu = device.type != "cpu"
        self._host = torch.zeros(shape, dtype=torch.uint8, device="cpu", pin_memory=self._on_gpu)
        self._array = self._host.numpy()
        self._copied: Any = None  # an event: the GPU has read the host's buffer
        self._ids: torch.Tensor | None = None
        self._rows = self._host
        if self._on_gpu:
            self._ids = torch.empty(shape[:2], dtype=torch.int64, device="cpu", pin_memory=True)
            self._rows = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.is_staged = False
        self._ticket: Ticket | None = None
        self._tokens = 0

    @property
    def rows(self) -> torch.Tensor:
        """The buffer that `finish` fills, uint8 [tokens_max, C, row_bytes] on the device, at one address for ever."""
        return self._rows

    @property
    def is_started(self) -> bool:
        """Whether a step's rows are under way that `finish` has not taken."""
        return self._ticket is not None

    def start(self, row_ids: torch.Tensor) -> None:
        """Starts to read the rows of a step; what memory holds is copied before this returns.

        Of ids on a GPU, this waits until they are computed. A step before that nobody took is dropped.

        Args:
            row_ids: Integers [T, C], any strides, on any device.

        Raises:
            ValueError: Of another shape, or more tokens than `tokens_max`.
        """
        tokens = row_ids.shape[0]
        if row_ids.ndim != 2 or row_ids.shape[1] != self._rows.shape[1] or tokens > self.tokens_max:
            raise ValueError(
                f"table {self.table.spec.name}: row ids of a step are {list(row_ids.shape)}, expected up to "
                f"[{self.tokens_max}, {self._rows.shape[1]}]"
            )
        self._drop()
        ids = self._host_ids(row_ids)
        if self._copied is not None:  # long done, since the ids are of a later step
            self._copied.synchronize()
        self._ticket = self.table.submit_rows(ids, self._array[:tokens], within=self.within)
        self._tokens = tokens

    def finish(self) -> torch.Tensor:
        """Waits for the rows of the step that was started; returns them, uint8 [T, C, row_bytes] on the device.

        They lie in the front of `rows`, until the next `finish`. A GPU's copy is in order on its current stream.
        Without a step that was started, returns no rows.
        """
        ticket, tokens = self._ticket, self._tokens
        if ticket is None:
            return self._rows[:0]
        begun = time.perf_counter_ns()
        self._wait(ticket)
        counters = self.counters
        counters.wait_ns += time.perf_counter_ns() - begun
        counters.steps += 1
        counters.tokens += tokens
        counters.rows += tokens * self._rows.shape[1]
        rows = self._rows[:tokens]
        if self._on_gpu:
            rows.copy_(self._host[:tokens], non_blocking=True)
            if self._copied is None:
                self._copied = torch.cuda.Event()
            self._copied.record()
        if self.on_rows is not None:
            self.on_rows(rows)
        return rows

    def stage(self, row_ids: torch.Tensor) -> None:
        """Does what `start` does, before the engine's forward, which then takes these rows whatever ids it gives."""
        self.start(row_ids)
        self.is_staged = True

    def start_in_forward(self, row_ids: torch.Tensor) -> None:
        """Does what `start` does, unless the step was staged, or a graph is being captured, which reads `rows`."""
        if not self.is_staged and not _is_capturing(self._rows):
            self.start(row_ids)

    def finish_in_forward(self) -> None:
        """Does what `finish` does, unless a graph is being captured: when it replays, the rows are in place."""
        if not _is_capturing(self._rows):
            self.finish()
            self.is_staged = False

    def check(self) -> None:
        """Raises what went wrong in earlier steps; of reads by the host, nothing that `finish` has not raised."""

    def stats(self) -> dict[str, int]:
        """Returns the counters as a dict."""
        return asdict(self.counters)

    def _drop(self) -> None:
        """Waits for a step that nobody took: its reads still write to the buffer. What they raise is nobody's now."""
        ticket = self._ticket
        if ticket is None:
            return
        try:
            self._wait(ticket)
        except (TierStoreError, OSError) as error:
            if not ticket.done():
                raise
            logger.warning("table %s: rows of a step that nobody took: %s", self.table.spec.name, error)

    def _wait(self, ticket: Ticket) -> None:
        """Waits for a step's reads. The ticket is forgotten once they have ended, and kept if they have not: they would
        write another step's rows."""
        try:
            ticket.wait(WAIT_S)
        finally:
            if ticket.done():
                self._ticket = None

    def _host_ids(self, row_ids: torch.Tensor) -> np.ndarray:
        """Returns row ids as int64 on the host; of a GPU's, by way of page-locked memory."""
        if not row_ids.is_cuda:
            ids: np.ndarray = (row_ids if row_ids.dtype == torch.int64 else row_ids.to(torch.int64)).numpy()
            return ids
        assert self._ids is not None, "row ids on a GPU, rows for the CPU"
        pinned = self._ids[: row_ids.shape[0]]
        pinned.copy_(row_ids, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        array: np.ndarray = pinned.numpy()
        return array


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
