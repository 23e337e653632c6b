"""What `tierstore bench serve` measures on: two versions of a table, the working set, and a daemon to start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..pairs import Options
from ..stores import MadeStore
from .launcher import Served

CLIENTS_MAX = 80  # of the daemon


@dataclass(frozen=True)
class Setting:
    """What is measured on. second: another version; keys: int64 [N, O], the working set; work: a folder for sockets."""

    made: MadeStore
    second: MadeStore
    keys: np.ndarray
    dram_bytes: int
    work: Path
    options: Options

    def serve(self, name: str, *options: str) -> Served:
        """Starts a daemon of the store, without replans but those that are asked for."""
        return Served(
            self.made.path, self.work / f"{name}.sock", self.dram_bytes,
            "--replan", "off", "--clients", str(CLIENTS_MAX), *options,
        )  # fmt: skip

    def save(self, keys: np.ndarray) -> Path:
        """Writes keys where client processes find them."""
        np.save(self.work / "keys.npy", keys)
        return self.work / "keys.npy"
