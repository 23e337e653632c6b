"""What a verification finds: counts, faults, damaged files; and how one of its parts has the others give up.

Input: what each part found. Output: one report. Errors: none.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

CHUNK_BYTES = 4 << 20
FAULTS_PER_SHARD_MAX = 20


@dataclass
class VerifyReport:
    """What was checked and what is wrong; the store is sound if `faults` is empty.

    Faults of the store as a whole come first, rows that differ last: those mostly follow from the others.

    Attributes:
        damaged_shards: of each shard whose file is not the one that was built, by (table, index): its faults.
        damaged_placements: of each damaged placement, by epoch: its faults.
        repaired: what `verify(repair=True)` mended, a line each. Its faults are no longer in `faults`.
        remedy: the command that mends what can be mended; empty if there is nothing of the kind.
        blocks_checked: of the files of a checkpoint, of a store in place.
    """

    pages_checked: int = 0
    rows_compared: int = 0
    shards_checked: int = 0
    entries_checked: int = 0
    faults: list[str] = field(default_factory=list)
    damaged_shards: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    damaged_placements: dict[int, list[str]] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    remedy: str = ""
    blocks_checked: int = 0

    def add(self, other: VerifyReport) -> None:
        """Adds another part's findings to this one."""
        self.pages_checked += other.pages_checked
        self.blocks_checked += other.blocks_checked
        self.rows_compared += other.rows_compared
        self.shards_checked += other.shards_checked
        self.entries_checked += other.entries_checked
        self.faults += other.faults
        self.damaged_shards |= other.damaged_shards
        self.damaged_placements |= other.damaged_placements
        self.repaired += other.repaired

    def sort_faults(self) -> None:
        """Puts faults in a fixed order, rows that differ last."""
        self.faults.sort(key=lambda fault: (fault.startswith("row "), fault))


class Stopped(Exception):
    """Another part failed, or the caller was interrupted. Nobody sees it: `run_parts` raises that first cause."""


def check_not_stopped(stop: threading.Event) -> None:
    """Raises `Stopped` if the part that calls it is to give up."""
    if stop.is_set():
        raise Stopped
