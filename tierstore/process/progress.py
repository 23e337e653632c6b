"""How long jobs report their progress: the callbacks, the names of the phases, and what each phase counts.

Input: none. Output: types and names that jobs, commands and users' own code share. Errors: none.
"""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called now and then, in the thread that started the job, with what is done and what there is in all.

Both count the same thing: bytes, rows or entries, as the job says. What it raises ends the job.
"""
OnPhase = Callable[[str, int, "int | None"], None]  # the phase, how much of it is done, of how much (None: unknown)

COUNTING, MERGING, READING, SORTING, WRITING = "counting", "merging", "reading", "sorting", "writing"
REPLAYING, DECODING, INTERVALS, CHECKING = "replaying", "decoding", "intervals", "checking"
TRYING, CHOOSING, PLACING = "trying", "choosing", "placing"

# What the phases of `profile`, `plan` and `place` count; the others count nothing.
PHASE_UNITS = {
    COUNTING: "tokens",
    MERGING: "n-grams",
    READING: "n-grams",
    REPLAYING: "simulations",
    DECODING: "simulations",
    TRYING: "simulations",
    PLACING: "rows",
}


def no_report(_phase: str, _done: int, _total: int | None) -> None:
    """Stands in for a callback that the caller did not give."""
