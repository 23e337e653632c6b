"""How much memory this process may still take: the machine's, or the cgroup's where that is less.

Flows out: bytes and where the limit comes from. Read once when a budget is asked for; no decision is made here.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


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
