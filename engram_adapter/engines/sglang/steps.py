"""The rows of one layer, step after step: started when the row ids are known, taken when the layer needs them.

Input: row ids. Output: rows as stored, on the device. Errors: what lookups raise. One thread at a time.

Shapes: T tokens of a step, C row ids of a token.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

import torch
from sglang.srt.runtime_context import get_schedule

from ..rows import EngineRows, RowCounters
from .layer import LayerTable
from .metrics import metrics_of

TOKENS_MAX = 8192  # of a step that kernels look up at once, in parts if it has more; of any, if prefill has no chunks
_device_steps: WeakSet[DeviceSteps] = WeakSet()  # all of this process; changed while a model is built, by one thread


class Steps(Protocol):
    """What `steps_of` returns."""

    def start(self, row_ids: torch.Tensor, device: torch.device | None = None) -> None:
        """Starts to read the rows of [T, C] row ids; they come out on `device`, by default where the ids are."""

    def finish(self) -> torch.Tensor:
        """Returns the rows that were started, uint8 [T, C, row_bytes], until the next `finish`."""


def steps_of(table: LayerTable, within: tuple[int, int] | None = None) -> Steps:
    """Returns a layer's steps, in the mode of the settings; within: first row id and end of those wanted."""
    return HostSteps(table, within) if table.settings.mode == "host" else DeviceSteps(table, within)


def chunk_tokens() -> int:
    """Returns how many tokens SGLang prefills at once."""
    chunk = get_schedule().chunked_prefill_size
    return TOKENS_MAX if chunk is None or chunk <= 0 else int(chunk)


def check_steps() -> None:
    """Raises what went wrong in steps of mode `device` that are done, whose missing rows were NaN. Waits for none."""
    for steps in tuple(_device_steps):
        steps.check()


class HostSteps:
    """Rows that this process reads and copies to the device: `EngineRows`, anew for a step that is larger than a chunk.

    The buffers are there before SGLang takes what memory is left for its KV cache.
    """

    def __init__(self, table: LayerTable, within: tuple[int, int] | None = None) -> None:
        """Takes the buffers of a chunk's tokens. table: the layer's; within: as of `EngineRows`."""
        self._table, self._within = table, within
        self.counters = RowCounters()
        self._rows = self._new_rows(chunk_tokens(), table.device)
        self._metrics = metrics_of(table.table.spec.name, table.store)

    def start(self, row_ids: torch.Tensor, device: torch.device | None = None) -> None:
        """Starts to read the rows of [T, C] row ids; they come out on `device`, by default where the ids are."""
        tokens, device = row_ids.shape[0], row_ids.device if device is None else device
        rows = self._rows
        if rows.tokens_max < tokens or rows.device != device:
            self._rows = rows = self._new_rows(max(rows.tokens_max, 1 << (tokens - 1).bit_length()), device)
        rows.start(row_ids)

    def finish(self) -> torch.Tensor:
        """Waits for the rows that were started: uint8 [T, C, row_bytes], until the next `finish`."""
        rows = self._rows.finish()
        if self._metrics is not None:
            self._metrics.publish(self.counters)
        return rows

    def _new_rows(self, tokens_max: int, device: torch.device) -> EngineRows:
        with torch.inference_mode(False):  # buffers that any later step may fill
            rows = EngineRows(self._table.store, self._table.table.spec.name, tokens_max, device, self._within)
        rows.counters = self.counters
        return rows


class DeviceSteps:
    """Rows that kernels look up in the hbm tier and in page-locked memory: launches alone, which graphs may capture."""

    def __init__(self, table: LayerTable, within: tuple[int, int] | None = None) -> None:
        """Takes the buffers, before anything is captured. Raises `BudgetError` if they do not fit."""
        tokens_max = min(chunk_tokens(), TOKENS_MAX)
        self._lookup = table.store.open_rows(table.table.spec.name, tokens_max, within=within)
        self._row_bytes = table.table.spec.row_bytes
        self._rows: torch.Tensor | None = None
        self._row_ids: torch.Tensor | None = None
        _device_steps.add(self)

    def check(self) -> None:
        """Raises what went wrong in a step that the device has done. Waits for none."""
        self._lookup.check()

    def start(self, row_ids: torch.Tensor, device: torch.device | None = None) -> None:
        """Launches the first half on the current stream; row ids lie on the device."""
        assert device is None or device == row_ids.device, "row ids of a device lookup lie on the device"
        self._row_ids = row_ids  # held, because what finish launches reads them
        self._rows = torch.empty((*row_ids.shape, self._row_bytes), dtype=torch.uint8, device=row_ids.device)
        self._lookup.start(row_ids, self._rows)

    def finish(self) -> torch.Tensor:
        """Launches the second half on the current stream, which must come after that of `start`."""
        assert self._rows is not None, "no step was started"
        self._lookup.finish()
        self._row_ids = None
        if self._rows.is_cuda:
            self._rows.record_stream(torch.cuda.current_stream())  # it may be of another stream, where it was started
        return self._rows
