"""Mooncakes to test with: the real one, with a master and a holder of memory of our own, and a folder that stands in.

Each has `address`, `names()`, and what happens to objects or servers: `remove`, `replace`, `stop` and `go_on`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKE_PACKAGE = Path(__file__).parent / "fake_mooncake"
IS_INSTALLED = importlib.util.find_spec("mooncake") is not None
LIMIT_S = 60
HOLDER = """
import sys
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
store = MooncakeDistributedStore()
port, pinned = sys.argv[1], ReplicateConfig()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", "127.0.0.1:" + port) == 0
print("ready", file=sys.stderr, flush=True)
for line in sys.stdin:
    name, num_bytes = line.split()
    assert store.remove(name, True) == 0
    assert int(num_bytes) < 0 or store.put(name, bytes(int(num_bytes)), pinned) == 0
    print("done", file=sys.stderr, flush=True)
store.close()
"""


class FakeMooncake:
    """Files of a folder, behind a package of the same name."""

    address = "mooncake://127.0.0.1:50051"

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        patch.setenv("FAKE_MOONCAKE", os.fspath(folder))
        patch.setenv("PYTHONPATH", os.fspath(FAKE_PACKAGE))
        patch.setattr(importlib.util, "find_spec", lambda _: True)

    def remove(self, name: str) -> None:
        (self.folder / name.replace("/", "|")).unlink()

    def replace(self, name: str, num_bytes: int) -> None:
        (self.folder / name.replace("/", "|")).write_bytes(bytes(num_bytes))

    def stop(self) -> None:
        (self.folder / "hang").touch()

    def go_on(self) -> None:
        (self.folder / "hang").unlink()

    def close(self) -> None:
        pass


class RealMooncake:
    """A master and a client that gives 64 MiB of memory, over loopback TCP."""

    def __init__(self, folder: Path) -> None:
        import mooncake

        with socket.socket() as first, socket.socket() as second:
            for each in (first, second):
                each.bind(("127.0.0.1", 0))
            port, metrics_port = (each.getsockname()[1] for each in (first, second))
        self.address = f"mooncake://127.0.0.1:{port}"
        program = Path(mooncake.__file__).parent / "mooncake_master"
        log = (folder / "master.log").open("wb")
        self.master = subprocess.Popen(
            [program, f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics_port}"],
            stdout=log,
            stderr=log,
        )
        self._await_port(port)
        self.holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(port)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._await_line("ready")

    def _await_port(self, port: int) -> None:
        end = time.monotonic() + LIMIT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.master.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)

    def _await_line(self, wanted: str) -> None:
        assert self.holder.stderr is not None
        seen = []
        for line in self.holder.stderr:
            seen.append(line)
            if line.strip() == wanted:
                return
        raise AssertionError("".join(seen))

    def _do(self, name: str, num_bytes: int) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.write(f"{name} {num_bytes}\n")
        self.holder.stdin.flush()
        self._await_line("done")

    def remove(self, name: str) -> None:
        self._do(name, -1)

    def replace(self, name: str, num_bytes: int) -> None:
        self._do(name, num_bytes)

    def stop(self) -> None:
        self.master.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.master.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for process in (self.holder, self.master):
            process.kill()
            process.wait()
        for pipe in (self.holder.stdin, self.holder.stderr):
            assert pipe is not None
            pipe.close()
