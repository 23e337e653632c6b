"""How to have a store again in another process: what a pickled embedding carries instead of the store.

Input: an open store. Output: a `StoreReference`, which is pickled, and opens the store where it arrives: a path is
opened with the same options, a daemon is attached to, a server is called. Errors: `StoreNotReadyError` where that does
not go, with the cause, `ConfigError` for a path where other rows lie by now. Modules that arrive in one process share
one store.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tierstore
from tierstore.errors import ConfigError, StoreNotReadyError, TierStoreError
from tierstore.store.embedded import Embedded

if TYPE_CHECKING:
    from tierstore import Store

_Options = tuple[tuple[str, Any], ...]
_lock = threading.Lock()  # guards `_own` and `_tokens`, and `_reopened` while a store is opened
_tokens: weakref.WeakKeyDictionary[Store, str] = weakref.WeakKeyDictionary()
_own: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()  # by token; forked children have them too
_reopened: weakref.WeakValueDictionary[StoreReference, Store] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class StoreReference:
    """Where a store is and how it was opened. `str` of it is for messages.

    Attributes:
        place: A path, a daemon's socket or a server's address.
        is_path: Whether it is opened in the process itself.
        options: As `tierstore.open` and `tierstore.connect` take them; of a server's, its files with tokens are not
            known and not carried.
        token: Names the open store in the process that pickled it, and in its forked children.
        build: As `fixed_build` returned it.
    """

    place: str
    is_path: bool
    options: _Options
    token: str
    build: str = ""

    @classmethod
    def of(cls, store: Store) -> StoreReference:
        """Returns the reference of an open store."""
        with _lock:
            token = _tokens.setdefault(store, uuid.uuid4().hex)
            _own[token] = store
        stats = store.stats()
        if "server" in stats:
            return cls(stats["server"]["url"], False, (), token)
        options: dict[str, Any] = {"io": stats["io"]}
        if "hbm_budget_bytes" in stats["memory"]:
            options |= {"hbm": stats["memory"]["hbm_budget_bytes"], "device": str(store.device)}
        if "attached" in stats:
            return cls(os.path.abspath(stats["attached"]["socket"]), False, tuple(options.items()), token)
        options["dram"] = stats["memory"]["budget_bytes"]
        if stats["placement"]["epoch"] is None:
            options["placement"] = "none"
        return cls(os.path.abspath(store.name), True, tuple(options.items()), token, fixed_build(store))

    def open(self) -> Store:
        """Returns the store itself where it is open, else opens it, once a process. Blocks as `tierstore.open` does.

        Raises `StoreNotReadyError` if it cannot be opened here.
        """
        with _lock:
            for store in (_own.get(self.token), _reopened.get(self)):
                if store is not None and not store._closed:
                    return store
            try:
                opener = tierstore.open if self.is_path else tierstore.connect
                store = opener(self.place, **dict(self.options))
            except (TierStoreError, OSError) as error:
                raise StoreNotReadyError(
                    f"an embedding was pickled with {self}, which this process cannot open: {error}"
                ) from error
            _reopened[self] = store
            return store

    def check_build(self, store: Store) -> None:
        """Raises `ConfigError` if `store`, which `open` returned, has other rows than the one that was pickled.

        Only a path is compared. A daemon, or a server, may serve another version by now: a swap is meant for all its
        clients, those too that arrive later.
        """
        if self.build and store.build != self.build:
            raise ConfigError(
                f"{self} has other rows than when an embedding was pickled with it: its digest is "
                f"{store.build[:16]}..., and was {self.build[:16]}... then; put the store of that model there, or "
                f"pickle the model anew with this one"
            )

    def __str__(self) -> str:
        return f"the store at {self.place}"


def fixed_build(store: Store) -> str:
    """Returns the digest of all that decides a store's rows; empty for a daemon's or a server's, which a swap changes
    for all clients."""
    return store.build if isinstance(getattr(store, "_backing", None), Embedded) else ""
