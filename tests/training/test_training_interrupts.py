"""Ctrl-C and MemoryError at any line of a call leave the rows as before it, or the training broken by name."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.interrupted import Interrupted, open_files
from support.trainable import Pair, Trainable, tiny_caches

import tierstore
from tierstore.formats.run import RunLayout
from tierstore.training.run_writer import RunWriter
from tierstore.training.writer_lock import WriterLock

ADAGRAD = tierstore.RowWiseAdagrad(lr=0.05)
LINES_MAX = 400
NUM_ROWS, CODECS = 60, {"bf16": "bf16"}


def sweep(pair: Pair, act: Callable[[Pair], None], error: type[BaseException], every: int = 1) -> int:
    """Interrupts `act` at line 1, 2, 3 ... until it ends by itself; returns how often the training was broken.

    After each, all rows must be what they were before: as the oracle has them, which takes no step here.
    """
    num_broken = 0
    for number in range(1, LINES_MAX * every, every):
        try:
            with Interrupted(number, error) as interrupted:
                act(pair)
        except error:
            assert interrupted.was_raised
        if not interrupted.was_raised:
            return num_broken
        if pair.training.is_broken:
            num_broken += 1
            with pytest.raises(tierstore.StoreNotReadyError, match="broken"):
                pair.training["bf16"].gather(np.arange(3))
            pair.reopen(1)
        assert pair.training["bf16"].stats()["num_pinned"] == 0
        pair.check_all()
    raise AssertionError("the call has more lines than the sweep")


def apply(row_ids: np.ndarray) -> Callable[[Pair], None]:
    gradients = np.ones((len(row_ids), 32), dtype=np.float32)
    return lambda pair: pair.training["bf16"].apply(row_ids, gradients)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("num_slots", [1000, 8])
def test_a_step_that_is_interrupted_changed_no_row_or_broke_the_training_by_name(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch, error: Any, num_slots: int
) -> None:
    tiny_caches(monkeypatch, num_slots)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(1)
    pair.commit(1).wait()
    num_broken = sweep(pair, apply(np.array([5, 9, 5, 30, 31, 32, 33, -1])), error, every=1 if num_slots > 8 else 5)
    assert num_broken > 0  # after the last record was changed, it is too late to take it back
    pair.training.close()


@pytest.mark.parametrize("num_slots", [1000, 8])
def test_a_gather_or_a_pin_that_is_interrupted_leaves_nothing_behind(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    tiny_caches(monkeypatch, num_slots)
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(1)
    pair.commit(1).wait()
    row_ids = np.arange(20)

    def gather(pair: Pair) -> None:
        pair.training["bf16"].gather(row_ids)

    def pin(pair: Pair) -> None:
        with pair.training["bf16"].pinned(row_ids):
            pass

    def prefetch(pair: Pair) -> None:
        pair.training.prefetch({"bf16": row_ids})

    for act in (gather, pin, prefetch):
        assert sweep(pair, act, KeyboardInterrupt) == 0
    pair.training.close()


def test_a_commit_that_is_interrupted_happens_whole_or_not_at_all(trainable: Trainable, store: Path) -> None:
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    for number in range(1, LINES_MAX, 3):
        pair.steps(1, 10)
        try:
            with Interrupted(number, KeyboardInterrupt) as interrupted:
                pair.training.commit(number).wait()
        except KeyboardInterrupt:
            assert not pair.training.is_broken
        pair.check_all()
        if not interrupted.was_raised:
            break
    pair.commit(1000).wait()
    pair.check_all()
    pair.reopen(1000)
    pair.check_all()
    pair.training.close()


def interrupted_openings(store: Path, act: Callable[[Path], None], every: int) -> int:
    """Interrupts `act` at line 1, 1 + every ... until it ends by itself; the store can be trained after each."""
    for number in range(1, 100 * LINES_MAX, every):
        try:
            with Interrupted(number, KeyboardInterrupt) as interrupted:
                act(store)
        except KeyboardInterrupt:
            assert interrupted.was_raised
        with WriterLock(store):
            pass
        names = {thread.name for thread in threading.enumerate()}
        assert not any(name.startswith("tierstore-training") for name in names)
        if not interrupted.was_raised:
            return number
    raise AssertionError("the call has more lines than the sweep")


def open_and_close(store: Path) -> None:
    opened = []
    try:
        opened.append(tierstore.open_training(store, dram="4MiB", threads=1))
    finally:
        for training in opened:
            training.close()


@pytest.fixture
def trained(trainable: Trainable, store: Path) -> Path:
    """A store with a commit."""
    pair = Pair(trainable, store, ADAGRAD, seed=0)
    pair.steps(1)
    pair.commit(1).wait()
    pair.training.close()
    return store


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_an_opening_that_is_interrupted_leaves_no_lock_and_no_thread(
    trained: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    swallowed: list[Any] = []  # Python drops what comes while it drops a training that nobody has yet
    monkeypatch.setattr(sys, "unraisablehook", lambda what: swallowed.append(what.exc_type))
    assert interrupted_openings(trained, open_and_close, every) > 200
    assert len(open_files(trained)) <= 1  # the line between a descriptor and its file object
    assert set(swallowed) <= {KeyboardInterrupt}


def test_a_close_that_is_interrupted_at_any_line_is_whole_when_it_is_called_again(trained: Path) -> None:
    def close_twice(store: Path) -> None:
        sys.settrace(None)
        training = tierstore.open_training(store, dram="4MiB", threads=1)
        training["bf16"].apply(np.arange(3), np.ones((3, 32), dtype=np.float32))
        try:
            sys.settrace(tracer)
            training.close()
        finally:
            sys.settrace(None)
            training.close()

    for number in range(1, LINES_MAX):
        interrupted = Interrupted(number, KeyboardInterrupt)
        tracer = interrupted._trace
        try:
            with interrupted:
                close_twice(trained)
        except KeyboardInterrupt:
            assert interrupted.was_raised
        with WriterLock(trained):
            pass
        assert open_files(trained) == []
        if not interrupted.was_raised:
            break
    assert 20 < number < LINES_MAX - 1


def test_a_run_that_is_interrupted_at_any_line_of_its_writing_is_closed(tmp_path: Path) -> None:
    layout = RunLayout("a", dim=8, state_floats=1, seed=1)

    def write(number: int) -> None:
        with RunWriter(tmp_path, number, layout, buffer_bytes=8192) as writer:
            writer.write(min(3, len(writer.buffer())), np.arange(3))
            writer.finish()

    for number in range(1, LINES_MAX):
        with contextlib.suppress(KeyboardInterrupt), Interrupted(number, KeyboardInterrupt) as interrupted:
            write(number)
        assert open_files(tmp_path) == []
        if not interrupted.was_raised:
            break
    assert 50 < number < LINES_MAX - 1
