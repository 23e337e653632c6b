"""What happens at the same time: caches that shrink, prefetches while it goes back, commits while it closes, forks."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.trainable import Pair, Trainable, tiny_caches

import tierstore
from tierstore import kernels
from tierstore.training import merge as merge_module
from tierstore.training import writer as writer_module
from tierstore.training.commits import read_commits, read_training, unpin
from tierstore.training.runs import RunReader, RunWriter

ADAGRAD = tierstore.RowWiseAdagrad(lr=0.05)
NUM_ROWS, CODECS = 300, {"bf16": "bf16"}


def test_a_step_in_parts_changes_every_row_while_the_cache_gives_up_slots(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 64, 4)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    rows = pair.training["bf16"].rows
    bring = rows.bring

    def bring_and_shrink(row_ids: np.ndarray, pins: kernels.RowPins) -> None:
        bring(row_ids, pins)
        rows.num_slots = max(40, rows.num_slots - 4)  # as the writer's thread does

    monkeypatch.setattr(rows, "bring", bring_and_shrink)
    pair.steps(1, 200)
    assert pair.training["bf16"].num_steps == 1
    pair.check_all()
    pair.training.close()


def test_spills_between_commits_are_merged_before_their_runs_are_too_many(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 64, 4)
    monkeypatch.setattr(merge_module, "RUNS_MANY", 8)
    monkeypatch.setattr(merge_module, "RUNS_FEW", 4)
    monkeypatch.setattr(writer_module, "RUNS_UNMERGED_MAX", 12)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    with pair.training:
        most = 0
        for _ in range(6):
            pair.steps(1, 200)
            most = max(most, len(pair.training["bf16"].rows.reader.runs))
        assert pair.training.stats()["rows_spilled"] > 500
        assert 8 < most <= 14  # a merged run and a spill come before the others go
        pair.check_all()
        pair.commit(6).wait()
        pair.reopen(6)
        pair.check_all()
    pair.training.close()


def test_a_commit_that_was_asked_for_is_done_before_it_closes(trainable: Trainable, store: Path) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in range(1, 6):
        pair.steps(1)
        ticket = pair.commit(number)
        pair.reopen(number)  # at once
        assert ticket.wait().number == pair.training.at == number
        pair.check_all()
    pair.training.close()


def in_child(act: Callable[[], object]) -> object:
    """Returns what a forked child, which must end within seconds, says of `act`: the name of its error, or "done"."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(writing, b"done")
        except BaseException as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    until = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def test_a_child_that_was_forked_within_a_step_is_refused_at_once(trainable: Trainable, store: Path) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    table, row_ids = pair.training["bf16"], np.arange(3)
    gradients = np.ones((3, 32), dtype=np.float32)
    acts: list[Callable[[], object]] = [
        lambda: table.gather(row_ids),
        lambda: table.apply(row_ids, gradients),
        lambda: table.pin_rows(row_ids),
        lambda: table.set_step(3),
        lambda: pair.training.commit(1),
        lambda: pair.training.stats(),
    ]
    with pair.training._opened.parts.lock:
        for act in acts:
            assert in_child(act) == "StoreNotReadyError"
    pair.training.close()


def test_a_child_that_closes_takes_nothing_from_its_parent(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 64, 4)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(3, 200)
    assert list((store / "training").glob("*.run.new"))  # no commit names them yet
    assert in_child(pair.training.close) == "done"
    pair.commit(3).wait()
    pair.reopen(3)
    pair.check_all()
    pair.training.close()


def test_a_closing_that_is_interrupted_at_any_line_can_be_done_again(store: Path) -> None:
    code = tierstore.Training.close.__code__
    lines = 0
    for number in range(1, 30):
        training = tierstore.open_training(store, ADAGRAD, dram="16MiB")
        lines = 0

        def trace(frame: FrameType, event: str, _: Any, number: int = number) -> Callable[..., Any] | None:
            nonlocal lines
            if frame.f_code is not code:
                return None
            lines += event == "line"
            if event == "line" and lines == number:
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            training.close()
        except KeyboardInterrupt:
            sys.settrace(None)
            begin = time.monotonic()
            training.close()
            assert time.monotonic() - begin < 20
        finally:
            sys.settrace(None)
        if lines < number:
            break
    assert 3 < lines < 29


def test_a_training_that_the_collector_finds_on_its_own_thread_is_closed(trainable: Trainable, store: Path) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    training, collected = pair.training, threading.Event()
    writer = training._opened.writer
    assert writer is not None
    cycle: list[object] = [training]
    cycle.append(cycle)
    vars(pair).clear()
    del cycle, training
    writer._requests.put(lambda: (gc.collect(), collected.set())[0])
    del writer
    assert collected.wait(20)
    until = time.monotonic() + 20
    while any(thread.name == "tierstore-training-close" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)
    tierstore.open_training(store, ADAGRAD, dram="16MiB").close()


def test_a_prefetch_while_it_goes_back_brings_nothing_of_what_is_dropped(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in (1, 2):
        pair.steps(1)
        pair.commit(number).wait()
        pair.reopen(number)
    training, rows, cleared = pair.training, pair.training["bf16"].rows, threading.Event()
    read, cache, stop_writer = rows.read, rows.cache, training._opened._stop_writer

    class Cache:
        """The table's cache; a while goes by after it was cleared."""

        def clear(self) -> None:
            cache.clear()
            cleared.set()
            time.sleep(0.2)

        def __getattr__(self, name: str) -> Any:
            return getattr(cache, name)

    def read_late(row_ids: np.ndarray, out: np.ndarray) -> Any:
        found = read(row_ids, out)
        if threading.current_thread() is training._opened.prefetches.thread:
            cleared.wait(5)
        return found

    def prefetch_and_stop(timeout_s: float) -> bool:
        training.prefetch({"bf16": np.arange(300)})
        return stop_writer(timeout_s)

    with monkeypatch.context() as patched:
        patched.setattr(rows, "cache", Cache())
        patched.setattr(rows, "read", read_late)
        patched.setattr(training._opened, "_stop_writer", prefetch_and_stop)
        training.rollback(1)
    pair.reference["bf16"].rollback(1)
    pair.check_all()
    training.prefetch({"bf16": np.arange(300)}).wait()
    pair.check_all()
    training.close()


@pytest.mark.parametrize("error", [tierstore.ConfigError, OSError])
def test_going_back_that_fails_drops_no_commit_and_breaks_the_training(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in (1, 2):
        pair.steps(1)
        pair.commit(number).wait()
    pair.steps(1)
    with pytest.raises(tierstore.ConfigError, match="no commit 7"):
        pair.training.rollback(7)
    pair.check_all()

    def fail(*_: object) -> int:
        raise error("no descriptors")

    with monkeypatch.context() as patched:
        patched.setattr(RunReader, "add", fail)
        with pytest.raises(error, match="no descriptors"):
            pair.training.rollback(1)
    with pytest.raises(tierstore.StoreNotReadyError, match="broken: going back to commit 1 failed"):
        pair.training["bf16"].gather(np.arange(3))
    pair.reopen(2)
    assert pair.training.at == 2
    pair.check_all()
    pair.training.close()


def test_a_step_whose_number_was_set_back_is_a_change(trainable: Trainable, store: Path) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(1)
    pair.commit(1).wait()
    table = pair.training["bf16"]
    table.apply(np.arange(5), np.ones((5, 32), dtype=np.float32))
    table.set_step(1)
    assert pair.training.has_changes
    pair.training.rollback(1)
    assert not pair.training.has_changes
    pair.check_all()
    pair.training.close()


def test_dense_adam_skips_no_step_not_even_before_its_first(store: Path) -> None:
    with tierstore.open_training(store, tierstore.DenseAdam(lr=0.01), dram="8MiB") as training:
        training["bf16"].set_step(0)
        with pytest.raises(ValueError, match="is at step 0 and cannot be set to 3"):
            training["bf16"].set_step(3)


def test_an_opening_that_is_refused_drops_no_commit(trainable: Trainable, store: Path) -> None:
    with pytest.raises(tierstore.BudgetError):
        tierstore.open_training(store, ADAGRAD, dram="100KiB")
    assert read_training(store) is None
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in (1, 2):
        pair.steps(1)
        pair.commit(number).wait()
    pair.training.close()
    with pytest.raises(tierstore.ConfigError, match=r"commit 1 .* was made with"):
        tierstore.open_training(store, tierstore.LazyAdam(lr=0.1), at=1)
    with pytest.raises(tierstore.BudgetError):
        tierstore.open_training(store, at=1, dram="100KiB")
    with pytest.raises(tierstore.BudgetError):
        tierstore.open_training(store, at=0, dram="100KiB")
    assert sorted(read_commits(store)) == [1, 2]
    pair.reopen(1, at=1)
    assert sorted(read_commits(store)) == [1]
    pair.check_all()
    pair.training.close()


def test_another_optimizer_without_commits_is_what_publishing_reads(trainable: Trainable, store: Path) -> None:
    tierstore.open_training(store, tierstore.SGD(lr=0.1), dram="16MiB").close()
    pair = Pair(trainable, store, tierstore.LazyAdam(lr=0.1), seed=0)
    pair.steps(1)
    pair.commit(1).wait()
    assert pair.training.publish() == 1
    pair.training.pin(1)
    pair.training.close()
    with pytest.raises(tierstore.ConfigError, match=r"start anew: 'tierstore commits .* --unpin 1'"):
        tierstore.open_training(store, tierstore.SGD(lr=0.1), at=0)
    tierstore.open_training(store, at=0).close()
    unpin(store, 1)
    pair = Pair(trainable, store, tierstore.SGD(lr=0.1), seed=0, at=0)
    assert not pair.training.commits
    pair.steps(1)
    pair.commit(2).wait()
    assert pair.training.publish() == 2
    pair.reopen(2, at=None)
    assert pair.training.optimizer == tierstore.SGD(lr=0.1)
    pair.check_all()
    pair.training.close()


def test_a_closing_that_is_interrupted_while_it_writes_keeps_the_commit(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(1)
    sync, going_on = RunWriter.sync, threading.Event()

    def sync_late(writer: RunWriter) -> None:
        going_on.wait(20)
        sync(writer)

    monkeypatch.setattr(RunWriter, "sync", sync_late)
    ticket = pair.commit(1)
    threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        pair.training.close()
    threading.Timer(0.2, going_on.set).start()
    pair.training.close()
    assert ticket.done()
    assert ticket.wait().number == 1
    pair.reopen(1)
    pair.check_all()
    pair.training.close()


def test_at_is_the_newest_commit_that_is_durable_while_the_next_is_under_way(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in (1, 2):
        pair.steps(1)
        pair.commit(number).wait()
    sync, going_on = RunWriter.sync, threading.Event()
    monkeypatch.setattr(RunWriter, "sync", lambda writer: (going_on.wait(20), sync(writer)))
    pair.steps(1)
    ticket = pair.commit(3)
    assert pair.training.at == 2
    going_on.set()
    assert (ticket.wait().number, pair.training.at) == (3, 3)
    pair.training.close()
