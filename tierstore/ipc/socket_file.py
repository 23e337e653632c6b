"""The socket file: where a daemon listens, which is one daemon's at a time.

Input: a path. Output: a listening socket at it. A file lock beside it, PATH.lock, decides between two that start
at once; it goes with the process that has it, however that ends. A socket that nobody listens on is replaced. Errors:
`DaemonError` or `ConfigError` for a path that a daemon, another program or a file of another kind has, or that is too
long for an address.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat

from ..causes import named
from ..errors import ConfigError, DaemonError

PATH_BYTES_MAX = 107  # of a socket's address on Linux
_URL = re.compile("grpcs?:/")  # also what is left of one that was taken for a path
BACKLOG = 64  # connections that wait to be accepted
PID_CHARS, LOCK_STATE_CHARS = 20, 40
LOCK_BYTES_MAX = PID_CHARS + 1 + LOCK_STATE_CHARS + 1


def check_socket_path(path: str | os.PathLike[str]) -> str:
    """Returns the path of a socket as text. Raises `ConfigError` if no socket can be there."""
    text = os.fspath(path)
    num_bytes = len(os.fsencode(text))
    if _URL.match(text):
        raise ConfigError(
            f"{text}: that is the address of lookups by gRPC; give the path of the daemon's socket, on the daemon's "
            f"own host ('tierstore stat' and tierstore.connect take the address, too)"
        )
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is no path of a socket; give the path of a file, such as /run/tierstore/socket")
    if num_bytes > PATH_BYTES_MAX:
        raise ConfigError(
            f"{text}: a path of {num_bytes} bytes, a socket's has {PATH_BYTES_MAX} at most; give a shorter one"
        )
    return text


class SocketFile:
    """A socket that listens at a path, the only one while this lives. `close` removes the file if it is still ours."""

    def __init__(self, path: str | os.PathLike[str], mode: int) -> None:
        """mode: of the file, 0o600 or 0o666. Raises `DaemonError` if a daemon serves there already,
        else `ConfigError`."""
        self.path = check_socket_path(path)
        self.listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._lock_path = f"{self.path}.lock"
        self._lock_fd = _take_lock(self._lock_path, self.path)
        try:
            _remove_stale(self.path)
            self.listener = self._listen(mode)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise named(error, f"{self.path}: no socket can be made there", self.path, writing=True) from error
            raise

    def _listen(self, mode: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(listener.fileno(), 0o600)  # of the file to come: at no time is it open to more than it should be
            listener.bind(self.path)
            fd = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if not stat.S_ISSOCK(found.st_mode):
                    raise ConfigError(
                        f"{self.path}: another put a file in the socket's place; give a folder of your own"
                    )
                os.chmod(f"/proc/self/fd/{fd}", mode)  # by descriptor, so that no link can lead it astray
                self._identity = (found.st_dev, found.st_ino)
            finally:
                os.close(fd)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def note(self, state: str) -> None:
        """Notes in PATH.lock how far a daemon is that does not answer yet;
        an empty state says that it does."""
        if self._lock_fd >= 0:
            os.pwrite(self._lock_fd, _lock_text(state), 0)

    def close(self) -> None:
        """Stops to listen, removes the file if it is ours, and leaves the lock. Closing twice is harmless."""
        if self.listener is not None:
            self.listener.close()
        with contextlib.suppress(OSError):  # gone, or in a folder that is: nothing of ours is left there
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._identity:
                os.unlink(self.path)
        self._identity = None
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._lock_path)  # while it is locked: see `_take_lock`
            os.close(self._lock_fd)
            self._lock_fd = -1


def starting_state(path: str | os.PathLike[str]) -> str:
    """Returns what the daemon of a socket noted of its start ("warming, 43 %"), empty if it serves or noted nothing.

    A daemon that was killed leaves its note, so this counts only if somebody listens and does not answer. Only the
    daemon's user and root can know: the file is theirs.
    """
    try:
        fd = os.open(f"{os.fspath(path)}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        lines = os.pread(fd, LOCK_BYTES_MAX, 0).decode("ascii", "replace").splitlines()
    finally:
        os.close(fd)
    return lines[1].strip() if len(lines) > 1 else ""


def _lock_text(state: str) -> bytes:
    """Returns what PATH.lock holds, always as long: a reader beside the writer sees no rest of a longer text."""
    return f"{os.getpid():<{PID_CHARS}}\n{state:<{LOCK_STATE_CHARS}}\n".encode("ascii", "replace")


def _take_lock(lock_path: str, path: str) -> int:
    """Returns the descriptor of the locked file, which holds our process id for whoever comes second."""
    while True:
        try:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            folder = os.path.dirname(path) or "."
            raise ConfigError(f"{path}: there is no folder {folder}; make it: mkdir -p -m 700 {folder}") from error
        except OSError as error:
            raise named(error, f"{path}: no socket can be made there", lock_path, writing=True) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our opening and locking it: then it locks nothing.
            if os.path.samestat(os.fstat(fd), os.stat(lock_path, follow_symlinks=False)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, _lock_text(""), 0)
                return fd
            os.close(fd)
        except FileNotFoundError:
            os.close(fd)
        except BlockingIOError as error:
            holder = os.pread(fd, PID_CHARS, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise DaemonError(
                f"{path}: a daemon (process {holder}) serves there already; stop it, or give another --socket"
            ) from error
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise named(error, f"{path}: no socket can be made there", lock_path, writing=True) from error
            raise


def _remove_stale(path: str) -> None:
    """Removes the socket that a killed daemon left; raises if it is anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path}: there is a file that is no socket; remove it, or give another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        outcome = probe.connect_ex(path)
    if outcome != errno.ECONNREFUSED:
        raise DaemonError(
            f"{path}: another program listens there ({os.strerror(outcome) if outcome else 'it answers'}); "
            f"stop it, or give another --socket"
        )
    os.unlink(path)
