"""The lookup path of an open store, as a contract: what memory holds is copied, the rest is read from checked pages.

Input: keys or row ids, already checked, and the caller's buffer. Output: rows in that buffer. Errors: named ones, of
which the closed store's (`StoreNotReadyError`) and the damaged page's (`CorruptPageError`) are every engine's.

`native` is the engine of this host's tiers, in C++; `attached.engine` is that of a daemon's tiers; `remote.engine` asks
another host. `hbm.engine` stands on the first two, and `store.recorder` on any. Shapes: N tokens, O orders, H rows per
key, M pairs, R rows. `index` is the table's index in the catalog.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from .. import kernels
from ..errors import StoreNotReadyError
from ..layout import TableLayout
from .overlay import Patches

READ_WAIT_S = 300.0  # the longest that anything waits for the disk or for staging
SLICE_S = 0.1  # the longest that a native wait keeps Python from handling signals
VERSION_TRIES_MAX = 16
VERSION_PAUSE_S = 0.001

Request = tuple[int, np.ndarray, np.ndarray]  # index, keys [N, O], out [N, O * H, row_bytes]
RowRange = tuple[int, int]  # row ids from the first on, without the second
_T = TypeVar("_T")


@runtime_checkable
class Pending(Protocol):
    """A lookup in flight. Its owner calls `detach`, or keeps it until it has ended; dropped before, it may be
    cancelled."""

    def done(self) -> bool:
        """Returns whether it has ended."""

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
    """One store's tiers. Any number of threads may call; nothing waits longer than READ_WAIT_S for the disk."""

    io: str  # how pages are read, as `stats` shows it
    version: int = 0  # of the store that answers; attached, it grows between two lookups, and is -1 while it changes
    device: Any = None  # the torch.device of its hbm tier; None if it has none, or not any more
    bad_pages: dict[tuple[int, int], str]  # of resident tables: (index, page number) that could not be loaded -> why

    # (index, keys, out), unchecked: True if the lookup was done; False if nothing was done, because the arguments are
    # not of the plain form or the engine cannot answer this way: check them, then call `lookup`. Raises what a lookup
    # raises. An attribute, so that the shortest lookups pass through one call less; it may become another one: see
    # `subscribe`.
    try_lookup: Callable[[int, Any, Any], bool]

    @abstractmethod
    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Looks up keys of one table, on the caller's thread. Blocks on the disk for what no tier holds.

        Args:
            index: the table's index. keys: int64 [N, O], contiguous and checked. out: uint8 [N, O * H, row_bytes],
            contiguous; filled with the rows. sources: uint8 [N, O], contiguous, or None; filled with what answered each
            key, an index into `kernels.SOURCES`. timeout_s: the longest that the caller waits; None: as long as the
            disk answers.

        Raises:
            TimeoutError: timeout_s is over, or the disk has stopped answering.
            TierStoreError: see the module's docstring. After any error nothing is written to the arrays.
        """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> Pending | None:
        """Starts a lookup in several tables; returns None if memory held all. It owns the buffers until it ends.

        After an exception nothing is written to them, if the engine is of this host.
        """

    @abstractmethod
    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> Pending | None:
        """Starts a lookup of single pairs of one table: entry i of out, uint8 [M, entry_bytes], is that of keys[i],
        int64 [M].

        pairs: int32 [M], not below 0: the index of a key in a batch [N, O], flat, so that pairs[i] % O is the index of
        its order. All contiguous and checked. Otherwise as `submit`.
        """

    @abstractmethod
    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        """Looks up rows by their ids, on the caller's thread. Blocks on the disk for what no tier holds.

        Args:
            index: the table's index. row_ids: int64 [R] or [N, K], contiguous, any values, -1 for a zero row. Of whole
            tokens, [N, O * H], they go through the tiers by their keys, and count as those; others are read one by one,
            and count as rows. out: uint8, the shape of row_ids and [row_bytes], any strides. within: ids outside of it
            give zero rows; None: every id must be the table's. timeout_s: as of `lookup`.

        Raises:
            ValueError: an id is not the table's; out is undefined. All else: as `lookup`.
        """

    @abstractmethod
    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        """Starts what `rows` does, and otherwise is as `submit`."""

    @abstractmethod
    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        """Writes what would answer keys, int64 [N, O], to sources, uint8 [N, O]: see `lookup`. Counts nothing."""

    @abstractmethod
    def is_resident(self, index: int) -> bool:
        """Returns whether memory holds a whole table, by row id."""

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Returns totals, and under "tables" three lists for each: keys by order found in DRAM, those of them in the
        static set, and read from NVMe; if there is an hbm tier, under "hbm" a list for each: keys by order found
        there."""

    def huge_page_bytes(self) -> tuple[int, int]:
        """Returns bytes of its own DRAM that were in memory when it last looked, and those of them on huge pages."""
        return 0, 0

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """Refuses new lookups, waits for those under way, frees threads; returns whether all ended in time."""

    @abstractmethod
    def before_fork(self) -> None:
        """Takes the locks that a forked child must find in order."""

    @abstractmethod
    def after_fork(self, *, child: bool) -> None:
        """Gives them back, on either side; in the child, makes threads, rings and staging anew."""

    def subscribe(self, renewed: Callable[[], Any]) -> None:  # noqa: B027
        """Calls `renewed`, a method, while its object lives, whenever `try_lookup` has become another. Few engines
        do."""


class HostEngine(Engine):
    """An engine on which an hbm tier can stand: its work is a `kernels.Engine`'s, which serves mailboxes too."""

    layouts: Sequence[TableLayout]  # of the tables, in the catalog's order

    @property
    @abstractmethod
    def native(self) -> kernels.Engine:
        """The engine in C++ that answers now."""

    @property
    @abstractmethod
    def overlays(self) -> Mapping[str, Patches]:
        """What versions have of tables, by name: for a `PlacementFile` whose entries are loaded elsewhere."""


@runtime_checkable
class DeviceEngine(Protocol):
    """What an engine with an hbm tier can do besides: lookups from the device, and a change of what its memory
    holds."""

    def open_lookup(self, index: int, tokens_max: int) -> Any:
        """Returns a `DeviceLookup` of up to so many tokens of a table, which lives until the engine is closed.

        It may be one of fewer tokens (`tokens_max`): a quarter of the page-locked memory is the most that one gets.
        Raises `BudgetError` if its buffers do not fit, `StoreNotReadyError` if there is no device any more.
        """

    def open_rows(self, index: int, tokens_max: int, within: RowRange) -> Any:
        """Returns a `DeviceRows`, which lives until the engine is closed, for batches of any number of tokens.

        tokens_max: of one part of a batch; it may be fewer, as of `open_lookup`, which raises the same. Raises
        `ConfigError` if row ids of the table do not give keys.
        """

    def quiet(self) -> AbstractContextManager[None]:
        """A time in which nothing but lookups from the device, which were opened before, uses the device."""

    def change_entries(self, file: Any) -> list[np.ndarray]:
        """Brings the first entries of a `PlacementFile` into the hbm tier. Raises as `open_lookup`, and `FormatError`.

        Returns of each table the numbers of damaged records, which were left out.
        """


class EngineWrapper(Engine):
    """An engine that stands on another one, `_engine`, and leaves to it whatever a subclass does not do itself."""

    def __init__(self, engine: Engine) -> None:
        """engine: does the work."""
        self._engine = engine

    @property
    def io(self) -> str:  # type: ignore[override]
        return self._engine.io

    @property
    def version(self) -> int:  # type: ignore[override]
        return self._engine.version

    @property
    def bad_pages(self) -> dict[tuple[int, int], str]:  # type: ignore[override]
        return self._engine.bad_pages

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._engine.lookup(index, keys, out, sources, timeout_s)

    def submit(self, requests: Sequence[Request]) -> Pending | None:
        return self._engine.submit(requests)

    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> Pending | None:
        return self._engine.submit_pairs(index, keys, pairs, out)

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        self._engine.rows(index, row_ids, out, within, timeout_s)

    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        return self._engine.submit_rows(index, row_ids, out, within)

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._engine.locate(index, keys, sources)

    def is_resident(self, index: int) -> bool:
        return self._engine.is_resident(index)

    def counters(self) -> dict[str, Any]:
        return self._engine.counters()

    def huge_page_bytes(self) -> tuple[int, int]:
        return self._engine.huge_page_bytes()

    def close(self, timeout_s: float) -> bool:
        return self._engine.close(timeout_s)

    def before_fork(self) -> None:
        self._engine.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self._engine.after_fork(child=child)

    def subscribe(self, renewed: Callable[[], Any]) -> None:
        self._engine.subscribe(renewed)


class VersionChangedError(StoreNotReadyError):
    """Another version of the store took the place of the one that a call began with: what it has answered is of
    neither."""


class Versioned(Protocol):
    """Whatever says which version of a store answers: an engine, or a store."""

    @property
    def version(self) -> int:
        """Grows whenever another version answers; -1 while it changes."""


def in_one_version(engine: Versioned, act: Callable[[], _T], what: str) -> _T:
    """Calls act until one version of the store has answered all of it; returns what act returned then.

    A lookup in parts could otherwise have rows of the old version beside rows of the new one.

    Args:
        engine: its version is the same before and after a good call. An engine whose version never changes: act raises
            `VersionChangedError` when another version came meanwhile.
        act: does all of the work, also the second time. A `Pending` that it returns is given up before it is called
            again: both write to the same buffers.
        what: names the store, or the table, in errors.

    Raises:
        StoreNotReadyError: the version changed VERSION_TRIES_MAX times.
    """
    for _ in range(VERSION_TRIES_MAX):
        version = engine.version
        try:
            done = act()
        except VersionChangedError:
            pass
        else:
            # Read after act: a version that came while it ran, or is on its way (-1), may have answered a part of it.
            if version == engine.version != -1:
                return done
            if isinstance(done, Pending):
                done.cancel()
        time.sleep(VERSION_PAUSE_S)
    raise StoreNotReadyError(
        f"{what}: another version came {VERSION_TRIES_MAX} times during one lookup; look it up again"
    )
