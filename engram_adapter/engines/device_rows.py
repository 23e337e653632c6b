"""The rows of one engine layer, looked up by kernels in the engine's forward: launches only, so that graphs stay whole.

Input: row ids of a step's tokens, on the device. Output: stored bytes in a buffer that stays where it is. Errors: what
`Store.open_rows` raises; what went wrong in a step comes out of `check`, whose missing rows are 0xFF bytes.

Shapes: T tokens of a step, C row ids of a token (orders times heads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from tierstore.store.store import Store

from .gate import EngineMismatchError
from .rows import EngineRows, RowCounters
from .settings import EngineSettings


class DeviceEngineRows:
    """One table as an engine's layer sees it, with the interface of `EngineRows`. One thread: the engine's worker.

    Counters count launches, which a graph's replay makes without this process's Python.
    """

    stages = False
    is_staged = False
    on_rows: Callable[[torch.Tensor], None] | None = None  # as of `EngineRows`

    def __init__(
        self, store: Store, name: str, tokens_max: int, device: torch.device, within: tuple[int, int] | None = None
    ) -> None:
        """Takes all memory that lookups need. Arguments as of `EngineRows`.

        Raises:
            EngineMismatchError: The store's hbm tier is on another device.
            StoreNotReadyError, BudgetError, ConfigError: As `Store.open_rows`.
        """
        self.store, self.table = store, store[name]
        spec = self.table.spec
        self.tokens_max, self.device = tokens_max, device
        self.within = (0, spec.num_rows) if within is None else within
        self.counters = RowCounters()
        if store.device is not None and _place(store.device) != _place(device):
            raise EngineMismatchError(
                f"table {name}: the store's hbm tier is on {store.device}, the engine's layer on {device}; give each "
                f"rank its own GPU"
            )
        self._lookup = store.open_rows(name, tokens_max, within=self.within)
        self.rows = torch.zeros((tokens_max, spec.num_heads, spec.row_bytes), dtype=torch.uint8, device=device)
        # What finish launches reads the ids, which the engine may have used up by then.
        self._ids = torch.zeros((tokens_max, spec.num_heads), dtype=torch.int64, device=device)
        self._tokens = 0

    @property
    def is_started(self) -> bool:
        """Whether a step's rows are under way that `finish` has not taken."""
        return self._tokens > 0

    def start(self, row_ids: torch.Tensor) -> None:
        """Launches the first half of a step's lookup, on the current stream; row_ids: integers [T, C].

        Raises `ValueError` as `EngineRows.start`.
        """
        tokens = row_ids.shape[0]
        if row_ids.ndim != 2 or row_ids.shape[1] != self.rows.shape[1] or tokens > self.tokens_max:
            raise ValueError(
                f"table {self.table.spec.name}: row ids of a step are {list(row_ids.shape)}, expected up to "
                f"[{self.tokens_max}, {self.rows.shape[1]}]"
            )
        if not tokens:
            return
        ids = self._ids[:tokens]
        ids.copy_(row_ids)
        self._lookup.start(ids, self.rows[:tokens])
        self._tokens = tokens

    def finish(self) -> torch.Tensor:
        """Launches the second half, on the current stream; returns the step's rows, uint8 [T, C, row_bytes]."""
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._lookup.finish()
            self.counters.steps += 1
            self.counters.tokens += tokens
            self.counters.rows += tokens * self.rows.shape[1]
            if self.on_rows is not None:
                self.on_rows(self.rows[:tokens])
        return self.rows[:tokens]

    def stage(self, row_ids: torch.Tensor) -> None:
        """Does nothing: the forward launches the lookup."""

    def start_in_forward(self, row_ids: torch.Tensor) -> None:
        """Does what `start` does; a graph captures it."""
        self.start(row_ids)

    def finish_in_forward(self) -> None:
        """Does what `finish` does; a graph captures it."""
        self.finish()

    def check(self) -> None:
        """Raises what went wrong in a step that the device has done. Waits for none."""
        self._lookup.check()

    def stats(self) -> dict[str, int]:
        """Returns the counters as a dict."""
        return asdict(self.counters)


def rows_of(
    settings: EngineSettings,
    store: Store,
    name: str,
    tokens_max: int,
    device: torch.device,
    within: tuple[int, int] | None = None,
) -> EngineRows | DeviceEngineRows:
    """Returns a table's rows in the mode of the settings; arguments and errors as of the two classes."""
    kind = DeviceEngineRows if settings.mode == "device" else EngineRows
    return kind(store, name, tokens_max, device, within)


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0
