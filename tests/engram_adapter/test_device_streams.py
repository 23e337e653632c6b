"""In which order streams wait for each other, and what a captured graph may not hold,
told by streams that only note it.

Kernels run at once here, in whatever order they are launched: a missing wait gives no wrong value without a GPU. So
streams and events are stood in for by ones that note who waits for whom,
and lookups by ones that note where they were launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import DIM, VOCAB_SIZE, build_tiny, decoded, tiny_hash

import tierstore
from engram_adapter.device_embedding import DeviceCall
from engram_adapter.embedding import TieredEmbedding
from tierstore.decisions import hbm_budget

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its own streams are used")
CPU = torch.device("cpu")


class Streams:
    """The one at hand is `main`, or that of a `with` of `torch.cuda.stream`."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.now = [Stream(self, "main")]
        self.capturing = False

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.now.append(stream)
        yield
        self.now.pop()


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: Stream) -> None:
        self.streams.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: Event) -> None:
        self.streams.log.append((self.name, "waits for", f"event of {event.recorded}"))


class Event:
    def __init__(self) -> None:
        self.recorded = "nobody"

    def record(self, stream: Stream) -> None:
        self.recorded = stream.name

    def synchronize(self) -> None:
        pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: made.now[-1])
    monkeypatch.setattr(torch.cuda, "stream", made.use)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: made.log.append(("host", "waits for", "all")))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: made.log.append(("shared with", stream.name)))
    return made


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[tierstore.Store, dict[str, np.ndarray]]]:
    monkeypatch.setattr(hbm_budget, "PINNED_DRAM_FRACTION", 1 / 2)  # of so small a budget
    path, rows = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    with tierstore.open(path, dram="480KiB", hbm="1MiB", device="cpu") as opened:
        yield opened, rows


@pytest.fixture
def embedding(
    store: tuple[tierstore.Store, dict[str, np.ndarray]], streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> TieredEmbedding:
    """On two streams, whose lookups note where they start and finish."""
    from tierstore.tiers.hbm import device, lookup, stream_order

    for module in (device, lookup, stream_order):
        monkeypatch.setattr(module, "is_capturing", lambda _device: streams.capturing)
    for name in ("start", "start_known", "finish"):
        act = getattr(lookup.DeviceLookup, name)

        def noted(self: Any, *arguments: Any, act: Any = act, name: str = name) -> None:
            streams.log.append((name, streams.now[-1].name))
            act(self, *arguments)

        monkeypatch.setattr(lookup.DeviceLookup, name, noted)
    made = TieredEmbedding(store[0], 1, tiny_hash())
    made._on_device._side = Stream(streams, "side")
    return made


def tokens(seed: int, batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length)))


def right(rows: dict[str, np.ndarray], token_ids: torch.Tensor) -> torch.Tensor:
    return decoded(rows["layers.1"][tiny_hash().row_ids(token_ids.numpy(), 1)], "bf16")


def test_a_forward_waits_for_a_prefetch_that_it_drops_before_it_uses_its_buffers(
    embedding: TieredEmbedding, streams: Streams
) -> None:
    embedding.prefetch(tokens(1))
    streams.log.clear()
    embedding(tokens(2))
    dropped, waited = streams.log.index(("finish", "side")), streams.log.index(("main", "waits for", "side"))
    assert dropped < waited < streams.log.index(("start", "main"))


def test_memory_of_a_prefetch_is_shared_with_the_stream_that_takes_it(
    embedding: TieredEmbedding, streams: Streams
) -> None:
    embedding.prefetch(tokens(1))
    assert ("shared with", "side") in streams.log  # the values are the main one's
    streams.log.clear()
    embedding(tokens(1))
    assert streams.log.count(("shared with", "main")) == 2  # the keys are the other's


def test_a_lookup_on_another_stream_waits_for_the_one_before(embedding: TieredEmbedding, streams: Streams) -> None:
    embedding(tokens(1))
    (lookup,) = embedding._on_device._lookups.values()
    lookup._order._done = Event()
    embedding(tokens(2))
    streams.log.clear()
    with streams.use(Stream(streams, "other")):
        embedding(tokens(3))
    assert ("other", "waits for", "event of main") in streams.log


def test_what_went_wrong_in_a_lookup_of_another_size_is_raised_at_the_next_call(embedding: TieredEmbedding) -> None:
    bad = tokens(1, batch=2, length=70)
    bad[1, 33] = VOCAB_SIZE
    embedding(bad)
    with pytest.raises(ValueError, match=r"sequence 1, position 33 "):
        embedding(tokens(2))
    embedding(tokens(2))


def test_a_graphs_capture_makes_no_buffers(embedding: TieredEmbedding, streams: Streams) -> None:
    streams.capturing = True
    with pytest.raises(tierstore.ConfigError, match="cannot be made while a graph is captured"):
        embedding(tokens(1))
    streams.capturing = False
    embedding(tokens(1))
    streams.capturing = True
    embedding(tokens(1))


@pytest.mark.parametrize("taken", [True, False])
def test_a_graphs_capture_does_not_finish_what_was_started_before_it(
    embedding: TieredEmbedding, streams: Streams, store: tuple[tierstore.Store, dict[str, np.ndarray]], taken: bool
) -> None:
    embedding.prefetch(tokens(1))
    streams.capturing = True
    with pytest.raises(tierstore.ConfigError, match="started before the graph's capture"):
        embedding(tokens(1 if taken else 2))
    streams.capturing = False
    assert torch.equal(embedding(tokens(1)), right(store[1], tokens(1)))


def test_ids_of_the_host_are_refused_in_a_capture_and_wait_for_replays_after_it(
    embedding: TieredEmbedding, streams: Streams
) -> None:
    embedding(tokens(1))
    (lookup,) = embedding._on_device._lookups.values()
    keys = tiny_hash().keys(tokens(1).numpy(), 1).reshape(-1, 2)
    values = torch.empty((5, 8, DIM), dtype=torch.bfloat16)
    streams.capturing = True
    with pytest.raises(tierstore.ConfigError, match="cannot be looked up in a captured graph"):
        lookup.start_known(keys, values)
    streams.capturing = False
    noted: list[str] = []
    lookup._tier.synchronize = lambda: noted.append("waited")
    lookup.start_known(keys, values)
    assert noted == ["waited"]
    del lookup._tier.synchronize


def test_a_dropped_prefetch_whose_reads_fail_is_nobodys_error(
    embedding: TieredEmbedding, store: tuple[tierstore.Store, dict[str, np.ndarray]]
) -> None:
    def on_host(seed: int) -> DeviceCall:
        call = DeviceCall(tokens(seed), None, None, CPU, 2)
        call.on_host = True  # as ids on the host are beside a GPU
        return call

    native = store[0]._engine._engine.native
    native.inject("failing", 0, 1 << 40)
    embedding._on_device.prefetch(on_host(1))
    reading = embedding._on_device._started.lookup._reads._newest
    with pytest.raises(tierstore.CorruptPageError):
        reading.wait(60)
    native.inject("none")
    assert torch.equal(embedding._on_device.forward(on_host(2)), right(store[1], tokens(2)))
