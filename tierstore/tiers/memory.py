"""Memory: how much this process may still take, and the flat block that the dram tier lives in.

Output: bytes available, and which limit leaves the least: the machine's, a cgroup's (memory.max, memory.high, version
1), or the process's own; blocks of memory on huge pages if the system allows them. No decision is made here. Each limit
has more than one source, because sandboxes hide some: without /proc/meminfo the machine's memory is what sysconf says.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil

logger = logging.getLogger("tierstore")

_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2^63


def allocate(num_bytes: int, *, inherited: bool = True) -> np.ndarray:
    """Returns zeroed memory, uint8 [num_bytes], page-aligned;
    on huge pages if the system lets a process ask for them.

    inherited: whether a forked child has it too. What a device writes to must not be: after a fork, the first write
    would give this process another page than the device has.
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
    """Returns (bytes available, what limits them). Page cache that can be dropped counts as available.

    What limits them: "machine", "cgroup", or the process's own limit of addresses.

    Args:
        limits: Of the cgroups above this process; by default those there are.
    """
    found = [(_machine_available(), "machine")]
    for limit in cgroup_limits() if limits is None else limits:
        found.append((max(0, limit.limit_bytes - limit.used_bytes), "cgroup"))
    if (left := _addresses_left()) is not None:
        found.append((left, "limit of addresses (ulimit -v)"))
    return min(found, key=lambda pair: pair[0])


def total_memory() -> int:
    """Returns the bytes of memory that the machine has."""
    try:
        return int(psutil.virtual_memory().total)
    except OSError:  # no /proc/meminfo
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _machine_available() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except OSError as error:  # /proc may show processes only (mount option subset=pid, sandboxes)
        total_bytes = total_memory()
        _warn_once(
            f"how much memory is free is not known ({error}): all that the machine has is counted, {total_bytes} bytes"
        )
        return total_bytes


@lru_cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _addresses_left(limit: int | None = None, statm: Path = Path("/proc/self/statm")) -> int | None:
    """Returns how many bytes this process may still map; None if it has no limit, or nothing says how many it has."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0] if limit is None else limit
    mapped_pages = _text(statm).partition(" ")[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used_bytes = int(mapped_pages) * mmap.PAGESIZE if mapped_pages.isdigit() else 0
    return max(0, limit - used_bytes)


@dataclass(frozen=True)
class CgroupLimit:
    """A memory limit above this process: bytes, how many are used (page cache left out), and the file that sets it."""

    limit_bytes: int
    used_bytes: int
    file: Path


# Of cgroup version 2. Beyond memory.high the kernel kills nothing, it slows the process down to a crawl.
_LIMITS_V2 = ["memory.max", "memory.high"]
_LIMITS_V1 = ["memory.limit_in_bytes"]


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[CgroupLimit]:
    """Returns the memory limits of this process's cgroup and of those above it, the least first.

    Version 2 lines are "0::/path" with memory.max and memory.high, version 1 lines "4:memory:/path" with
    memory.limit_in_bytes. A host with both mounts version 2 at `unified`. Inside a container the path may be the
    host's; then the walk up ends at the root, which is the container's own cgroup.
    """
    found = []
    for group, is_v2 in _cgroups("memory", root, membership):
        usage_name = "memory.current" if is_v2 else "memory.usage_in_bytes"
        for name in _LIMITS_V2 if is_v2 else _LIMITS_V1:
            limit = _text(group / name)
            if limit.isdigit() and int(limit) < _UNLIMITED_BYTES:
                found.append(CgroupLimit(int(limit), _used_bytes(group, usage_name), group / name))
    return sorted(found, key=lambda limit: limit.limit_bytes)


def usable_cores(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Returns how many cores this process may keep busy: those that it may run on, at most what its cgroups' quotas
    pay for (cpu.max, or of version 1 cpu.cfs_quota_us of each cpu.cfs_period_us), rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group, is_v2 in _cgroups("cpu", root, membership):
        if is_v2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def _cgroups(controller: str, root: Path, membership: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the folders of the cgroups that a controller may limit this process by, and whether each is version 2."""
    for line in _text(membership).splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [root, root / "unified"]
        elif controller in controllers.split(","):
            bases = [root / controller, root / controllers]
        else:
            continue
        inner = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        for base in dict.fromkeys(bases):
            for folder in (inner, *inner.parents):
                yield base / folder, controllers == ""


def _used_bytes(group: Path, usage_name: str) -> int:
    usage = _text(group / usage_name)
    return max(0, int(usage) - _page_cache_bytes(group)) if usage.isdigit() else 0


def _page_cache_bytes(group: Path) -> int:
    """Returns the bytes of a cgroup that the kernel can drop: clean and dirty pages of files."""
    counts = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    names = [name for name in ("total_active_file", "total_inactive_file") if name in counts]  # version 1, children too
    return sum(int(counts[name]) for name in names or ("active_file", "inactive_file") if name in counts)


def _text(file: Path) -> str:
    """Returns the text of a file of /proc or /sys, stripped; "" if this kernel or container does not have it."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
