"""The client's end of the daemon's socket: connecting to it, and asking it as an administrator.

Flows in: the path of a socket. Flows out: a channel that has said hello, or one answer. Refuses a daemon of a user that
is not trusted, since its descriptors become this process's rows, and one that speaks another version. Every error is a
`DaemonError` that says what to do, but for the daemon's own, which come through by their names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Collection
from typing import Any, Literal, NoReturn

from .. import errors
from ..causes import named, naming
from ..errors import DaemonError, TierStoreError
from ..version import VERSION
from .identity import known_ids, process_text, unknown_id, user_text
from .protocol import (
    CLIENT_MESSAGE_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    Channel,
    ChannelClosed,
    close_fds,
    peer_credentials,
)
from .socket_file import check_socket_path, starting_state

DIAL_S = 5.0
ASK_S = 10.0
RETRY_S = 0.01  # between tries to connect while the daemon's queue of connections is full


def dial(
    path: str | os.PathLike[str],
    role: Literal["client", "admin"] = "client",
    timeout_s: float = DIAL_S,
    *,
    trusted_uids: Collection[int] = (),
    on_gpu: bool = False,
) -> tuple[Channel, dict[str, Any], list[int]]:
    """Connects to a daemon and says hello; returns the channel,
    its answer and the descriptors that came with it. Blocks.

    trusted_uids: whose daemon may answer, beside our own user's and root's. on_gpu: whether this process's GPU would
    read the static set; the answer says whether it is lent for that. The channel and the descriptors are the caller's
    to close. Raises `DaemonError` where there is no daemon, it may not be reached, does not answer in time or speaks
    another version; what the daemon refuses with, by its class;
    `ConfigError` where the path is too long for a socket's.
    """
    deadline = time.monotonic() + timeout_s
    text = check_socket_path(path)
    channel = Channel(
        _connect(text, deadline, timeout_s, trusted_uids), MESSAGE_BYTES_MAX, send_limit=CLIENT_MESSAGE_BYTES_MAX
    )
    try:
        hello = {"hello": PROTOCOL_VERSION, "role": role, "pid": os.getpid(), "release": VERSION, "on_gpu": on_gpu}
        with contextlib.suppress(ChannelClosed):  # it may have refused already: what it said is still to be read
            channel.send(hello, timeout_s=timeout_s)
        answer, fds = _receive(channel, text, deadline, timeout_s)
        if answer.get("hello") != PROTOCOL_VERSION:
            close_fds(fds)
            raise DaemonError(
                f"{text}: the daemon speaks version {answer.get('hello')!r} of the protocol, this is version "
                f"{PROTOCOL_VERSION} (tierstore {VERSION}): install one release for both, and restart the older"
            )
    except BaseException:
        channel.close()
        raise
    return channel, answer, fds


def ask(
    path: str | os.PathLike[str],
    message: dict[str, Any],
    timeout_s: float = ASK_S,
    *,
    trusted_uids: Collection[int] = (),
) -> dict[str, Any]:
    """Returns a daemon's answer to one request of an administrator, such as {"do": "stat"}. Blocks,
    for timeout_s in all.

    Raises what `dial` raises, and what the request raised in the daemon, by its class.
    """
    deadline = time.monotonic() + timeout_s
    channel, _, fds = dial(path, "admin", timeout_s, trusted_uids=trusted_uids)
    with channel:
        close_fds(fds)
        with contextlib.suppress(ChannelClosed):
            channel.send(message, timeout_s=max(0.0, deadline - time.monotonic()))
        answer, fds = _receive(channel, os.fspath(path), deadline, timeout_s)
        close_fds(fds)
        return answer


def raise_error(message: dict[str, Any]) -> None:
    """Raises what a message says went wrong or ended; returns where it says nothing of the kind."""
    if "bye" in message:
        raise ChannelClosed(f"the daemon said goodbye: {message['bye']}")
    if "error" in message:
        kind = getattr(errors, str(message["error"]), DaemonError)
        if not (isinstance(kind, type) and issubclass(kind, TierStoreError)):
            kind = DaemonError
        raise kind(str(message.get("message")))


def _receive(channel: Channel, path: str, deadline: float, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    try:
        message, fds = channel.receive(deadline - time.monotonic())
    except TimeoutError as error:
        starting = starting_state(path)
        what = f"it is starting ({starting}): ask again" if starting else "it may be stopped or stuck: see its log"
        raise DaemonError(f"{path}: the daemon does not answer within {timeout_s} s; {what}") from error
    except ChannelClosed as error:
        raise ChannelClosed(f"{path}: {error} without an answer; the daemon may have ended: see its log") from error
    try:
        raise_error(message)
    except BaseException:
        close_fds(fds)
        raise
    return message, fds


def _connect(path: str, deadline: float, timeout_s: float, trusted_uids: Collection[int]) -> socket.socket:
    with naming(path, kind=DaemonError):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        outcome = sock.connect_ex(path)
        while outcome == errno.EAGAIN and time.monotonic() < deadline:
            time.sleep(RETRY_S)  # the kernel has no event for room in that queue
            outcome = sock.connect_ex(path)
        if outcome:
            _raise_unreachable(path, outcome, timeout_s)
        pid, uid, _ = peer_credentials(sock)
        _check_owner(path, pid, uid, trusted_uids)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_owner(path: str, pid: int, uid: int, trusted_uids: Collection[int]) -> None:
    """Raises `DaemonError` if the daemon's user is not trusted. A daemon of this process is."""
    trusted = known_ids("uid", {os.geteuid(), 0, *trusted_uids})
    if uid in trusted or pid == os.getpid():
        return
    users = " and ".join(str(user) for user in sorted(trusted))
    owner = f"the daemon ({process_text(pid)}) belongs to {user_text(uid)}"
    who = f"{path}: {owner}, only daemons of users {users} are trusted"
    if uid == unknown_id("uid"):
        raise DaemonError(f"{who}: run client and daemon as users whom both their user namespaces map")
    raise DaemonError(f"{who}: add {uid} to the trusted users if its rows may be used")


def _raise_unreachable(path: str, outcome: int, timeout_s: float) -> NoReturn:
    if outcome == errno.ECONNREFUSED and os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise DaemonError(f"{path}: that is no socket; give the path that tierstore serve was given")
    remedies = {
        errno.ENOENT: f"there is no socket; start a daemon: tierstore serve STORE --socket {path}",
        errno.ENOTDIR: "a folder of this path is a file; give the path that tierstore serve was given",
        errno.EACCES: f"permission denied to user {os.geteuid()}: restart the daemon with --allow-user {os.geteuid()}, "
        f"in a folder that this user may enter",
        errno.ECONNREFUSED: "nothing listens there, its daemon was killed; start it: "
        f"tierstore serve STORE --socket {path}",
        errno.EPROTOTYPE: "it is another program's socket; give the path that tierstore serve was given",
        errno.EAGAIN: f"the daemon takes no connection within {timeout_s} s; it may be stopped or stuck: see its log",
    }
    if outcome in remedies:
        raise DaemonError(f"{path}: {remedies[outcome]}")
    raise named(OSError(outcome, os.strerror(outcome)), path, kind=DaemonError)
