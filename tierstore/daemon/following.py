"""Following: when a new version of the served store's rows is published, the daemon moves to it by itself.

Input: the store's catalog, which it looks at twice a second. Output: swaps, as `tierstore swap` asks for them. Errors:
none ends it; a version that cannot be served is an event, and is tried again, less and less often.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from ..errors import TierStoreError
from ..formats.catalog import CATALOG_FILE, read_catalog
from ..ipc.events import event
from ..ipc.messages import SwapRequest
from .administration import Administration
from .host import Host

logger = logging.getLogger("tierstore.daemon")

LOOK_S = 0.5  # between two looks at the catalog: one call of the system each, if nothing was written
QUIET_NS = 2 * 10**9  # a catalog that was written less long ago may change again under the same time of change
RETRY_S, RETRY_MAX_S = 2.0, 60.0  # after a version that could not be served: at first, and at most
CLOSE_WAIT_S = 10.0


class Follower:
    """Looks for new versions in one thread, from `start` to `close`."""

    def __init__(self, host: Host, administration: Administration) -> None:
        """host: says what is served now. administration: carries the swaps out."""
        self._host, self._administration = host, administration
        self._ended = threading.Event()
        self._seen: tuple[str, tuple[int, ...]] | None = None  # the catalog that holds nothing new
        self._retry_s, self._retry_at = RETRY_S, 0.0
        self._thread = threading.Thread(target=self._run, name="tierstore-follow", daemon=True)

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def close(self) -> bool:
        """Ends the thread; returns whether it ended in time."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_WAIT_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            if time.monotonic() < self._retry_at:
                continue
            try:
                self._look()
                self._retry_s = RETRY_S
            except Exception as error:  # whatever it is: the version before is served on
                level = logging.WARNING if isinstance(error, (TierStoreError, OSError)) else logging.ERROR
                event(
                    logger,
                    level,
                    "not_followed",
                    store=self._host.epochs.current.path,
                    error=error,
                    again_s=self._retry_s,
                )
                self._retry_at = time.monotonic() + self._retry_s
                self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)

    def _look(self) -> None:
        served = self._host.epochs.current
        catalog, looked_at = (served.path, _signature(Path(served.path) / CATALOG_FILE)), time.time_ns()
        if catalog == self._seen:
            return
        image = read_catalog(served.path)
        is_other = image.version > served.published or image.folded != served.folded
        if is_other and image.base_identity == served.base_identity:
            event(logger, logging.INFO, "following", store=served.path, published=image.version)
            self._administration.carry_out(SwapRequest(store=served.path))
        if looked_at - catalog[1][2] > QUIET_NS:
            self._seen = catalog  # last: what failed is looked at again


def _signature(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
