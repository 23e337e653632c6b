"""The swap file: which store a daemon serves in place of the one that its command line names. See FORMAT.md.

Input: the path of a daemon's socket, whose lock is held; swaps. Output: the swap that a daemon at that socket made
last, also after a crash. Errors: `FormatError` for a damaged file, `ConfigError` for one that others may have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..causes import named
from ..durable import replace_file, sync_folder
from ..errors import ConfigError, DaemonError, FormatError
from ..ipc.identity import known_ids

HEAD = b"tierstore swap 1\n"
FILE_BYTES_MAX = 64 << 10
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # waits for nothing that another put there


@dataclass(frozen=True)
class Swap:
    """What a daemon serves instead of its command line's store. Paths are absolute, identities are those of catalogs.

    store: of the command line, links resolved. previous: what a rollback goes to.
    """

    store: str
    store_identity: str
    serves: str
    serves_identity: str
    previous: str


class SwapFile:
    """The file SOCKET.swap. Only the daemon that holds the socket's lock may use it."""

    def __init__(self, socket_path: str) -> None:
        """socket_path: as the daemon was given it."""
        self.path = f"{socket_path}.swap"
        self._folder = Path(self.path).parent

    def read(self) -> Swap | None:
        """Returns the swap, None if there is no file. Raises `FormatError`, `ConfigError`."""
        try:
            fd = os.open(self.path, READ_FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise named(error, f"{self.path} cannot be read", self.path, note=self._remedy) from error
        try:
            found = os.fstat(fd)
            owners = known_ids("uid", {os.geteuid(), 0})
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o022:
                raise ConfigError(
                    f"{self.path} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}) may have been written "
                    f"by another user: put the socket in a folder that only this user can write to; {self._remedy}"
                )
            data = os.read(fd, FILE_BYTES_MAX + 1)
        finally:
            os.close(fd)
        return self._parsed(data)

    @property
    def _remedy(self) -> str:
        return "to serve STORE as the command line names it, start with --forget-swap"

    def _parsed(self, data: bytes) -> Swap:
        body, _, checksum = data.removesuffix(b"\n").rpartition(b"\n")
        try:
            if not data.startswith(HEAD) or hashlib.sha256(body + b"\n").hexdigest().encode() != checksum:
                raise ValueError("its checksum is of other bytes")
            fields = json.loads(body[len(HEAD) :])
            swap = Swap(**fields)
            if not all(isinstance(value, str) for value in dataclasses.astuple(swap)):
                raise ValueError("a field is not text")
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.path} is damaged ({error}), {len(data)} bytes; {self._remedy}") from error
        return swap

    def write(self, swap: Swap) -> None:
        """Replaces the file; durable when it returns. Raises `DaemonError`, and then leaves it as it was."""
        body = HEAD + json.dumps(dataclasses.asdict(swap)).encode() + b"\n"
        data = body + hashlib.sha256(body).hexdigest().encode() + b"\n"
        try:
            before = self._bytes_now()
            try:
                replace_file(Path(self.path), data, mode=0o600)
            except OSError:
                self._take_back(before)
                raise
        except OSError as error:
            what = f"{self.path} cannot be written, so a restart would not know of the swap"
            raise named(error, what, self.path, writing=True, kind=DaemonError, note="then swap again") from error

    def _bytes_now(self) -> bytes | None:
        try:
            fd = os.open(self.path, READ_FLAGS)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, FILE_BYTES_MAX)
        finally:
            os.close(fd)

    def _take_back(self, before: bytes | None) -> None:
        """Puts back what was in the file, nothing if it was not there, as far as that can be."""
        with contextlib.suppress(OSError):
            if self._bytes_now() == before:
                return
            if before is None:
                os.unlink(self.path)
            else:
                replace_file(Path(self.path), before, mode=0o600)

    def forget(self) -> bool:
        """Removes the file, durably; returns whether there was one. Raises `DaemonError`."""
        try:
            os.unlink(self.path)
            sync_folder(self._folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise named(error, f"{self.path} cannot be removed", self.path, writing=True, kind=DaemonError) from error
        return True
