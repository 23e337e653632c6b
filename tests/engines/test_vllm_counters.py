"""Counters of vLLM's workers: written by each to a file of its own, shown by the process that answers the metrics."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from support.tiny_store import build_tiny, tiny_hash

import tierstore
from engram_adapter.engines.rows import EngineRows
from engram_adapter.engines.vllm import counters
from tests.engines.conftest import row_ids, vllm_config

STAT_LOGGER = "engram_adapter.engines.vllm.stat_logger"
NAME = "model.layers.1"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineRows]:
    """A layer's rows of which 5 tokens were taken, in a process whose temporary folder is the test's."""
    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path))
    path, _ = build_tiny(tmp_path, tiny_hash(), "bf16", seed=2)
    with tierstore.open(path, dram="4MiB") as store:
        taken = EngineRows(store, "layers.1", 8, torch.device("cpu"))
        taken.start(row_ids(tiny_hash(), 1, 5, 1))
        taken.finish()
        yield taken


@pytest.fixture
def stat_logger(vllm: Any) -> Iterator[Any]:
    del vllm
    yield importlib.import_module(STAT_LOGGER)
    sys.modules.pop(STAT_LOGGER, None)


def test_a_workers_counters_are_read_by_its_engine_alone_and_go_with_it(rows: EngineRows) -> None:
    worker = counters.WorkerCounters("abc", 3, {NAME: rows})
    worker.write()
    found = counters.read_counters("abc")
    assert found["3"]["layers"] == {NAME: rows.stats()}
    assert found["3"]["layers"][NAME]["tokens"] == 5
    assert sum(found["3"]["hits"].values()) + found["3"]["rows"] > 0
    assert counters.read_counters("ab") == counters.read_counters("abcd") == {}
    del worker
    gc.collect()
    assert counters.read_counters("abc") == {}


def test_files_of_workers_that_were_killed_are_removed_and_those_of_living_ones_stay(rows: EngineRows) -> None:
    killed, living = (counters.WorkerCounters(name, 0, {NAME: rows}) for name in ("killed", "living"))
    for each in (killed, living):
        each.write()
        os.utime(each._path, (1, 1))
    living.write()  # nothing has changed: the file is touched
    newer = counters.WorkerCounters("newer", 0, {NAME: rows})
    assert counters.read_counters("killed") == {}
    assert counters.read_counters("living")
    del newer


def test_counters_are_written_without_being_asked(rows: EngineRows, monkeypatch: pytest.MonkeyPatch) -> None:
    written = counters.threading.Event()
    write = counters.WorkerCounters.write

    def noted(self: counters.WorkerCounters) -> None:
        write(self)
        written.set()

    monkeypatch.setattr(counters.WorkerCounters, "write", noted)
    monkeypatch.setattr(counters, "WRITE_S", 0.01)
    worker = counters.WorkerCounters("abc", 0, {NAME: rows})
    assert written.wait(30)
    assert counters.read_counters("abc")["0"]["layers"][NAME]["steps"] == 1
    del worker


@pytest.mark.usefixtures("rows")
def test_an_instances_name_is_no_path(tmp_path: Path) -> None:
    assert "/" not in counters.file_stem("../../etc/x*")
    assert "*" not in counters.file_stem("../../etc/x*")
    assert counters.counters_folder().parent == tmp_path


@pytest.mark.usefixtures("rows")
def test_a_folder_that_others_may_open_is_refused() -> None:
    folder = counters.counters_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="alone may open"):
        counters.counters_folder()
    assert counters.read_counters("abc") == {}


def test_a_worker_without_a_folder_serves_all_the_same(rows: EngineRows, caplog: pytest.LogCaptureFixture) -> None:
    counters.counters_folder().chmod(0o755)
    counters.WorkerCounters("abc", 0, {NAME: rows})
    assert "no counters of rank 0" in caplog.text


def test_files_that_cannot_be_read_are_left_out(rows: EngineRows, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = counters.WorkerCounters("abc", 0, {NAME: rows})
    worker.write()
    (counters.counters_folder() / "abc.1.json").write_text("{")
    (counters.counters_folder() / "abc.2.json").write_text(json.dumps({"layers": {}} | {"x": "y" * 4000}))
    monkeypatch.setattr(counters, "FILE_BYTES_MAX", 4000)
    assert list(counters.read_counters("abc")) == ["0"]


def test_the_metrics_page_has_a_workers_counters(rows: EngineRows, stat_logger: Any) -> None:
    worker = counters.WorkerCounters("abc", 1, {NAME: rows})
    worker.write()
    registry = CollectorRegistry()
    registry.register(stat_logger.EngineCollector("abc"))
    lines = generate_latest(registry).decode().splitlines()
    assert f'tierstore_engine_tokens_total{{layer="{NAME}",rank="1"}} 5.0' in lines
    assert f'tierstore_engine_rows_total{{layer="{NAME}",rank="1"}} 40.0' in lines
    assert any(line.startswith('tierstore_engine_wait_seconds_total{layer="') for line in lines)
    assert any(line.startswith('tierstore_engine_keys_total{rank="1",tier="dram"}') for line in lines)
    assert any(line.startswith('tierstore_engine_read_bytes_total{rank="1"}') for line in lines)


def test_the_stat_logger_is_inert_without_settings_and_registers_once_with_them(
    stat_logger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(stat_logger, "REGISTRY", registry)
    made = stat_logger.TierstoreStatLogger(vllm_config({}, None), 0)
    assert list(registry._collector_to_names) == []
    for engine_index in (0, 1):
        made = stat_logger.TierstoreStatLogger(vllm_config({}, tmp_path), engine_index)
    assert len(registry._collector_to_names) == 1
    made.record(scheduler_stats=None, iteration_stats=None, engine_idx=0)
    made.log_engine_initialized()
