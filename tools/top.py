"""`tierstore top`: how a daemon fares, again and again, with what went on in between.

Flows in: a daemon's socket; on a terminal, keys. Flows out: a screen that keeps up, or, where output is no terminal, plain
lines. Ends at q, at Ctrl-C, or after --count refreshes, with status 0. A daemon that goes away is waited for, and said to be
away; one that is not there at the start is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tierstore.daemon.record import Record
from tierstore.errors import DaemonError

from .cli import console
from .stat import fetch_record
from .stat_rates import Rates, rates_between

INTERVAL_S_MIN = 0.1  # a record is made by the daemon, which has other things to do
INTERVAL_S_MAX = 86_400.0


@dataclass(frozen=True)
class Refresh:
    """What is shown: the latest record there is, the rates since the one before, and why there is no newer one."""

    record: Record
    rates: Rates | None
    problem: str | None


def refreshes(
    fetch: Callable[[], Record],
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
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty():
            _show_screen(socket, interval, count)
        else:
            _print_lines(socket, interval, count)


def _show_screen(socket: Path, interval: float, count: int | None) -> None:
    from rich.live import Live

    from .stat_tables import page_of

    with keyboard() as q_comes_within:
        pages = refreshes(lambda: fetch_record(socket), lambda: not q_comes_within(interval), count)
        first = next(pages)  # before there is a screen, with which an error would come and go
        with Live(console=console(), screen=True, auto_refresh=False) as live:
            for refresh in itertools.chain([first], pages):
                live.update(page_of(refresh.record, refresh.rates, time.time(), refresh.problem), refresh=True)


def _print_lines(socket: Path, interval: float, count: int | None) -> None:
    from .stat_lines import plain_lines

    def wait() -> bool:
        time.sleep(interval)
        return True

    for refresh in refreshes(lambda: fetch_record(socket), wait, count):
        click.echo("\n".join(plain_lines(refresh.record, refresh.rates, time.time(), refresh.problem)))


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[float], bool]]:
    """Reads keys as they are pressed; gives a function that waits for so many seconds, and returns True at once at a q.

    Where standard input is no terminal, it only waits. The terminal is as it was afterwards.
    """
    if not sys.stdin.isatty():
        yield _nothing_comes_within
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: _q_comes_within(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _nothing_comes_within(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _q_comes_within(fd: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left_s)[0]:
            pressed = os.read(fd, 64)
            if not pressed or b"q" in pressed.lower():  # nothing: the terminal has gone
                return True
    return False
