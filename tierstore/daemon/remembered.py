"""The remembered swap: what a daemon that starts serves, and what it notes of each swap while it runs.

Input: the command line's store, and the swap file. Output: the store to serve, and a log line if it is another one. A
swap is forgotten if the command line names any store but the one that was swapped away, or with --forget-swap.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..errors import TierStoreError
from ..formats.catalog import read_catalog
from ..ipc.events import event
from .swap_file import Swap, SwapFile

logger = logging.getLogger("tierstore.daemon")


class RememberedSwap:
    """The store that a daemon's command line names, and the one that it serves in its place."""

    def __init__(self, file: SwapFile, store: str | os.PathLike[str], *, forget: bool = False) -> None:
        """Decides what to serve: `serves`, and `previous`, which a rollback goes to. Raises what `SwapFile` raises."""
        self._file = file
        self._store, self._store_identity = os.path.realpath(store), ""
        self.serves: str | os.PathLike[str] = store
        self.previous: str | None = None
        swap = None if forget else file.read()
        if swap is None or self._is_other_store(swap):
            if file.forget():
                event(logger, logging.WARNING, "swap_forgotten", store=store, forgot=swap.serves if swap else None)
            return
        self._store_identity = swap.store_identity
        problem = _problem_of(swap)
        if problem:
            event(
                logger, logging.ERROR, "swapped_in_store_not_served",
                store=swap.serves, serves=store, why=problem, remedy="mend it, or start with --forget-swap",
            )  # fmt: skip
            return
        self.serves, self.previous = swap.serves, swap.previous
        event(
            logger, logging.WARNING, "swap_remembered",
            serves=swap.serves, instead_of=store, remedy="start with --forget-swap to serve the latter",
        )  # fmt: skip

    @property
    def is_other(self) -> bool:
        """Whether another store than the command line's is served."""
        return self.previous is not None

    def _is_other_store(self, swap: Swap) -> bool:
        """Whether the command line's store is not the one that was swapped away.
        One that is gone counts by its path."""
        if self._store != swap.store:
            return True
        identity = _identity_of(self._store)
        return isinstance(identity, str) and identity != swap.store_identity

    def begun(self, identity: str) -> None:
        """Takes note of the identity of the store that is served first."""
        self._store_identity = self._store_identity or identity

    def note(self, path: str, identity: str, previous: str) -> None:
        """Notes what is served from now on, durably. Raises `DaemonError`, and then leaves what was noted before."""
        if os.path.realpath(path) == self._store and identity == self._store_identity:
            self._file.forget()
        else:
            self._file.write(Swap(self._store, self._store_identity, path, identity, previous))


def _problem_of(swap: Swap) -> str | None:
    """Says why the store that was swapped in cannot be served now."""
    identity = _identity_of(swap.serves)
    if isinstance(identity, Exception):
        return str(identity)
    if identity != swap.serves_identity:
        return f"it was built anew: its digest is {identity[:12]}, it was {swap.serves_identity[:12]}"
    return None


def _identity_of(path: str) -> str | Exception:
    try:
        return read_catalog(Path(path)).base_identity  # whichever version of it is the newest by now
    except (TierStoreError, OSError) as error:
        return error
