"""Notifications for the service manager that started the daemon: ready, reloading, stopping, alive (sd_notify).

Input: the environment's NOTIFY_SOCKET and WATCHDOG_USEC. Output: datagrams of `NAME=value` lines; nothing if the
variable is not set. Errors: a manager that does not take a datagram is logged once and never stops the daemon.
Protocol: https://www.freedesktop.org/software/systemd/man/sd_notify.html
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

logger = logging.getLogger("tierstore")

SEND_S_MAX = 1.0  # the longest that a manager that hangs can delay the daemon


class Notifier:
    """Notifies one service manager of how the daemon fares. Any thread;
    each call blocks for SEND_S_MAX at most and raises nothing."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """environment: by default the process's, read now."""
        variables = os.environ if environment is None else environment
        self._address = _address_of(variables.get("NOTIFY_SOCKET", ""))
        self._failed = False
        self.watchdog_s = _watchdog_s(variables) if self._address is not None else None

    def ready(self, status: str) -> None:
        """The daemon serves, for the first time or again after `reloading`. status: a line for people."""
        self._send("READY=1", f"STATUS={_line(status)}")

    def status(self, status: str) -> None:
        """A line for people, shown by `systemctl status`."""
        self._send(f"STATUS={_line(status)}")

    def reloading(self, status: str) -> None:
        """The daemon changes what it serves; `ready` must follow."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}", f"STATUS={_line(status)}")

    def stopping(self, status: str) -> None:
        """The daemon ends."""
        self._send("STOPPING=1", f"STATUS={_line(status)}")

    def watchdog(self) -> None:
        """The daemon is alive. The loop that must not hang calls it every `watchdog_s` seconds,
        if that is not None."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        message = "\n".join(lines).encode("utf-8", "backslashreplace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_S_MAX)
                sender.sendto(message, self._address)
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "the service manager does not take notifications (%s): it may take the daemon for not started; "
                    "start the daemon by Type=exec, or let it reach NOTIFY_SOCKET",
                    error,
                )
            self._failed = True


def _address_of(variable: str) -> bytes | None:
    """Returns the address that NOTIFY_SOCKET says: a path, or, after '@', a name in the abstract namespace."""
    if not variable:
        return None
    if variable[0] not in "/@":
        logger.warning("NOTIFY_SOCKET=%s is neither a path nor an abstract socket: nothing is notified", variable)
        return None
    name = os.fsencode(variable)
    return b"\0" + name[1:] if variable[0] == "@" else name


def _watchdog_s(variables: Mapping[str, str]) -> float | None:
    """Returns half of the time after which the manager takes this process for hung; None if it does not watch it."""
    limit_us, pid = variables.get("WATCHDOG_USEC", ""), variables.get("WATCHDOG_PID", "")
    if not limit_us.isdecimal() or int(limit_us) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(limit_us) / 2e6


def _line(text: str) -> str:
    return " ".join(text.split())
