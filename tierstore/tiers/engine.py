"""The lookup path of an open store, as a contract: what memory holds is copied, the rest is read from checked pages.

Flows in: keys or row ids, already checked, and the caller's buffer. Flows out: rows in that buffer, or a named error.
Two implementations: `native` (C++, the one that serves) and `portable` (NumPy, where there is no compiler; also its
oracle). Shapes: N tokens, O orders, H rows per key, R rows, P pages. `index` is the table's place in the catalog.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import StoreNotReadyError
from ..layout import TableLayout

READ_WAIT_S = 300.0  # the longest that anything waits for the disk or for staging
SLICE_S = 0.1  # the longest that a native wait keeps Python from handling signals

Request = tuple[int, np.ndarray, np.ndarray]  # index, keys [N, O], out [N, O * H, row_bytes]


class Pending(Protocol):
    """A lookup in flight. Its owner calls `detach`, or keeps it until it has ended; dropped before,
    it may be cancelled."""

    def done(self) -> bool:
        """Whether it has ended."""

    def wait(self, timeout_s: float | None) -> None:
        """Blocks until it has ended; raises what it raised, or `TimeoutError` after timeout_s."""

    def cancel(self) -> None:
        """Gives the lookup up: nothing is written to its buffers afterwards, if the engine is of this host."""

    def detach(self) -> None:
        """Lets the lookup end by itself when this is dropped."""


def in_slices(act: Callable[[float], bool], seconds: float) -> bool:
    """Calls act(at most SLICE_S) until it returns True, or seconds are over: Python handles signals in between."""
    deadline = time.monotonic() + seconds
    while not act(max(0.0, min(SLICE_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True


class Engine(ABC):
    """One store's tiers behind one door. Any number of threads may call; nothing waits longer than READ_WAIT_S."""

    io: str  # how pages are read, as `stats` shows it
    version: int = 0  # of the store that answers; attached, it grows between two lookups, and is -1 while it does
    device: Any = None  # the torch.device of its hbm tier, None where there is none
    bad_pages: dict[tuple[int, int], str]  # of resident tables: (index, page number) that could not be loaded -> why

    # (index, keys, out), unchecked -> None where the lookup was done; False where nothing was done, since arguments or
    # state need a closer look; else a fault for `check`. An attribute,
    # so that the shortest lookups pass through one call less.
    try_lookup: Callable[[int, Any, Any], Any]

    @abstractmethod
    def check(self, outcome: Any) -> None:
        """Raises the error that an outcome of `try_lookup` stands for; None is none."""

    @abstractmethod
    def lookup(self, index: int, keys: np.ndarray, out: np.ndarray) -> None:
        """Fills out, uint8 [N, O * H, row_bytes], from keys, int64 [N, O], both contiguous and checked."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> Pending | None:
        """Starts a lookup in several tables; None where memory held all. It holds the buffers until it ends.

        After an exception nothing is written to them, if the engine is of this host.
        """

    @abstractmethod
    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> Pending | None:
        """Starts a lookup of single pairs of one table: entry i of out, uint8 [M, entry_bytes],
        is that of keys[i], int64 [M].

        pairs: int32 [M], not below 0: the place of a key in a batch [N, O], flat, so that pairs[i] % O is the index of
        its order. All contiguous and checked. Otherwise as `submit`.
        """

    @abstractmethod
    def is_resident(self, index: int) -> bool:
        """Whether memory holds a whole table, by row id."""

    def subscribe(self, renewed: Callable[[], Any]) -> None:  # noqa: B027
        """Calls `renewed`, a method, while its object lives, whenever `try_lookup` has become another.
        Few engines do."""

    @abstractmethod
    def rows(self, index: int, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Fills out, uint8 [R, row_bytes], from row_ids, int64 [R], -1 for zero rows: from DRAM if resident,
        else pages.

        They count as rows. Of a resident table, row_ids may be those of whole tokens, [N, O * H]; they count as keys.
        """

    @abstractmethod
    def read_pages(self, index: int, page_numbers: np.ndarray, out: np.ndarray) -> None:
        """Reads pages, int64 [P] ascending without repeats, into out, uint8 [P, page_bytes], and checks each."""

    @abstractmethod
    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        """Writes what would answer keys, int64 [N, O], as uint8 [N, O]: places in `kernels.SOURCES`. Counts nothing."""

    def open_lookup(self, index: int, tokens_max: int) -> Any:
        """Returns a `DeviceLookup` of up to so many tokens of a table, which lives until the engine is closed.

        It may be one of fewer tokens (`tokens_max`): a quarter of the page-locked memory is the most that one gets.
        Raises `BudgetError` where its buffers do not fit, `StoreNotReadyError`: there is no device, or not any more.
        """
        raise StoreNotReadyError(f"table {index} of {tokens_max} tokens: this store has no hbm tier; open it with hbm=")

    def change_entries(self, file: Any) -> list[np.ndarray]:
        """Brings the first entries of a `PlacementFile` into the hbm tier. Raises as `open_lookup`, and `FormatError`.

        Returns of each table the numbers of damaged records, which were left out.
        """
        raise StoreNotReadyError(f"{file.path}: this store has no hbm tier; open it with hbm=")

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Returns totals, and under "tables" three lists for each: keys by order found in DRAM, those of them in the
        static set, and read from NVMe; where there is an hbm tier, under "hbm" a list for each:
        keys by order found there."""

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """Refuses new lookups, waits for those under way, frees threads; returns whether all ended in time."""

    @abstractmethod
    def before_fork(self) -> None:
        """Takes the locks that a forked child must find in order."""

    @abstractmethod
    def after_fork(self, *, child: bool) -> None:
        """Gives them back, on either side; in the child, makes threads, rings and staging anew."""


class HostEngine(Engine):
    """An engine on which an hbm tier can stand: its work is a `kernels.Engine`'s, which serves mailboxes too."""

    layouts: Sequence[TableLayout]  # of the tables, in the catalog's order
    native: Any  # the `kernels.Engine` that answers now
