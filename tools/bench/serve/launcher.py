"""A daemon to measure: `tierstore serve` as a process of its own, started, asked, killed and started again.

Input: a store, a socket's path, a budget, more options of the command. Output: when it was ready, its answers, and what
memory it and its clients take, as the kernel counts that. Its log goes to a file beside the socket. Errors:
`DaemonError`, with the end of its log, if it does not serve in time or ends by itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tierstore.daemon.record import StatRecord
from tierstore.errors import DaemonError
from tierstore.ipc.client_socket import ask
from tierstore.ipc.messages import StatRequest

START_WAIT_S, STOP_WAIT_S = 600.0, 60.0
ASK_S = 600.0
POLL_S = 0.005  # between two looks whether it serves already
LOG_TAIL_BYTES = 2000


class Served:
    """A running `tierstore serve`. Use it in a `with`."""

    def __init__(self, store: Path, socket: Path, dram_bytes: int, *options: str) -> None:
        """Starts it and blocks until it serves."""
        self.socket = socket
        self._command = [sys.executable, "-m", "tierstore.tools.cli", "serve", str(store), "--socket", str(socket)]
        self._command += ["--dram", str(dram_bytes), *options]
        self._log = socket.with_suffix(".log")
        self.start()

    def start(self) -> None:
        """Starts it, also again after `kill`. `ready_s`, since the start of the process,
        `warmed_s` of those for the tiers."""
        started = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log)
        try:
            record = self._first_record(started + START_WAIT_S)
        except BaseException:
            self.kill()
            raise
        self.ready_s = time.perf_counter() - started
        self.warmed_s = time.time() - record.daemon.started_at

    def _first_record(self, deadline: float) -> StatRecord:
        while True:
            try:
                return self.stat()
            except DaemonError as error:  # there is no socket yet
                if self._process.poll() is not None or time.perf_counter() > deadline:
                    last_words = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
                    raise DaemonError(f"{' '.join(self._command)} did not begin to serve:\n{last_words}") from error
                time.sleep(POLL_S)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, do: str, **more: str) -> dict[str, Any]:
        """Returns its answer to an administrator's request. Blocks, ASK_S at most."""
        return ask(self.socket, {"do": do, **more}, dict[str, Any], timeout_s=ASK_S)

    def stat(self) -> StatRecord:
        """Returns its stat record."""
        return ask(self.socket, StatRequest(), StatRecord, timeout_s=ASK_S)

    def kill(self) -> None:
        """Kills it, as a machine that runs out of memory would."""
        self._process.kill()
        self._process.wait(STOP_WAIT_S)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()


def proportional_bytes(pids: Iterable[int]) -> dict[str, int]:
    """Returns what processes take together, a page that many map counted once: "Pss", and of it "Pss_Shmem",
    shared memory.

    Source: smaps_rollup of proc(5). Raises `DaemonError` if one of them has ended.
    """
    total = {"Pss": 0, "Pss_Shmem": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise DaemonError(f"process {pid} ended while it was measured; its words are above") from error
        for line in lines:
            name, _, value = line.partition(":")
            if name in total:
                total[name] += int(value.split()[0]) * 1024
    return total
