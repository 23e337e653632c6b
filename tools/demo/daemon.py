"""The demo's last step: the store served by a daemon to two processes, each of which checks every row that it looks up.

Input: a store, its checkpoint, documents. Output: what each process compared and found wrong, and how the daemon says
that it fared. Run as a module, it is one of those processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tierstore
from engram_adapter import HashSpec
from tierstore.errors import DaemonError
from tierstore.formats.checkpoint import Checkpoint

from ..stat.command import fetch_record
from .checks import check_rows

NUM_CLIENTS = 2
READY_S = 120.0
CLIENT_S = 300.0
END_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class Checked:
    """What one process compared, how many rows differed, and the share of its keys that memory held."""

    compared: int
    different: int
    hit_rate: float


@contextlib.contextmanager
def served(store: Path, dram_bytes: int) -> Iterator[Path]:
    """Runs `tierstore serve` in a process of its own; yields its socket once it answers, and ends it with SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="tierstore-") as folder:  # a socket's path must be short
        socket, log = Path(folder) / "demo.sock", Path(folder) / "log"
        command = [sys.executable, "-m", "tierstore.tools.cli", "serve", str(store)]
        command += ["--socket", str(socket), "--dram", str(dram_bytes)]
        with log.open("w") as stream:
            daemon = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            _wait_ready(socket, daemon, log)
            yield socket
        finally:
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(END_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if daemon.returncode != 0:
            raise DaemonError(f"the daemon ended with status {daemon.returncode}: {log.read_text()[-2000:]}")


def _wait_ready(socket: Path, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            fetch_record(socket)
            return
        except DaemonError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise DaemonError(f"the daemon is not ready ({error}): {log.read_text()[-2000:]}") from error
        threading.Event().wait(POLL_S)


def check_clients(
    socket: Path, checkpoint: Path, documents: list[np.ndarray], num_tokens: int, work: Path
) -> list[Checked]:
    """Has NUM_CLIENTS processes look documents up at once, each its part,
    and check every row against the checkpoint. Blocks."""
    clients = []
    for number in range(NUM_CLIENTS):
        file = work / f"client-{number}.npz"
        np.savez(file, *documents[number::NUM_CLIENTS])
        command = [sys.executable, "-m", __name__, str(socket), str(checkpoint), str(file), str(num_tokens)]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        outputs = [client.communicate(timeout=CLIENT_S)[0] for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.wait()
    if any(client.returncode for client in clients):
        raise DaemonError(f"clients ended with {[client.returncode for client in clients]}; their errors are above")
    return [Checked(**json.loads(output)) for output in outputs]


def main(socket: str, checkpoint: str, file: str, num_tokens: str) -> None:
    """One client: attaches, checks, and prints what it found as JSON."""
    with np.load(file) as parts:
        documents = [parts[name] for name in parts.files]
    with tierstore.connect(socket) as store:
        spec = HashSpec.from_store(store)
        compared, different = check_rows(store, spec, Checkpoint.open(Path(checkpoint)), documents, int(num_tokens))
        stats = store.stats()
        print(json.dumps(vars(Checked(compared, different, stats["hits"]["dram"] / stats["keys"]))))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
