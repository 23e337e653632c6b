"""How tests wait for what another thread or process does: never by a sleep, always with an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

WAIT_S = 60.0  # for what must happen; nothing that works takes nearly as long
POLL_S = 0.002


def eventually(holds: Callable[[], Found], what: str = "it", within_s: float = WAIT_S) -> Found:
    """Waits until a condition holds, and returns what it found.

    Args:
        holds: the condition, polled on the caller's thread; it holds as soon as it returns something true.
        what: named in the error.
        within_s: seconds after which the test fails.

    Returns:
        What `holds` returned last.

    Raises:
        AssertionError: the time was over.
    """
    deadline, pause = time.monotonic() + within_s, threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s:g} s"
        pause.wait(POLL_S)
    return found
