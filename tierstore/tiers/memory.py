"""Memory: how much this process may still take, and the flat block that the dram tier lives in.

Flows out: bytes available and where the limit comes from (the machine's, or the cgroup's where that is less); blocks of
memory on huge pages where the system allows them. No decision is made here.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

logger = logging.getLogger("tierstore")

_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2^63


def allocate(num_bytes: int, *, inherited: bool = True) -> np.ndarray:
    """Returns zeroed memory, uint8 [num_bytes], page-aligned; on huge pages where the system lets a process ask for them.

    inherited: whether a forked child has it too. What a device writes to must not be: after a fork, the first write would
    give this process another page than the device has.
    """
    if num_bytes == 0:
        return np.empty(0, dtype=np.uint8)
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            logger.warning(
                "no huge pages (%s): small ones serve, a little slower; run 'tierstore doctor'", error.strerror
            )
    if not inherited:
        block.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(block, dtype=np.uint8)


def available_memory(limits: list[CgroupLimit] | None = None) -> tuple[int, str]:
    """Returns (bytes available, what limits them): "machine" or "cgroup". Page cache that can be dropped counts.

    limits: of the cgroups above this process; by default those there are.
    """
    machine = psutil.virtual_memory().available
    left = [max(0, limit.limit_bytes - limit.used_bytes) for limit in (cgroup_limits() if limits is None else limits)]
    if left and min(left) < machine:
        return min(left), "cgroup"
    return machine, "machine"


@dataclass(frozen=True)
class CgroupLimit:
    """A memory limit above this process: bytes, how many are used (page cache left out), and the file that sets it."""

    limit_bytes: int
    used_bytes: int
    file: Path


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[CgroupLimit]:
    """Returns the memory limits of this process's cgroup and of those above it, the least first.

    Version 2 lines are "0::/path" with memory.max, version 1 lines "4:memory:/path" with memory.limit_in_bytes. Inside a
    container the path may be the host's; then the walk up ends at the root, which is the container's own cgroup.
    """
    found = []
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            limit = _text(base / group / limit_name)
            if limit.isdigit() and int(limit) < _UNLIMITED_BYTES:
                usage = _text(base / group / usage_name)
                used_bytes = max(0, int(usage) - _page_cache_bytes(base / group)) if usage.isdigit() else 0
                found.append(CgroupLimit(int(limit), used_bytes, base / group / limit_name))
    return sorted(found, key=lambda limit: limit.limit_bytes)


def _page_cache_bytes(group: Path) -> int:
    """Returns the bytes of a cgroup that the kernel can drop: clean and dirty pages of files."""
    counts = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    names = [name for name in ("total_active_file", "total_inactive_file") if name in counts]  # version 1, children too
    return sum(int(counts[name]) for name in names or ("active_file", "inactive_file") if name in counts)


def _text(file: Path) -> str:
    """Returns what a file of /proc or /sys says, stripped; "" where this kernel or container does not have it."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
