"""A step's rows as values, for layers that decode nothing themselves.

Input: stored bytes, as `EngineRows` and `DeviceEngineRows` take them. Output: values at one address, which a captured
graph may read. Errors: none of its own.
"""

from __future__ import annotations

import torch

from ..codecs import decode_rows
from .device_rows import DeviceEngineRows
from .rows import EngineRows


class DecodedRows:
    """The values of a layer's rows: decoded when a step's rows are taken, on the device and stream of the rows.

    Attributes:
        values: [tokens_max, C, dim], always at one address; the front of it is the last step's.
    """

    def __init__(self, rows: EngineRows | DeviceEngineRows, dtype: torch.dtype) -> None:
        """Makes the buffer, and has `rows` fill it from now on."""
        spec = rows.table.spec
        self._codec, self._dim = spec.codec, spec.dim
        shape = (rows.tokens_max, spec.num_heads, spec.dim)
        self.values = torch.zeros(shape, dtype=dtype, device=rows.rows.device)
        rows.on_rows = self.take

    def take(self, stored: torch.Tensor) -> None:
        """Decodes a step's rows, uint8 [T, C, row_bytes]. Of a GPU's, launches only."""
        if len(stored):
            self.values[: len(stored)].copy_(decode_rows(stored, self._codec, self._dim))
