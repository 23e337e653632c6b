"""tierstore's counters in SGLang's metrics endpoint, if the server was started with --enable-metrics.

Input: what layers count. Output: counters whose names begin with tierstore_engine_, which prometheus_client sums over
SGLang's processes by way of PROMETHEUS_MULTIPROC_DIR. Errors: none.

prometheus_client is imported when the first layer is built: SGLang sets that variable first, and it is read at import.
"""

from __future__ import annotations

import functools
import time
import weakref
from typing import Any

from sglang.srt.runtime_context import get_observability, get_parallel

from tierstore.store.store import Store

from ..rows import RowCounters

PERIOD_S = 1.0  # between two updates of a layer's counters, which are made as steps end

_published: weakref.WeakKeyDictionary[Store, dict[tuple[str, str], int]] = weakref.WeakKeyDictionary()


class LayerMetrics:
    """The counters of one layer, and of the store that it shares with others. One thread at a time."""

    def __init__(self, layer: str, store: Store) -> None:
        """layer: the table's name."""
        self._labels = (str(get_parallel().tp_rank), layer)
        self._store, self._taken, self._due_s = store, (0, 0, 0, 0), 0.0

    def publish(self, counters: RowCounters) -> None:
        """Adds what was counted since the last time, once a period."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + PERIOD_S
        found = (counters.steps, counters.tokens, counters.rows, counters.wait_ns)
        for counter, new, old, unit in zip(_of_layers(), found, self._taken, (1, 1, 1, 1e-9), strict=True):
            counter.labels(*self._labels).inc((new - old) * unit)
        self._taken = found
        self._publish_store()

    def _publish_store(self) -> None:
        keys, read_bytes = _of_stores()
        stats, before = self._store.stats(), _published.setdefault(self._store, {})
        found = {("tier", tier): count for tier, count in stats["hits"].items()}
        found["bytes", "read"] = stats.get("bytes_read", 0)
        for (what, name), count in found.items():
            added, before[what, name] = count - before.get((what, name), 0), count
            if what == "tier":
                keys.labels(self._labels[0], name).inc(max(0, added))
            else:
                read_bytes.labels(self._labels[0]).inc(max(0, added))


def metrics_of(layer: str, store: Store) -> LayerMetrics | None:
    """Returns a layer's metrics, None if the server exports none."""
    return LayerMetrics(layer, store) if get_observability().enable_metrics else None


@functools.cache
def _of_layers() -> tuple[Any, ...]:
    from prometheus_client import Counter

    return tuple(
        Counter(f"tierstore_engine_{name}", text, ("rank", "layer"))
        for name, text in (
            ("steps", "Steps whose rows an engine's layer took"),
            ("tokens", "Tokens of these steps, padding of graphs included"),
            ("rows", "Rows that an engine's layer took"),
            ("wait_seconds", "Time that steps waited for rows"),
        )
    )


@functools.cache
def _of_stores() -> tuple[Any, Any]:
    from prometheus_client import Counter

    keys = Counter("tierstore_engine_keys", "Keys looked up, by tier", ("rank", "tier"))
    return keys, Counter("tierstore_engine_read_bytes", "Bytes read from NVMe", ("rank",))
