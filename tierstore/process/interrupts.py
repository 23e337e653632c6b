"""How the command `tierstore` ends by Ctrl-C, SIGTERM and SIGHUP: without a traceback, and without unfinished files.

Input: signals. Output: while the command imports, Ctrl-C ends the process at once with status 130, as there is nothing
to clean up yet. While it works, Ctrl-C raises `KeyboardInterrupt`, and SIGTERM and SIGHUP (the terminal was closed)
raise `Ended`, so that files under temporary names are removed; then the process dies by its signal. Errors: none.

Signals that the process was started to ignore (`nohup`, `&` in a script) stay ignored. Only the command calls this: a
program that imports tierstore keeps its own handlers.
"""

from __future__ import annotations

# The part in C. `signal` imports more, and an interrupt meanwhile would show a traceback.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys
from typing import NoReturn

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells have it
_ENDING = (signal.SIGTERM, signal.SIGHUP)

_importing = False


class Ended(BaseException):
    """SIGTERM or SIGHUP came: leave, and clean up on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number


def is_command() -> bool:
    """Whether this process was started as `tierstore` or as `python -m tierstore.tools.cli`."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # the module is being looked for
        return "tierstore.tools.cli" in sys.orig_argv
    return os.path.basename(started) == "tierstore" and started in sys.orig_argv


def begin_importing() -> None:
    """Makes Ctrl-C end the process at once, until `begin_work`."""
    global _importing
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _importing = True
        signal.signal(signal.SIGINT, _leave)


def begin_work() -> None:
    """Makes signals raise from now on; without `begin_importing` before, it does nothing."""
    global _importing
    if not _importing:
        return
    _importing = False
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_work() -> None:
    """Makes signals end the process at once again: all is done, and what they raise would only show as a traceback."""
    for number in _ENDING:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def die_of(number: int) -> None:
    """Ends the process by a signal, as whoever started it expects of one that it ended."""
    _flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def leave(status: int) -> NoReturn:
    """Ends the process with a status, at once, without waiting for threads that still compute."""
    _flush()
    os._exit(status)


def _flush() -> None:
    import contextlib

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed takes nothing more
            stream.flush()


def _leave(_number: int, _frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED_STATUS)


def _end(number: int, _frame: object) -> None:
    for ending in _ENDING:  # once is enough: a closed terminal sends more than one, and what cleans up must finish
        signal.signal(ending, signal.SIG_IGN)
    raise Ended(number)


if is_command():
    begin_importing()
