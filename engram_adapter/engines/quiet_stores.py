"""While an engine captures CUDA graphs, no thread of a store allocates, synchronises or copies: it would end a capture.

Input: the stores that an engine's layers use. Output: a time within `Store.quiet` of each. Errors: as `Store.quiet`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from tierstore.store.store import Store


@contextlib.contextmanager
def quiet_stores(stores: Iterable[Store]) -> Iterator[None]:
    """A time in which none of the stores disturbs a capture; layers may share a store."""
    with contextlib.ExitStack() as stack:
        for store in {id(store): store for store in stores}.values():
            stack.enter_context(store.quiet())
        yield
