"""Memory: how much this process may still take, and the flat block that the dram tier lives in.

Flows out: bytes available and where the limit comes from (the machine's, or the cgroup's where that is less); blocks of
memory on huge pages where the system allows them. No decision is made here.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import numpy as np
import psutil

_CGROUP = Path("/sys/fs/cgroup")


def allocate(num_bytes: int) -> np.ndarray:
    """Returns zeroed memory, uint8 [num_bytes], page-aligned; on huge pages where the system lets a process ask for them."""
    if num_bytes == 0:
        return np.empty(0, dtype=np.uint8)
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages serve, a little slower
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


def available_memory(cgroup: Path = _CGROUP) -> tuple[int, str]:
    """Returns (bytes available, what limits them): "machine" or "cgroup". Page cache that can be dropped counts."""
    machine = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, usage = _number(cgroup / limit_file), _number(cgroup / usage_file)
        if limit is not None and usage is not None and limit - usage < machine:
            return max(0, limit - usage), "cgroup"
    return machine, "machine"


def _number(file: Path) -> int | None:
    """Returns the number in a cgroup file, None where there is no such file or no limit ("max")."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
