"""What a process takes beyond the budget it gave: a store opened and filled in a process of its own, at its peak.

Input: a made store and a budget. Output: bytes of resident memory over the budget, over what the process had before.
The mark is the kernel's VmHWM: getrusage's would begin with what the parent had when it forked.
"""

from __future__ import annotations

import subprocess
import sys

from .stores import MadeStore

TIMEOUT_S = 1800

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
