"""A store on another host, by gRPC: the same `Store`, whose engine asks a `RemoteServer`.

Input: a URL, files with a token and certificates. Output: a `Store`. Errors: `FormatError` if something else than a
tierstore answers, and what `Connection` raises.
"""

from __future__ import annotations

import os
import time
from typing import Any

from ..errors import ConfigError
from ..store.backing import Backing
from ..store.store import Store
from .channel import Connection
from .engine import RemoteEngine
from .peer import Peer, describe


def connect_remote(
    url: str,
    *,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    timeout_s: float = 30.0,
) -> Store:
    """Returns the store that a server serves at "grpc://HOST:PORT", or "grpcs://HOST:PORT" by TLS.

    Blocks on the network, at most timeout_s.

    Args:
        url: The server's address.
        token_file: A file with the server's token, which others may not read.
        ca_file: A PEM file of the authority that signed the server's certificate; None: the system's authorities.
        timeout_s: The most that any lookup may take, in seconds, including the wait for a server that restarts.

    Raises:
        DaemonError: Nobody answers, the token is missing or wrong, or the certificate is refused.
        ConfigError: The URL or a file is unfit, or grpcio is not installed.
        FormatError: Something else than a tierstore answers.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is {timeout_s}, expected above 0 seconds")
    connection = Connection(url, token_file=token_file, ca_file=ca_file)
    try:
        return Store(Remote(connection, timeout_s))
    except BaseException:
        connection.close()
        raise


class Remote(Backing):
    """The backing of a store reached by gRPC."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        """Asks the server what it has; blocks on it."""
        self._connection = connection
        description, self.specs = describe(connection, time.monotonic() + timeout_s, patient=False)
        self.name = connection.url
        self.attachments = {attachment.name: bytes(attachment.value) for attachment in description.attachments}
        self._description = description
        local = [spec.local for spec in self.specs]
        self._peer = Peer(connection, description, local)
        self.engine = RemoteEngine(self._peer, local, timeout_s)

    @property
    def build(self) -> str:
        return self._peer.build

    def details(self) -> dict[str, Any]:
        memory = {"budget_bytes": 0, "dram_bytes": 0, "staging_bytes": 0, "resident_tables": []}
        counts = {spec.name: 0 for spec in self.specs}
        placement = {
            "epoch": None,
            "static_entries": counts,
            "recency_sets": counts,
            "static_bytes": 0,
            "index_bytes": 0,
        }
        server = {"url": self.name, "store": self._description.name, "version": self._peer.version}
        return {"io": self.engine.io, "memory": memory, "placement": placement, "server": server}

    def close(self) -> None:
        self._connection.close()
