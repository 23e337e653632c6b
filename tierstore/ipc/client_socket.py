"""The client's end of the daemon's socket: connecting to it, and asking it as an administrator.

Input: the path of a socket. Output: a channel after the handshake, or one answer. Errors: a daemon of a user that is
not trusted is refused, since its descriptors become this process's rows, and so is one that speaks another version.
Every error is a `DaemonError` that says what to do, but for the daemon's own, which come through by their names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import time
from collections.abc import Collection
from typing import Any, Literal, NoReturn, TypeVar

from .. import errors
from ..causes import named, naming
from ..errors import DaemonError, TierStoreError
from ..version import VERSION
from .channel import Channel
from .identity import known_ids, process_text, unknown_id, user_text
from .messages import FromDaemon, Hello, Welcome, from_json
from .protocol import (
    CLIENT_MESSAGE_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    ChannelClosed,
    close_fds,
    peer_credentials,
)
from .socket_file import check_socket_path, starting_state

DIAL_S = 5.0
ASK_S = 10.0
_ADDRESS = re.compile(r"[^/\s]+:[0-9]{1,5}")  # a host and a port, where a path is expected
RETRY_S = 0.01  # between tries to connect while the daemon's queue of connections is full
T = TypeVar("T")


def dial(
    path: str | os.PathLike[str],
    role: Literal["client", "admin"] = "client",
    timeout_s: float = DIAL_S,
    *,
    trusted_uids: Collection[int] = (),
    on_gpu: bool = False,
) -> tuple[Channel, bytes, list[int]]:
    """Connects to a daemon and does the handshake. Blocks.

    Args:
        path: of the socket.
        role: what the connection is for.
        timeout_s: for all of it.
        trusted_uids: whose daemon may answer, beside our own user's and root's.
        on_gpu: whether this process's GPU would read the static set; the answer says whether it may.

    Returns:
        The channel, its answer, which for a client is a `Layout`, and the descriptors that came with it. Channel and
        descriptors are the caller's to close.

    Raises:
        DaemonError: there is no daemon, it may not be reached, does not answer in time or speaks another version.
        ConfigError: the path is too long for a socket's.
        TierStoreError: what the daemon refuses with, by its class.
    """
    deadline = time.monotonic() + timeout_s
    text = check_socket_path(path)
    channel = Channel(
        _connect(text, deadline, timeout_s, trusted_uids), MESSAGE_BYTES_MAX, send_limit=CLIENT_MESSAGE_BYTES_MAX
    )
    try:
        # The daemon may have refused and closed already: what it sent before that is still to be read.
        with contextlib.suppress(ChannelClosed):
            channel.send(Hello(PROTOCOL_VERSION, role, os.getpid(), VERSION, on_gpu), timeout_s=timeout_s)
        answer, fds = _receive(channel, text, deadline, timeout_s)
        try:
            welcome = from_json(answer, Welcome)
            if welcome.hello != PROTOCOL_VERSION:
                raise DaemonError(
                    f"{text}: the daemon speaks version {welcome.hello} of the protocol, this is version "
                    f"{PROTOCOL_VERSION} (tierstore {VERSION}): install one release for both, and restart the older"
                )
        except BaseException:
            close_fds(fds)
            raise
    except BaseException:
        channel.close()
        raise
    return channel, answer, fds


def ask(
    path: str | os.PathLike[str],
    request: Any,
    kind: type[T],
    timeout_s: float = ASK_S,
    *,
    trusted_uids: Collection[int] = (),
) -> T:
    """Asks a daemon as an administrator. Blocks, for timeout_s in all.

    Args:
        path: of the socket.
        request: one of `messages.Request`.
        kind: the type of the answer.
        timeout_s: for all of it.
        trusted_uids: see `dial`.

    Raises:
        TierStoreError: what `dial` raises, and what the request raised in the daemon, by its class.
    """
    deadline = time.monotonic() + timeout_s
    channel, _, fds = dial(path, "admin", timeout_s, trusted_uids=trusted_uids)
    with channel:
        close_fds(fds)
        with contextlib.suppress(ChannelClosed):
            channel.send(request, timeout_s=max(0.0, deadline - time.monotonic()))
        answer, fds = _receive(channel, os.fspath(path), deadline, timeout_s)
        close_fds(fds)
        return from_json(answer, kind)


def raise_error(message: FromDaemon) -> None:
    """Raises the failure or the goodbye that a message is; returns if it is neither."""
    if message.bye is not None:
        raise ChannelClosed(f"the daemon ended the connection: {message.bye}")
    if message.error is not None:
        kind = getattr(errors, message.error, DaemonError)
        if not (isinstance(kind, type) and issubclass(kind, TierStoreError)):
            kind = DaemonError
        raise kind(message.message)


def _receive(channel: Channel, path: str, deadline: float, timeout_s: float) -> tuple[bytes, list[int]]:
    try:
        data, fds = channel.receive_bytes(deadline - time.monotonic())
    except TimeoutError as error:
        starting = starting_state(path)
        what = f"it is starting ({starting}): ask again" if starting else "it may be stopped or stuck: see its log"
        raise DaemonError(f"{path}: the daemon does not answer within {timeout_s} s; {what}") from error
    except ChannelClosed as error:
        raise ChannelClosed(f"{path}: {error} without an answer; the daemon may have ended: see its log") from error
    try:
        raise_error(from_json(data, FromDaemon))
    except BaseException:
        close_fds(fds)
        raise
    return data, fds


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
    if outcome == errno.ECONNREFUSED and _is_no_socket(path):
        raise DaemonError(f"{path}: that is not a socket; give the path that tierstore serve was given")
    if outcome == errno.ENOENT and _ADDRESS.fullmatch(path):
        raise DaemonError(f"{path}: there is no socket of this name; a server by gRPC is grpc://{path}")
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


def _is_no_socket(path: str) -> bool:
    """Whether a file of another kind is there. A daemon that starts may remove a stale socket at any moment."""
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
