"""Serves a store to several processes from one copy in memory: python examples/serve_and_connect.py STORE SOCKET

The daemon is `tierstore serve`, as a service manager would start it (`tierstore packaging systemd`).
"""

import multiprocessing
import subprocess
import sys
import time

import numpy as np

import tierstore

WORKERS, LOOKUPS, TOKENS, WAIT_S = 3, 50, 200, 60.0


def work(socket: str, number: int) -> int:
    """Is a process of its own: looks the same keys up as the others. Returns a checksum of their rows."""
    with tierstore.connect(socket, timeout_s=WAIT_S) as store:
        table = next(iter(store.tables.values()))
        keys = np.random.default_rng(0).integers(0, table.spec.num_rows, (TOKENS, len(table.spec.orders)))
        total = sum(int(table.lookup(keys).sum(dtype=np.int64)) for _ in range(LOOKUPS))
        print(f"worker {number}: {LOOKUPS} lookups of {TOKENS} tokens")
        return total


def main() -> None:
    """Starts the daemon and the workers, and ends them."""
    path, socket = sys.argv[1:]
    command = [sys.executable, "-m", "tierstore.tools.cli", "serve", path, "--socket", socket, "--dram", "64MiB"]
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + WAIT_S
            while True:
                try:
                    tierstore.connect(socket).close()
                    break
                except tierstore.DaemonError:  # it warms its tiers first
                    if daemon.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
                totals = pool.starmap(work, [(socket, number) for number in range(WORKERS)])
            assert len(set(totals)) == 1, "every process has the same rows"
            subprocess.run([*command[:3], "stat", socket], check=True)
        finally:
            daemon.terminate()  # clients would go on alone


if __name__ == "__main__":
    main()
