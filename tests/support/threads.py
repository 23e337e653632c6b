"""The threads of this process, those of C++ included, as the kernel lists them."""

from __future__ import annotations

import os

from .waiting import eventually

STEADY_LOOKS = 20  # looks in a row that find the same number


def threads_of_this_process() -> int:
    """How many there are now; one that was joined is listed for a moment more."""
    return len(os.listdir("/proc/self/task"))


def steady_count() -> int:
    """How many threads there are, once those of earlier tests are gone from the list."""
    counts = [threads_of_this_process()]

    def is_steady() -> bool:
        counts.append(threads_of_this_process())
        return len(counts) > STEADY_LOOKS and len(set(counts[-STEADY_LOOKS:])) == 1

    eventually(is_steady)
    return counts[-1]
