"""Results come in the order in which their functions were put, errors with them, and nothing runs on after `close`."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tierstore.formats import packing, trace
from tierstore.formats.trace import TokenTraceWriter
from tierstore.process.ahead import Ahead


def test_results_come_in_the_order_in_which_they_were_put() -> None:
    ahead: Ahead[int] = Ahead(2, "test")
    release = threading.Event()

    def first() -> int:
        assert release.wait(30)
        return 1

    ahead.put(first)
    ahead.put(release.set)  # the second ends before the first
    ahead.put(int, "3")
    assert len(ahead) == 3
    assert [ahead.take() for _ in range(3)] == [1, None, 3]
    assert len(ahead) == 0
    ahead.close()
    ahead.close()


def test_an_error_is_raised_where_its_result_is_taken_and_the_next_still_comes() -> None:
    ahead: Ahead[int] = Ahead(1, "test")
    ahead.put(int, "x")
    ahead.put(int, "2")
    with pytest.raises(ValueError, match="invalid literal"):
        ahead.take()
    assert ahead.take() == 2
    ahead.close()


def test_close_drops_what_has_not_begun_and_waits_for_what_has() -> None:
    ahead: Ahead[None] = Ahead(1, "test")
    begun, release, ran = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert release.wait(30)
        ran.append("first")

    ahead.put(first)
    ahead.put(ran.append, "second")
    assert begun.wait(30)
    threading.Timer(0.05, release.set).start()
    ahead.close()
    assert ran == ["first"]


def test_a_trace_is_the_same_bytes_however_many_threads_compress_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "BLOCK_VALUES", 64)
    ids = np.random.default_rng(0).integers(0, 9999, 1000)
    written = []
    for threads in (0, 1, 3):
        path = tmp_path / f"{threads}.trace"
        with TokenTraceWriter(path, vocab_size=None, source="", threads=threads) as writer:
            for start in range(0, 1000, 37):
                writer.add(ids[start : start + 37], [1])
            writer.finish()
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_trace_whose_compression_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "BLOCK_VALUES", 64)
    monkeypatch.setattr(packing, "pack_block", lambda *_: np.empty(-1))

    def write() -> None:
        with TokenTraceWriter(tmp_path / "t.trace", vocab_size=None, source="", threads=2) as writer:
            writer.add(np.arange(1000))
            writer.finish()

    with pytest.raises(ValueError, match="negative"):
        write()
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tierstore-packing")]
