"""Lookups over gRPC, as the daemon serves them: from a store that is attached like any other client's, and counted like
it.

Input: an address and files; the daemon's socket. Output: a `RemoteServer` over an attached store. Errors: `ConfigError`
for options that do not go together, better raised before minutes of warming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..attached.backing import attach
from ..store.options import check_readers, check_threads
from .record import RemoteInfo

STAGING_BYTES = 4 << 20  # of the reads that remote lookups need


@dataclass(frozen=True)
class Remote:
    """Where and how to serve lookups by gRPC.

    threads, readers: as of `tierstore.connect`, of the process that looks up for the network; None: the defaults.
    """

    address: str
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None
    threads: int | None = None
    readers: int | None = None

    def check(self) -> None:
        """Raises `ConfigError` if it cannot be served like that."""
        from ..remote.access import check_options

        check_threads(self.threads)
        check_readers(self.readers)
        check_options(self.address, self.token_file, self.tls_cert, self.tls_key)


class RemoteLookups:
    """Serves from when it is made until `close`."""

    def __init__(self, remote: Remote, socket: str, io: str, is_healthy: Callable[[], bool]) -> None:
        """socket: of the daemon, which must serve already. io: as in `attach`. Raises `ConfigError`."""
        from ..remote.server import RemoteServer

        self._store = attach(socket, io=io, staging=STAGING_BYTES, threads=remote.threads, readers=remote.readers)
        try:
            self._server = RemoteServer(
                self._store, remote.address,
                token_file=remote.token_file, tls_cert=remote.tls_cert, tls_key=remote.tls_key, is_healthy=is_healthy,
            )  # fmt: skip
        except BaseException:
            self._store.close()
            raise

    @property
    def address(self) -> str:
        """Where it serves."""
        return self._server.address

    def reload(self) -> None:
        """Reads certificates and token again."""
        self._server.reload()

    def info(self) -> RemoteInfo:
        """Returns what the stat record says of it."""
        return RemoteInfo(**self._server.record())

    def close(self, timeout_s: float) -> None:
        """Ends it; calls under way have so many seconds."""
        self._server.close(timeout_s)
        self._store.close()
