"""Options that every way to open a store on this host shares.

Input: io, threads, readers, hbm and device, as the user gave them. Output: the hbm tier that was asked for. Errors:
`ConfigError`.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

from ..decisions.budget import READERS_LIMIT
from ..errors import ConfigError
from ..tiers.nvme import IO_MODES
from ..units import parse_bytes

DEFAULT_DEVICE = "cuda:0"
THREADS_LIMIT = 1024


class HbmOptions(NamedTuple):
    """An hbm tier that was asked for: how much of which device's memory."""

    num_bytes: int
    device: str


def check_threads(threads: int | None) -> int | None:
    """Returns `threads`, of `tierstore.open` and `connect`. Raises `ConfigError` unless it is 1 to 1,024, or None."""
    return _check_count("threads", threads, THREADS_LIMIT)


def check_readers(readers: int | None) -> int | None:
    """Returns `readers`, of `tierstore.open` and `connect`. Raises `ConfigError` unless it is 1 to 256, or None."""
    return _check_count("readers", readers, READERS_LIMIT)


def _check_count(name: str, count: int | None, limit: int) -> int | None:
    if count is None:
        return None
    if not isinstance(count, bool) and hasattr(count, "__index__") and 1 <= operator.index(count) <= limit:
        return operator.index(count)
    raise ConfigError(f"{name}: {count!r} is no number from 1 to {limit:,}; leave it out for the default")


def check_options(io: str, hbm: int | str | None, device: str | None) -> HbmOptions | None:
    """Checks `io`, `hbm` and `device`; returns the hbm tier that they ask for.

    Args:
        io: How pages are read: "auto", "uring", "mmap" or "pread".
        hbm: Bytes of GPU memory, a number or a text such as "4GiB"; None for no hbm tier.
        device: The GPU, such as "cuda:0"; None for the first one.

    Returns:
        The tier's bytes and device; None if `hbm` is None.

    Raises:
        ConfigError: An unknown `io`, a malformed `hbm`, or a `device` without `hbm`.
    """
    if io not in IO_MODES:
        raise ConfigError(f"io: {io!r} is not one of {', '.join(IO_MODES)}")
    if hbm is not None:
        return HbmOptions(parse_bytes(hbm, "hbm"), device or DEFAULT_DEVICE)
    if device is not None:
        raise ConfigError(
            f"device={device!r} is for the hbm tier: pass hbm, the bytes of its memory to use, or leave device out"
        )
    return None
