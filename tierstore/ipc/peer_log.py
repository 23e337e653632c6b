"""Lines about peers in the log, so many a minute: an attack on the socket must not fill the disk.

Input: what a peer did, from any thread. Output: lines of the log; the next minute says how many were left out.
Errors: none.
"""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger("tierstore")

LINES_A_MINUTE_MAX = 30


class PeerLog:
    """Logs what peers do, at most LINES_A_MINUTE_MAX lines a minute; those left out are counted. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the three counts below
        self._minute, self._lines, self._left_out = 0, 0, 0

    def warn(self, text: str, error: Exception | None = None) -> None:
        """Logs a line, with the trace of an error of ours."""
        with self._lock:
            minute = int(time.monotonic() / 60)
            left_out = self._left_out if minute != self._minute else 0
            if minute != self._minute:
                self._minute, self._lines, self._left_out = minute, 0, 0
            self._lines += 1
            if self._lines > LINES_A_MINUTE_MAX:
                self._left_out += 1
                return
        if left_out:
            logger.warning(
                "%d lines about peers were left out, of which %d a minute are logged", left_out, LINES_A_MINUTE_MAX
            )
        logger.warning("%s", text, exc_info=error)
