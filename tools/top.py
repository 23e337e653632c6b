"""`tierstore top`: how a daemon fares, again and again, with what went on in between.

Input: a daemon's socket; on a terminal, keys. Output: a screen that keeps up, or, if output is not a terminal, plain
lines. Ends at q, at Ctrl-C, or after --count refreshes, with status 0. A daemon that goes away is shown as away and
waited for; one that is not there at the start is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tierstore.daemon.record import StatRecord
from tierstore.errors import DaemonError

from .cli import console
from .stat.command import fetch_record
from .stat.rates import Rates, rates_between

INTERVAL_S_MIN = 0.1  # a record is made by the daemon, which has other things to do
INTERVAL_S_MAX = 86_400.0


@dataclass(frozen=True)
class Refresh:
    """What is shown: the latest record there is, the rates since the one before, and why there is no newer one."""

    record: StatRecord
    rates: Rates | None
    problem: str | None


def refreshes(
    fetch: Callable[[], StatRecord],
    go_on: Callable[[], bool],
    count: int | None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Refresh]:
    """Yields a refresh at once, and another each time that go_on(), which waits, returns True; at most `count`.

    Raises what `fetch` raises at first; later a `DaemonError` is shown and tried again.
    """
    record, record_at, problem = fetch(), clock(), None
    rates: Rates | None = None
    shown = 0
    while True:
        yield Refresh(record, rates, problem)
        shown += 1
        if shown == count or not go_on():
            return
        try:
            newer, newer_at = fetch(), clock()
        except DaemonError as error:
            rates, problem = None, str(error)
            continue
        rates, problem = rates_between(record, newer, newer_at - record_at), None
        record, record_at = newer, newer_at


def _checked_interval(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not INTERVAL_S_MIN <= value <= INTERVAL_S_MAX:  # NaN is no interval either
        raise click.BadParameter(f"{value} is not in the range {INTERVAL_S_MIN} to {INTERVAL_S_MAX:.0f}.", ctx, param)
    return value


@click.command("top")
@click.argument("socket", type=click.Path(path_type=Path))
@click.option(
    "--interval",
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    type=float,
    callback=_checked_interval,
    help="Between two refreshes.",
)
@click.option("--count", default=None, type=click.IntRange(min=1), help="End after so many refreshes.")
def command(socket: Path, interval: float, count: int | None) -> None:
    """Watch the daemon at SOCKET: rates, hit rates by table and order, latency, memory, clients. End with q.

    \b
    Example: tierstore top /run/tierstore/v41.sock
             tierstore top /run/tierstore/v41.sock --interval 60 >> top.log
    """
    with CtrlC() as ctrl_c, contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty():
            _show_screen(socket, interval, count, ctrl_c)
        else:
            _print_lines(socket, interval, count, ctrl_c)


class CtrlC:
    """Ctrl-C, which ends the command between two refreshes, or while a record is fetched, and never while one is drawn.

    Python raises KeyboardInterrupt between any two lines of any library. Raised in the middle of rich's output, it left
    a screen that was never closed. So the handler only notes it, and wakes who waits; a second Ctrl-C raises at once,
    in case the terminal takes nothing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._raises = False

    def __enter__(self) -> CtrlC:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handler_before = signal.signal(signal.SIGINT, self._handle)
        self._fd_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        signal.signal(signal.SIGINT, self._handler_before)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _handle(self, *_: object) -> None:
        self._count += 1
        if self._raises or self._count > 1:
            self._raises = False
            raise KeyboardInterrupt

    def during(self, act: Callable[[], StatRecord]) -> StatRecord:
        """Returns what `act` returns. Ctrl-C raises KeyboardInterrupt meanwhile."""
        self._raises = True
        try:
            if self._count:
                raise KeyboardInterrupt
            return act()
        finally:
            self._raises = False

    def comes_within(self, seconds: float, fd: int | None = None) -> bool:
        """Waits; returns True at once at Ctrl-C. fd: returns, if it can be read, whether Ctrl-C came."""
        fds = [self._read_fd] if fd is None else [self._read_fd, fd]
        return self._read_fd in select.select(fds, [], [], max(0.0, seconds))[0]


def _show_screen(socket: Path, interval: float, count: int | None, ctrl_c: CtrlC) -> None:
    from rich.live import Live

    from .stat.tables import page_of

    with keyboard(ctrl_c) as end_comes_within:
        pages = refreshes(
            lambda: ctrl_c.during(lambda: fetch_record(socket)), lambda: not end_comes_within(interval), count
        )
        first = next(pages)  # before there is a screen, with which an error would come and go
        with Live(console=console(), screen=True, auto_refresh=False) as live:
            for refresh in itertools.chain([first], pages):
                live.update(page_of(refresh.record, refresh.rates, time.time(), refresh.problem), refresh=True)


def _print_lines(socket: Path, interval: float, count: int | None, ctrl_c: CtrlC) -> None:
    from .stat.lines import plain_lines

    pages = refreshes(
        lambda: ctrl_c.during(lambda: fetch_record(socket)), lambda: not ctrl_c.comes_within(interval), count
    )
    for refresh in pages:
        click.echo("\n".join(plain_lines(refresh.record, refresh.rates, time.time(), refresh.problem)))


@contextlib.contextmanager
def keyboard(ctrl_c: CtrlC) -> Iterator[Callable[[float], bool]]:
    """Reads keys as they are pressed; gives a function that waits for so many seconds, and returns True at once at a q,
    or at Ctrl-C.

    If standard input is not a terminal, only the latter comes. In the end the terminal is as it was.
    """
    if not sys.stdin.isatty():
        yield ctrl_c.comes_within
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: _end_comes_within(fd, seconds, ctrl_c)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _end_comes_within(fd: int, seconds: float, ctrl_c: CtrlC) -> bool:
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        if ctrl_c.comes_within(left_s, fd):
            return True
        if select.select([fd], [], [], 0)[0]:
            pressed = os.read(fd, 64)
            if not pressed or b"q" in pressed.lower():  # nothing: the terminal has gone
                return True
    return False
