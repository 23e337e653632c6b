"""Peaks of memory: what a store takes beyond the budget it gave, and what a command and its workers take together.

Input: a made store and a budget; or a command. Output: bytes of resident memory. The marks are the kernel's VmHWM:
getrusage's would begin with what the parent had when it started the process.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .stores import MadeStore

TIMEOUT_S = 1800
SAMPLE_S = 0.01

_FILL = """
import contextlib, pathlib, sys
import numpy as np, psutil, tierstore
from tierstore.tools.bench.stores import TABLE, fresh_keys, rows_buffer
path, dram_bytes, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator, out = np.random.default_rng(), rows_buffer(1024)
keys = fresh_keys(generator, tokens)
with contextlib.suppress(OSError):  # the highest mark so far is forgotten, where the kernel allows it
    pathlib.Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
with tierstore.open(path, dram=dram_bytes) as store:
    table = store[TABLE]
    for start in range(0, tokens, len(out)):
        part = keys[start : start + len(out)]
        table.lookup(part, out[: len(part)])
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
print(peak - before)
"""


def growth_bytes(made: MadeStore, dram_bytes: int) -> int:
    """Returns the bytes by which a new process grew beyond `dram_bytes` while lookups
    filled its caches twice over. Blocks."""
    tokens = 2 * dram_bytes // (made.spec.entry_bytes * len(made.spec.orders)) + 1
    command = [sys.executable, "-c", _FILL, str(made.path), str(dram_bytes), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return int(done.stdout.split()[-1]) - dram_bytes


def peak_bytes(command: list[str]) -> int:
    """Runs a command; returns the most bytes of memory that it and its children had, each at its own time, together.

    The marks are looked at every SAMPLE_S: what a process took in its last moment may be missing. Blocks. Raises
    `CalledProcessError`, `TimeoutExpired`.
    """
    ends_s = time.monotonic() + TIMEOUT_S
    peaks: dict[int, int] = {}
    with subprocess.Popen(command) as process:
        try:
            tree = psutil.Process(process.pid)
            while process.poll() is None:
                if time.monotonic() > ends_s:
                    raise subprocess.TimeoutExpired(command, TIMEOUT_S)
                with contextlib.suppress(psutil.Error):
                    for pid in (process.pid, *(child.pid for child in tree.children(recursive=True))):
                        peaks[pid] = max(peaks.get(pid, 0), _high_mark_bytes(pid))
                time.sleep(SAMPLE_S)
        finally:
            process.kill()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return sum(peaks.values())


def _high_mark_bytes(pid: int) -> int:
    """Returns VmHWM of a process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
