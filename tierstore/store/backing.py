"""What a store stands on: tables, the engine that answers, and what was opened for it.

Input: none; each way of having a store implements this. Output: what `Store` needs and nothing more, so that a store
opened in process (`embedded`), attached to a daemon, or reached over a network is the same `Store` to its user. Errors:
see `Store`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..spec import TableSpec
from ..tiers.engine import Engine


class Backing(ABC):
    """Tables, an engine, and their upkeep. The store that it was given to closes the engine first, then this."""

    name: str  # what errors and `repr` call it: a path or an address
    specs: Sequence[TableSpec]  # in the engine's order
    attachments: Mapping[str, bytes]  # records that the adapter put in the catalog at build time
    engine: Engine

    @property
    def build(self) -> str:
        """The digest of all that decides the rows, hexadecimal; empty if it is not known."""
        return ""

    @property
    def common_build(self) -> str:
        """A digest, hexadecimal, that all slices of one store share at one version; empty if it is not known."""
        return ""

    def placed_keys(self, index: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG002
        """See `Store.placed_keys`; index: the table's."""
        return np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64)

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Returns what `stats` shows beside counters: "io", "memory", "placement"."""

    def change_hbm(self, placement: int | None) -> int:
        """Brings another placement's first entries into the hbm tier; returns its epoch. See `Store.change_hbm`."""
        raise ConfigError(f"{self.name}: there is no hbm tier to bring epoch {placement} to; open the store with hbm=")

    @abstractmethod
    def close(self) -> None:
        """Gives files and the like back; the engine is closed. Closing twice is harmless."""
