"""The rows of an engine's layer: started early, taken later, in one buffer that stays where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.held import held
from support.tiny_store import DIM, build_tiny, tiny_hash
from support.waiting import eventually

import tierstore
from engram_adapter.engines.rows import EngineRows
from tests.engines.conftest import of_ids, row_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path, rows = build_tiny(tmp_path_factory.mktemp("tiny"), tiny_hash(), "bf16", seed=2)
    return path, rows["layers.1"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_ids_of_any_strides_come_into_the_front_of_the_buffer(tiny: Any, dtype: torch.dtype) -> None:
    path, rows = tiny
    with tierstore.open(path, dram="4MiB") as store:
        taken = EngineRows(store, "layers.1", 32, CPU)
        address = taken.rows.data_ptr()
        for tokens in (32, 1, 7):
            ids = row_ids(tiny_hash(), 1, tokens, tokens).to(dtype)
            wide = torch.zeros(tokens, 3, ids.shape[1], dtype=dtype)
            wide[:, 1] = ids
            taken.start(wide[:, 1])
            found = taken.finish()
            assert np.array_equal(found.numpy(), of_ids(rows, ids))
            assert found.data_ptr() == address
        assert taken.stats() == {"steps": 3, "tokens": 40, "rows": 320, "wait_ns": taken.counters.wait_ns}
        assert taken.counters.wait_ns > 0


def test_ids_outside_of_a_range_or_of_the_table_give_zeros(tiny: Any) -> None:
    path, rows = tiny
    ids = row_ids(tiny_hash(), 1, 8, 1)
    ids[0], ids[1, 3] = -1, 1 << 40
    with tierstore.open(path, dram="4MiB") as store:
        whole, part = EngineRows(store, "layers.1", 8, CPU), EngineRows(store, "layers.1", 8, CPU, (0, len(rows) // 3))
        for taken, of_rank in ((whole, rows), (part, rows[: len(rows) // 3])):
            taken.start(ids)
            assert np.array_equal(taken.finish().numpy(), of_ids(of_rank, ids))


def test_a_step_that_nobody_takes_is_dropped(tiny: Any) -> None:
    path, rows = tiny
    first, second = (row_ids(tiny_hash(), 1, 5, seed) for seed in (1, 2))
    with tierstore.open(path, dram="4MiB") as store:
        taken = EngineRows(store, "layers.1", 8, CPU)
        assert len(taken.finish()) == 0
        assert not taken.is_started
        taken.start(first)
        taken.start(second)
        assert taken.is_started
        assert np.array_equal(taken.finish().numpy(), of_ids(rows, second))
        assert not taken.is_started
        assert taken.counters.steps == 1


def test_a_step_that_is_not_over_in_time_is_not_written_over(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tiny
    monkeypatch.setattr("engram_adapter.engines.rows.WAIT_S", 0.05)
    first, second = (row_ids(tiny_hash(), 1, 5, seed) for seed in (1, 2))
    with tierstore.open(path, dram="600KiB") as store:
        taken = EngineRows(store, "layers.1", 8, CPU)
        store._engine.native.inject("slow", 0, 1 << 40)
        taken.start(first)
        with pytest.raises(TimeoutError):
            taken.finish()
        for _ in range(2):
            with pytest.raises(TimeoutError):  # its reads still write to the buffer
                taken.start(second)
        store._engine.native.inject("none")
        monkeypatch.undo()
        taken.start(second)
        assert np.array_equal(taken.finish().numpy(), of_ids(rows, second))


@pytest.mark.parametrize("is_taken", [True, False])
def test_what_a_step_raised_is_not_raised_by_the_next(tiny: Any, is_taken: bool) -> None:
    path, rows = tiny
    first, second = (row_ids(tiny_hash(), 1, 5, seed) for seed in (1, 2))
    with tierstore.open(path, dram="600KiB") as store:
        taken = EngineRows(store, "layers.1", 8, CPU)
        store._engine.native.inject("failing", 0, 1 << 40)
        taken.start(first)
        if is_taken:
            with pytest.raises((tierstore.TierStoreError, OSError)):
                taken.finish()
        else:
            eventually(taken._ticket.done, "the end of the reads")
        store._engine.native.inject("none")
        taken.start(second)
        assert np.array_equal(taken.finish().numpy(), of_ids(rows, second))


@pytest.mark.parametrize("shape", [(9, 8), (4, 7), (8,), (2, 4, 8)])
def test_ids_of_another_shape_are_refused(tiny: Any, shape: tuple[int, ...]) -> None:
    with tierstore.open(tiny[0], dram="4MiB") as store:
        taken = EngineRows(store, "layers.1", 8, CPU)
        with pytest.raises(ValueError, match=r"table layers\.1: row ids of a step are .*, expected up to \[8, 8\]"):
            taken.start(torch.zeros(shape, dtype=torch.int64))


def test_it_keeps_its_store_open_and_lets_go_of_it(tiny: Any) -> None:
    taken = EngineRows(tierstore.open(tiny[0], dram="4MiB"), "layers.1", 8, CPU)
    taken.start(row_ids(tiny_hash(), 1, 5, 1))
    assert taken.finish().shape == (5, 8, 2 * DIM)
    before = held()
    del taken
    assert held() < before, "the files of its store"


def test_an_error_of_the_reads_comes_out_of_the_step(tiny: Any) -> None:
    store = tierstore.open(tiny[0], dram="4MiB")
    taken = EngineRows(store, "layers.1", 8, CPU)
    store.close()
    with pytest.raises(tierstore.StoreNotReadyError):
        taken.start(row_ids(tiny_hash(), 1, 5, 1))
