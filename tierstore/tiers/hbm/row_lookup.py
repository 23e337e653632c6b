"""Lookups by row id from the device: what an inference engine's embedding asks, launches only.

Input: row ids of whole tokens, as the engine has hashed them, on the device. Output: rows as stored, in the caller's
buffer of any strides. Errors: as of `DeviceLookup`.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .lookup import DeviceLookup
from .row_launches import RowLaunches


class DeviceRows(DeviceLookup):
    """Fixed buffers for lookups by row id in one table, one at a time, from any threads. See `DeviceLookup`.

    A batch of more tokens than the buffers hold goes in parts, all but the first in `finish`.
    """

    _launches_type = RowLaunches
    _launches: RowLaunches

    def __init__(self, *arguments: Any, within: tuple[int, int]) -> None:
        """arguments: of `DeviceLookup`; within: (start, end), the wanted row ids."""
        super().__init__(*arguments)
        self._within = within
        self._rest: tuple[torch.Tensor, torch.Tensor] | None = None  # of the batch that was started; under `_lock`

    def start(self, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Launches the first half, on the current stream. A lookup that was started before is finished first.

        Args:
            row_ids: int64 [N, O * H] on the device, any strides, all row ids of each token. Leave them alone until what
                `finish` launches has run.
            out: uint8 [N, O * H, row_bytes] on the device; the bytes of a row are side by side, other strides are any.

        Raises:
            ValueError: Tensors that do not fit.
            StoreNotReadyError: The store was closed.
        """
        with self._lock:
            self._launches.check(row_ids, out)
            self._end_started()
            self._start_part(row_ids, out)

    def _start_part(self, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        tokens_max = self.tokens_max if out.is_contiguous() else self._launches.strided_tokens_max
        ids, part, within = row_ids[:tokens_max], out[:tokens_max], self._within
        values = self._launches.values_of(part)
        look_up = partial(self._launches.look_up_rows, ids, within, values)
        self._start(look_up, values, partial(self._launches.put, ids, within, part))
        self._rest = (row_ids[tokens_max:], out[tokens_max:]) if len(row_ids) > tokens_max else None

    def finish(self) -> None:
        """Launches the second half, on the current stream, which must come after that of `start`.

        The device waits there for the host's answer, if a row was missed. Raises `StoreNotReadyError` if the store was
        closed.
        """
        with self._lock:
            super().finish()
            while self._rest is not None:
                rest, self._rest = self._rest, None
                self._start_part(*rest)
                super().finish()

    def look_up(self, row_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Launches `start` and `finish`."""
        with self._lock:
            self.start(row_ids, out)
            self.finish()
