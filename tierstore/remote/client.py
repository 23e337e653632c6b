"""A store on another host, by gRPC: the same `Store`, whose engine asks a `RemoteServer`.

Input: a URL, files with a token and certificates. Output: a `Store`. Errors: `FormatError` if something else than a
tierstore answers, and what `Connection` raises.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..store.backing import Backing
from ..store.store import Store
from ..units import parse_bytes
from .channel import Connection
from .cluster import Cluster
from .engine import RemoteEngine
from .member import Member
from .peer import Peer, describe

CLOSE_S = 10.0  # that threads of a store over several servers may take to end


def connect_remote(
    url: str | Sequence[str],
    *,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    timeout_s: float = 30.0,
    dram: int | str = 0,
) -> Store:
    """Returns the store that a server serves at "grpc://HOST:PORT", or "grpcs://HOST:PORT" by TLS; or several.

    Blocks on the network, at most timeout_s, and as long again for each server with replicas; with dram, until the
    rows that it holds are there.

    Args:
        url: The server's address. A list of addresses, in any order: of servers that each hold a slice of the same
            store (`tierstore build --slice`), and have all of it together. An address may list replicas, the
            preferred one first: "grpcs://a:1|grpcs://b:1".
        token_file: A file with the servers' token, which others may not read.
        ca_file: A PEM file of the authority that signed the servers' certificates; None: the system's authorities.
        timeout_s: The most that any lookup may take, in seconds, including the wait for a server that restarts, and
            for servers to be at one version. An error may take 2 s more, to find out why nobody answers.
        dram: Of a list: bytes of this process for entries that the servers' placements name as the hottest. Their rows
            do not travel again. A lookup that needs no others may be of the version before, whole, for 0.25 s after
            all servers have moved on.

    Raises:
        DaemonError: Nobody answers, the token is missing or wrong, or the certificate is refused.
        StoreNotReadyError: The servers stay at different versions.
        ConfigError: A URL or a file is unfit, slices are missing, overlap or are of different stores, or grpcio is not
            installed.
        FingerprintMismatchError: Slices are of different hashes.
        FormatError: Something else than a tierstore answers.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is {timeout_s}, expected above 0 seconds")
    addresses = [url] if isinstance(url, str) else list(url)
    dram_bytes = parse_bytes(dram, "dram") if dram else 0
    if not addresses or not all(isinstance(address, str) and address for address in addresses):
        raise ConfigError(f"addresses are {addresses!r}, expected at least one grpc://HOST:PORT")
    if isinstance(url, str) and "|" not in url:
        if dram_bytes:
            raise ConfigError(f"{url}: dram is of a store over several servers; give a list of addresses")
        return _connect_one(Connection(url, token_file=token_file, ca_file=ca_file), timeout_s)
    connections = [
        [Connection(each, token_file=token_file, ca_file=ca_file) for each in address.split("|")]
        for address in addresses
    ]
    every = [connection.url for replicas in connections for connection in replicas]
    twice = {each for each in every if every.count(each) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is given twice; give each address once")
    return _connect_several(connections, timeout_s, dram_bytes)


def _connect_one(connection: Connection, timeout_s: float) -> Store:
    try:
        return Store(Remote(connection, timeout_s))
    except BaseException:
        connection.close()
        raise


def _connect_several(connections: Sequence[Sequence[Connection]], timeout_s: float, dram_bytes: int) -> Store:
    members: list[Member] = []
    try:
        for replicas in connections:
            members.append(Member(replicas, time.monotonic() + timeout_s))
        backing = Several(Cluster(members, dram_bytes), timeout_s)
        return Store(backing)
    except BaseException:
        for member in members:
            member.close(0)
        for replicas in connections:
            for connection in replicas:
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

    @property
    def common_build(self) -> str:
        return self._peer.common_build

    def details(self) -> dict[str, Any]:
        memory: dict[str, Any] = {"budget_bytes": 0, "dram_bytes": 0, "staging_bytes": 0, "resident_tables": []}
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


class Several(Backing):
    """The backing of a store over several servers, each with a slice."""

    def __init__(self, cluster: Cluster, timeout_s: float) -> None:
        """Has the servers agree upon a version, and fills the client's own set. Blocks on both."""
        self.name, self._cluster = cluster.url, cluster
        self.specs = [divided.spec for divided in cluster.tables]
        self.attachments = cluster.members[0].attachments
        cluster.check_versions(time.monotonic() + timeout_s)
        cluster.keeper.fill()
        self.engine = RemoteEngine(cluster, self.specs, timeout_s)

    @property
    def build(self) -> str:
        return self._cluster.build

    @property
    def common_build(self) -> str:
        return self._cluster.build

    def details(self) -> dict[str, Any]:
        own = self._cluster.keeper.current
        entries = {spec.name: own.num_entries[index] if own else 0 for index, spec in enumerate(self.specs)}
        num_bytes = own.num_bytes if own else 0
        memory: dict[str, Any] = {"budget_bytes": self._cluster.keeper.budget_bytes, "dram_bytes": num_bytes}
        memory |= {"staging_bytes": 0, "resident_tables": []}
        placement = {
            "epoch": None,
            "static_entries": entries,
            "recency_sets": dict.fromkeys(entries, 0),
            "static_bytes": num_bytes,
            "index_bytes": 0,
        }
        slices = [
            {"url": member.url, "rows": {spec.name: [spec.row_start, spec.row_end] for spec in member.specs}}
            for member in self._cluster.members
        ]
        server = {"url": self.name, "store": self.name, "version": self._cluster.version, "slices": slices}
        return {"io": self.engine.io, "memory": memory, "placement": placement, "server": server}

    def close(self) -> None:
        self._cluster.close(CLOSE_S)
