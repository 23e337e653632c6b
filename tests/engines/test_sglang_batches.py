"""What the plug-in does around SGLang's batches and captures: failures raised, stores quiet; on a fake SGLang."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import fake_sglang
from support.tiny_store import DIM, tiny_hash

import engram_adapter.engines.sglang as plugin

ENGRAM = "sglang.srt.layers.engram"


def start() -> None:
    fake_sglang.load(plugin.register)


def engine(name: str = ENGRAM) -> Any:
    return importlib.import_module(name)


def engram_embedding(layer: int) -> Any:
    spec = tiny_hash()
    rows = spec.num_rows(layer)
    return engine().EngramEmbedding(rows, DIM, layer, (*spec.offsets(layer), rows))


@pytest.mark.usefixtures("sglang", "store")
def test_a_lookup_that_failed_in_a_graph_is_raised_before_the_next_batch() -> None:
    """A replay runs no Python of a layer; the scheduler asks the manager before every batch."""
    start()
    steps = importlib.import_module("engram_adapter.engines.sglang.steps")
    found: list[Exception] = []

    def check() -> None:
        if found:
            raise found.pop()

    lookup = SimpleNamespace(check=check)
    spec = SimpleNamespace(name="layers.1", row_bytes=66)
    table = SimpleNamespace(
        settings=SimpleNamespace(mode="device"),
        store=SimpleNamespace(open_rows=lambda *_arguments, **_named: lookup),
        table=SimpleNamespace(spec=spec),
    )
    layer_steps = steps.steps_of(table)
    manager = engine(fake_sglang.MANAGER).NgramEmbeddingManager()
    assert manager.prepare_for_forward("batch", chunked_req=None) == "batch"
    found.append(TimeoutError("the device waited"))
    with pytest.raises(TimeoutError, match="the device waited"):
        manager.prepare_for_forward(None, chunked_req=None)
    assert manager.prepare_for_forward("batch", chunked_req=None) == "batch"
    del layer_steps


@pytest.mark.usefixtures("sglang", "store")
@pytest.mark.parametrize("phase", ["Decode", "Prefill"])
def test_the_layers_stores_are_quiet_while_graphs_are_captured(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    store = engram_embedding(1).tiered.store
    quiet: list[str] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        quiet.append("quiet")
        yield
        quiet.clear()

    monkeypatch.setattr(store, "quiet", noted)
    runner = getattr(engine(f"{fake_sglang.RUNNER}.{phase.lower()}_cuda_graph_runner"), f"{phase}CudaGraphRunner")()
    runner.look = lambda: list(quiet)
    layers = [engram_embedding(1), engram_embedding(4)]  # which share the store
    assert all(each.tiered.store is store for each in layers)
    runner.capture()
    assert runner.seen_while_captured == ["quiet"]
    assert quiet == []


@pytest.mark.usefixtures("store")
def test_buffers_of_a_chunk_are_there_before_the_engine_sizes_its_cache(sglang: SimpleNamespace) -> None:
    sglang.schedule.chunked_prefill_size = 48
    start()
    embed = engram_embedding(1)
    every = (embed._now, *embed._ahead)
    before = [steps._rows.rows for steps in every]
    columns = tiny_hash().heads * 2
    assert [rows.shape[:2] for rows in before] == [(48, columns)] * 3
    for tokens in (1, 48):
        embed(torch.zeros((tokens, columns), dtype=torch.int64))
        for _ in embed._ahead:
            staged = embed.stage(torch.zeros((tokens, columns), dtype=torch.int64), torch.device("cpu"))
            embed.dequant_staged(staged, None, None, torch.Size((tokens, columns)))
    assert [steps._rows.rows.data_ptr() for steps in every] == [rows.data_ptr() for rows in before]
    embed(torch.zeros((49, columns), dtype=torch.int64))  # a decode batch joined the chunk
    assert embed._now._rows.tokens_max == 64
    assert embed._now.counters.tokens == 1 + 48 + 49


@pytest.mark.usefixtures("store")
def test_buffers_ahead_are_not_taken_where_nothing_is_staged(sglang: SimpleNamespace) -> None:
    sglang.parallel.attn_cp_size = 2
    start()
    assert engram_embedding(1)._ahead == ()
