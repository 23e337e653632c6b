"""Servers of lookups by gRPC for tests: in this process, or in one of their own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tierstore
from tierstore.remote.server import RemoteServer

SERVER = """
import sys, tierstore
from tierstore.remote.server import RemoteServer

with tierstore.open(sys.argv[1], dram="600KiB") as store:
    server = RemoteServer(store, sys.argv[2])
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()
"""


@contextlib.contextmanager
def serving(path: Path, address: str = "127.0.0.1:0", dram: str = "600KiB", **options: Any) -> Iterator[RemoteServer]:
    """A server in this process, around a store opened for it."""
    with tierstore.open(path, dram=dram) as store:
        server = RemoteServer(store, address, **options)
        try:
            yield server
        finally:
            server.close(5)


@contextlib.contextmanager
def serving_process(path: Path, address: str = "127.0.0.1:0") -> Iterator[str]:
    """A server in a process of its own; yields its address. Killed in the end."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        found = server.stdout.readline().strip()
        assert found, "the server did not start"
        yield found
    finally:
        server.kill()
        server.communicate()
