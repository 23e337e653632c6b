"""tierstore's counters in vLLM's metrics endpoint: the entry point of `vllm.stat_logger_plugins`.

Input: the files that workers of this host write (`counters`), read when the endpoint is asked. Output: metrics whose
names begin with tierstore_engine_. Errors: none; a worker without a file has no metrics. Imported by vLLM alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from .checks import settings_of
from .counters import read_counters

_collected: set[str] = set()  # instances whose collector is registered in this process


class TierstoreStatLogger(StatLoggerBase):
    """Registers the collector of an engine when the engine's front starts; of its own it records nothing."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:  # noqa: ARG002
        """engine_index: of a data-parallel engine; all share one instance."""
        instance_id = str(vllm_config.instance_id)
        if settings_of(vllm_config) is not None and instance_id not in _collected:
            _collected.add(instance_id)
            REGISTRY.register(EngineCollector(instance_id))

    def record(self, *_: Any, **__: Any) -> None:
        """Does nothing: the workers count."""

    def log_engine_initialized(self) -> None:
        """Does nothing."""


class EngineCollector(Collector):
    """Metrics of one engine's workers."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id

    def describe(self) -> list[CounterMetricFamily]:
        """Returns no names, so that registering reads no files."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yields the counters as the files have them now."""
        workers = read_counters(self._instance_id)
        of_layers = (
            ("steps", "Steps whose rows an engine's layer took", 1),
            ("tokens", "Tokens of these steps, padding of graphs included", 1),
            ("rows", "Rows that an engine's layer took", 1),
            ("wait_ns", "Time that steps waited for rows", 1e-9),
        )
        for field, text, unit in of_layers:
            name = "wait_seconds" if field == "wait_ns" else field
            family = CounterMetricFamily(f"tierstore_engine_{name}", text, labels=("rank", "layer"))
            for rank, worker in workers.items():
                for layer, counts in worker["layers"].items():
                    family.add_metric((rank, layer), counts[field] * unit)
            yield family
        keys = CounterMetricFamily("tierstore_engine_keys", "Keys looked up, by tier", labels=("rank", "tier"))
        read = CounterMetricFamily("tierstore_engine_read_bytes", "Bytes read from NVMe", labels=("rank",))
        for rank, worker in workers.items():
            for tier, count in worker["hits"].items():
                keys.add_metric((rank, tier), count)
            read.add_metric((rank,), worker["bytes_read"])
        yield from (keys, read)
