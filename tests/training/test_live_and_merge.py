"""The newest records of a commit, what changed between two, and merges that change nothing that is read."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from support.training_runs import LAYOUTS, NUM_ROWS, Trained, make_training

from tierstore.errors import ConfigError, CorruptPageError
from tierstore.training import merge as merging
from tierstore.training.commits import Commit, go_back
from tierstore.training.live import NO_RUN, CommitRows, live_rows
from tierstore.training.merge import choose_runs, merge_runs
from tierstore.training.run_writer import RunWriter

LAYOUT = LAYOUTS["a"]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(make_training(tmp_path / "store"))


def content(store: Path, commit: Commit, name: str = "a") -> dict[int, bytes]:
    """All records of a commit, by row."""
    found: dict[int, bytes] = {}
    with CommitRows(store, commit, LAYOUTS[name], NUM_ROWS, io="pread") as rows:
        for part in rows.parts(part_rows=97):
            out = np.empty((len(part[0]), LAYOUTS[name].record_bytes), dtype=np.uint8)
            rows.read(part, out)
            assert not found.keys() & set(part[0].tolist())
            found |= {row: record.tobytes() for row, record in zip(part[0].tolist(), out, strict=True)}
        assert rows.num_found == len(found)
    return found


def test_a_commit_has_the_newest_record_of_every_row_of_every_table(trained: Trained) -> None:
    for num in (700, 1500, 300):
        trained.spill("a", num)
        trained.spill("b", num // 2)
    commit = trained.commit(1)
    assert content(trained.store, commit, "a") == trained.rows["a"]
    assert content(trained.store, commit, "b") == trained.rows["b"]


def test_rows_since_a_commit_are_all_that_changed_and_no_other(trained: Trained) -> None:
    trained.spill("a", 900)
    first, before = trained.commit(1), dict(trained.rows["a"])
    for _ in range(2):
        trained.spill("a", 200)
    second = trained.commit(2)
    row_ids, runs, _ = live_rows(trained.store, second, LAYOUT, since=first)
    assert set(row_ids.tolist()) == {row for row, record in trained.rows["a"].items() if before.get(row) != record}
    assert len(set(row_ids.tolist())) == len(row_ids)
    assert set(runs.tolist()) == {1, 2}
    assert len(live_rows(trained.store, second, LAYOUT, since=second)[0]) == 0


def test_rows_since_a_commit_that_was_left_are_those_of_both(trained: Trained) -> None:
    trained.spill("a", 500)
    first, before = trained.commit(1), dict(trained.rows["a"])
    trained.spill("a", 600)
    later, at_later = trained.commit(2), dict(trained.rows["a"])
    row_ids, runs, _ = live_rows(trained.store, first, LAYOUT, since=later)
    changed = {row for row, record in at_later.items() if before.get(row) != record}
    assert set(row_ids.tolist()) == changed
    assert set(row_ids[runs == NO_RUN].tolist()) == changed - before.keys()
    go_back(trained.store, 1)
    with pytest.raises(ConfigError, match="the commit to compare with was forgotten"):
        live_rows(trained.store, first, LAYOUT, since=later)


def test_runs_that_are_mostly_dead_are_chosen_and_small_ones_if_there_are_many() -> None:
    assert choose_runs([10, 10, 10], [5, 4, 10]) == [1]
    assert choose_runs([], []) == []
    many = [100 + i for i in range(130)]
    assert choose_runs(many, many) == list(range(130 - merging.RUNS_FEW))


def merged_commit(trained: Trained, newer: bool) -> Commit:
    """Merges what should be merged, and commits; with `newer`, after another run was written meanwhile."""
    commit = Commit(0, 0, b"", {"a": tuple(trained.runs["a"])}, {}, None, 0.0, "")
    with CommitRows(trained.store, commit, LAYOUT, NUM_ROWS, io="pread") as rows:
        runs = rows.reader.runs
        chosen = choose_runs([run.num_records for run in runs.values()], [rows.places.live(i) for i in runs])
        number, trained.next_run = trained.next_run, trained.next_run + 1
        known = len(runs)
        if newer:  # between the merge's reads and its end
            trained.spill("a", 400)
            ordinal = rows.reader.add(trained.runs["a"][-1], trained.unnamed[-1].path)
            runs = runs | {ordinal: trained.runs["a"][-1]}

        def make_writer() -> RunWriter:
            return RunWriter(trained.store, number, LAYOUT)

        merged = merge_runs(rows.reader, rows.places, [list(runs)[i] for i in chosen], make_writer)
        assert merged is not None
        if newer:
            rows.reader.load(ordinal, rows.places)
        if merged.added:
            trained.unnamed.append(merged.added[2])
        trained.runs["a"] = list(merged.applied_to(runs, known).values())
    return trained.commit(9)


@pytest.mark.parametrize("newer", [False, True], ids=["alone", "beside steps"])
def test_a_merge_changes_nothing_that_a_commit_has(trained: Trained, newer: bool) -> None:
    for num in (2000, 100, 1500, 4000):
        trained.spill("a", num)
    before = trained.commit(1)
    expected = dict(trained.rows["a"])
    after = merged_commit(trained, newer)
    assert content(trained.store, after) == trained.rows["a"]
    assert content(trained.store, before) == expected
    assert len(after.runs["a"]) < len(before.runs["a"]) + newer
    assert sum(run.num_records for run in after.runs["a"]) < sum(run.num_records for run in before.runs["a"]) + 400


def test_a_merge_takes_no_more_than_its_memory_allows(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "MERGED_RECORDS_MAX", 300)
    for _ in range(3):
        trained.spill("a", 3000)
    trained.commit(1)
    for _ in range(8):
        commit = merged_commit(trained, newer=False)
        assert content(trained.store, commit) == trained.rows["a"]
    assert sum(run.num_records for run in commit.runs["a"]) < 2 * len(trained.rows["a"])


def test_a_merge_that_is_stopped_or_fails_changes_nothing(trained: Trained) -> None:
    for _ in range(3):
        trained.spill("a", 3000)
    commit = trained.commit(1)
    with CommitRows(trained.store, commit, LAYOUT, NUM_ROWS, io="pread") as rows:

        def make_writer() -> RunWriter:
            return RunWriter(trained.store, 77, LAYOUT, buffer_bytes=8192)

        stop = threading.Event()
        stop.set()
        assert merge_runs(rows.reader, rows.places, rows.ordinals, make_writer, stop=stop) is None
        rows.reader._records.inject("failing", 3, 1)
        with pytest.raises(CorruptPageError):
            merge_runs(rows.reader, rows.places, rows.ordinals, make_writer)
        assert list((trained.store / "training").glob("*77*")) == []
    assert content(trained.store, commit) == trained.rows["a"]


def test_a_merge_keeps_its_rate(trained: Trained) -> None:
    for _ in range(2):
        trained.spill("a", 4000)
    commit = trained.commit(1)
    with CommitRows(trained.store, commit, LAYOUT, NUM_ROWS, io="pread") as rows:
        waited: list[float] = []

        class Clock(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                waited.append(timeout or 0)
                return False

        writers: list[RunWriter] = []

        def make_writer() -> RunWriter:
            writers.append(RunWriter(trained.store, 77, LAYOUT, buffer_bytes=8192))
            return writers[-1]

        merge_runs(rows.reader, rows.places, rows.ordinals, make_writer, rate_bytes_s=1000, stop=Clock())
        writers[0].discard()
    assert waited == sorted(waited)
    assert waited[-1] > 100  # seconds that it would have waited in all


def test_a_read_that_a_merge_overtook_finds_the_records_again(trained: Trained) -> None:
    trained.spill("a", 1000)
    trained.spill("a", 4000)
    commit = trained.commit(1)
    with CommitRows(trained.store, commit, LAYOUT, NUM_ROWS, io="pread") as rows:
        part = next(rows.parts())
        merged = merge_runs(rows.reader, rows.places, rows.ordinals, lambda: RunWriter(trained.store, 77, LAYOUT))
        assert merged is not None
        assert merged.added is not None
        for ordinal in merged.removed:
            rows.reader.remove(ordinal)
        trained.spill("a", 10)
        other = rows.reader.add(trained.runs["a"][-1], trained.unnamed[-1].path)
        assert other in merged.removed  # the ordinal was given again
        out = np.empty((len(part[0]), LAYOUT.record_bytes), dtype=np.uint8)
        with pytest.raises((ConfigError, CorruptPageError)):
            rows.reader.read(*part, out)
        rows.reader.read(*part, out, rows.places)
        before = {row: record.tobytes() for row, record in zip(part[0].tolist(), out, strict=True)}
        merged.added[2].discard()
    trained.close()
    expected = content(trained.store, commit)
    assert before == {row: expected[row] for row in before}
