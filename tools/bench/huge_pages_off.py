"""Huge pages switched off for this process, as on a host that has none to give: `--no-huge-pages`.

Input: none. Output: a context in which new memory comes on small pages, and nobody collapses it. Errors: `ConfigError`
if the kernel refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from tierstore.errors import ConfigError

_PR_SET_THP_DISABLE = 41  # linux/prctl.h


@contextlib.contextmanager
def huge_pages_off() -> Iterator[None]:
    """Has the kernel give this process small pages only, until the context ends. What has huge ones keeps them."""
    _set_disabled(1)
    try:
        yield
    finally:
        _set_disabled(0)


def _set_disabled(value: int) -> None:
    if ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, value, 0, 0, 0) != 0:
        raise ConfigError("the kernel does not let this process switch huge pages off; run without --no-huge-pages")
