"""The session with a daemon: a thread that receives other versions, reports counters, and finds the daemon again.

Input: the daemon's messages. Output: links that the store's engine is moved to, and reports. Lookups never wait for
this: while there is no daemon, they go on with what is mapped. Errors: all are logged, none ends the thread, because it
is the only one that can attach the store again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from ..errors import TierStoreError
from ..ipc.channel import Channel
from ..ipc.client_socket import DIAL_S, raise_error
from ..ipc.identity import this_process
from ..ipc.messages import FromClient, FromDaemon, Layout
from ..ipc.protocol import close_fds
from ..tiers.engine import READ_WAIT_S
from .dialer import Dialer
from .engine import AttachedEngine
from .link import Link, warn_of_other_version
from .reports import SEND_S, CounterReports

if TYPE_CHECKING:
    from .hbm import AttachedHbm

logger = logging.getLogger("tierstore")

REDIAL_S, REDIAL_MAX_S = 0.1, 1.0  # between two tries to find the daemon again: at first, and at most
REPORT_S = 1.0  # between two reports of counters
FOLLOW_S = 0.02  # between two looks for a newer static set, if a device reads it in place
END_WAIT_S = 10.0


class Session:
    """Keeps one store attached. `start` and `close` are the owner's; all else is done by the thread.

    Attributes:
        channel: The connection; None while there is not one. Once the thread runs, only the thread replaces it.
        hbm: The store's hbm tier, None if it has none. Set before `start`.
    """

    def __init__(self, name: str, dialer: Dialer, channel: Channel | None, attached: AttachedEngine) -> None:
        """name: the store, as log lines call it. channel: by which `attached`'s link came, None if it came by none."""
        self.channel = channel
        self._name, self._dialer = name, dialer
        self._attached = attached
        self.hbm: AttachedHbm | None = None
        self._reports = CounterReports(attached.counters)
        self._ended = threading.Event()
        self._process = this_process()
        self._thread = threading.Thread(target=self._run, name="tierstore-attached", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def abandon_in_child(self) -> None:
        """In a forked child, which does not have the thread: closes its copy of the parent's connection."""
        if self.channel is not None:
            self.channel.close()

    def close(self) -> None:
        """Reports for the last time, hangs up, and waits for the thread. Closing twice is harmless."""
        channel = self.channel
        if self._process != this_process():  # a child that never looked up
            if channel is not None:
                channel.close()  # never `shutdown`: that would end the parent's connection too
            return
        self._ended.set()
        if self.hbm is not None:
            self.hbm.end()
        if channel is not None:
            with contextlib.suppress(TierStoreError, TimeoutError, OSError):
                self._reports.send(channel)
            channel.shutdown()  # wakes the thread
        if (
            self._thread.ident is not None and threading.current_thread() is not self._thread
        ):  # it may collect the store
            self._thread.join(END_WAIT_S)

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                if self.channel is not None:
                    self._stay_attached(self.channel)
                else:
                    self._find_daemon()
        finally:
            if self.hbm is not None:
                self.hbm.end()

    def _stay_attached(self, channel: Channel) -> None:
        """Serves a connection until it ends."""
        try:
            self._serve(channel)
        except Exception as error:  # whatever it is: see the head of this file
            if not self._ended.is_set():
                logger.warning("%s: detached (%s): lookups go on, and the daemon is looked for", self._name, error)
        channel.close()
        self.channel = None
        self._reports.end_connection()

    def _serve(self, channel: Channel) -> None:
        """Receives messages and sends reports until the channel ends, which raises, or the store."""
        reported_at = time.monotonic()
        while not self._ended.is_set():
            left_s = reported_at + REPORT_S - time.monotonic()
            if left_s <= 0:
                reported_at = time.monotonic()
                self._reports.send(channel)
                continue
            self._follow_static()
            reads_static = self.hbm is not None and self.hbm.reads_static
            try:
                message, fds = channel.receive(min(left_s, FOLLOW_S) if reads_static else left_s, FromDaemon)
            except TimeoutError:
                continue
            if message.move is not None:
                self._move(channel, message.move, fds)
            else:
                close_fds(fds)
                raise_error(message)

    def _move(self, channel: Channel, layout: Layout, fds: list[int]) -> None:
        """Moves to the version that the daemon serves now, and reports when nothing here uses the old one."""
        old = self._move_to(self._dialer.link(layout, fds))
        self._attached.retire(old, READ_WAIT_S)
        channel.send(FromClient(left=old.version), timeout_s=SEND_S)
        del old  # unmaps its memory now: filling HBM may take minutes
        self._refill()

    def _find_daemon(self) -> None:
        """Dials until there is a daemon again, less and less often, or until the store ends."""
        pause_s, logged = REDIAL_S, ""
        while not self._ended.wait(pause_s):
            pause_s = min(2 * pause_s, REDIAL_MAX_S)
            try:
                self._follow_static()  # the daemon may change it without a connection to us
                self._attach_again()
            except Exception as error:  # see the head of this file
                if str(error) != logged and not self._ended.is_set():
                    logged = str(error)
                    logger.warning("%s: not attached yet: %s", self._name, error)
                continue
            logger.info("%s: attached again", self._name)
            self._refill()
            return

    def _attach_again(self) -> None:
        """Dials, and moves. `channel` is set last: an attached store must look up by the link of its own channel."""
        on_gpu = self.hbm is not None and self.hbm.reads_static
        channel, link = self._dialer.dial(DIAL_S, on_gpu=on_gpu)
        try:
            warn_of_other_version(self._name, self._attached.link, link)
            old = self._move_to(link)
        except BaseException:
            channel.close()
            raise
        self.channel = channel
        self._attached.retire(old, READ_WAIT_S)

    def _move_to(self, link: Link) -> Link:
        return self._attached.move_to(link) if self.hbm is None else self.hbm.move_to(link)

    def _follow_static(self) -> None:
        if self.hbm is not None:
            self.hbm.follow_static()

    def _refill(self) -> None:
        if self.hbm is not None:
            self.hbm.refill()
