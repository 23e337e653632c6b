"""Peers that are servers: started here on the loopback or a Unix socket of their own, ended by their own process id.

Input and output: as in `stores`. Every wait for a server has an end; one that does not start is a `MissingPeerError`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..stores import ROW_BYTES, ROWS_PER_TOKEN
from .stores import SPARE_BYTES, Fetch, KeyValuePeer, MissingPeerError, Peer, PeerRows, imported

START_TIMEOUT_S, STOP_TIMEOUT_S = 30, 10
MOONCAKE = "mooncake-transfer-engine-non-cuda"


class Redis(KeyValuePeer):
    """A Redis server of our own on a Unix socket, nothing saved, asked with MGET."""

    name = "Redis"

    def __init__(self, folder: Path, data: PeerRows) -> None:
        redis = imported("redis", "redis")
        program = shutil.which("redis-server")
        if program is None:
            raise MissingPeerError("redis-server is not installed; apt-get install redis-server")
        path = folder / "redis.sock"
        command = [
            program, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--dir", str(folder),
        ]  # fmt: skip
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            await_ready(path.exists, self._server, "redis-server")
            self._client = redis.Redis(unix_socket_path=str(path), socket_timeout=START_TIMEOUT_S)
            self._client.ping()
            self.fill(data)
        except BaseException:
            end_server(self._server)
            raise

    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        self._client.mset(dict(zip(keys, values, strict=True)))

    def get(self, keys: list[bytes]) -> list[bytes]:
        return list(self._client.mget(keys))

    def close(self) -> None:
        self._client.close()
        end_server(self._server)


class Mooncake(Peer):
    """Mooncake's EngramStore over loopback TCP, with a master of our own: a table of float32 a head, row ids in,
    rows out.

    A row of 264 bytes goes in as 66 floats; only bytes are moved.
    """

    name = "Mooncake EngramStore"

    def __init__(self, folder: Path, data: PeerRows) -> None:
        module = imported("mooncake.store", MOONCAKE)
        package = imported("mooncake", MOONCAKE)
        master, rpc, http, metrics = Path(package.__file__).parent / "mooncake_master", *free_ports(3)
        command = [
            str(master), f"--rpc_port={rpc}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}",
            "--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1",
            f"--http_metadata_server_port={http}",
        ]  # fmt: skip
        quiet = subprocess.DEVNULL
        self._master = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, cwd=folder)
        try:
            await_ready(lambda: listens(rpc) and listens(http), self._master, "mooncake_master")
            self._store = module.MooncakeDistributedStore()
            segment_bytes = 2 * data.rows.nbytes + SPARE_BYTES
            addresses = ("127.0.0.1", f"http://127.0.0.1:{http}/metadata")
            with standard_error_in(folder / "mooncake.log"):
                code = self._store.setup(*addresses, segment_bytes, 2 * SPARE_BYTES, "tcp", "", f"127.0.0.1:{rpc}")
            if code:
                last = (folder / "mooncake.log").read_text(errors="replace").strip().splitlines()[-1:]
                raise MissingPeerError(f"its client does not start over TCP (code {code}): {' '.join(last)}")
            config = module.EngramStoreConfig()
            config.embedding_dim = ROW_BYTES // 4
            config.table_vocab_sizes = [data.num_tokens] * ROWS_PER_TOKEN
            self._engram = module.EngramStore(1, config, self._store)
            heads = data.rows.view(np.float32).reshape(ROWS_PER_TOKEN, data.num_tokens, ROW_BYTES // 4)
            self._engram.populate(list(heads))
        except BaseException:
            end_server(self._master)
            raise

    @property
    def fetches(self) -> dict[str, Fetch]:
        """One side: a row id a head."""

        def by_row(places: np.ndarray, out: np.ndarray) -> None:
            ids = np.repeat(places[None, :, None], ROWS_PER_TOKEN, axis=2)
            out[:] = self._engram.lookup(ids)[0].view(np.uint8)

        return {f"{self.name}, loopback": by_row}

    def close(self) -> None:
        self._store.close()
        end_server(self._master)


def await_ready(ready: Callable[[], bool], server: subprocess.Popen[bytes], name: str) -> None:
    """Waits for a server; raises `MissingPeerError` if it ends, or is not ready within START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if server.poll() is not None:
            raise MissingPeerError(f"{name} ended at once with status {server.returncode}")
        if time.monotonic() > deadline:
            raise MissingPeerError(f"{name} was not ready within {START_TIMEOUT_S} s")
        time.sleep(0.02)


def end_server(server: subprocess.Popen[bytes]) -> None:
    """Ends a server within 2 * STOP_TIMEOUT_S."""
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(STOP_TIMEOUT_S)


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def listens(port: int) -> bool:
    """Whether somebody listens at a port of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def standard_error_in(file: Path) -> Iterator[None]:
    """Sends what native code writes to standard error to a file: Mooncake's client logs every step there."""
    kept = os.dup(2)
    target = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.dup2(target, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(target)
        os.close(kept)
