"""The newest records of a commit, what changed between two, and merges that change nothing that is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.training_runs import LAYOUTS, NUM_ROWS, Trained, make_training

from tierstore import kernels
from tierstore.errors import ConfigError, CorruptPageError
from tierstore.formats.run import Run
from tierstore.training import merge as merge_module
from tierstore.training.commits import Commit, go_back
from tierstore.training.live import NO_RUN, CommitRows, live_rows
from tierstore.training.merge import Merge, Merges, choose_runs
from tierstore.training.run_writer import RunWriter
from tierstore.training.runs import RunReader

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
    assert choose_runs(many, many) == list(range(130 - merge_module.RUNS_FEW))


@dataclass
class Table:
    """What `Merges` wants of a table, over `CommitRows`."""

    rows: CommitRows
    runs: dict[int, Run]
    unnamed: dict[int, RunWriter]
    num_removing: int = 0

    @property
    def reader(self) -> RunReader:
        return self.rows.reader

    @property
    def places(self) -> kernels.RowPlaces:
        return self.rows.places

    @contextlib.contextmanager
    def removing(self) -> Iterator[None]:
        self.num_removing += 1
        yield


class Merging:
    """A training of table "a" whose runs are merged."""

    def __init__(self, trained: Trained, num_spills: int = 3, num_rows: int = 3000) -> None:
        self.trained = trained
        for _ in range(num_spills):
            trained.spill("a", num_rows)
        self.first = trained.commit(1)
        self.rows = CommitRows(trained.store, self.first, LAYOUT, NUM_ROWS, io="pread")
        self.table = Table(self.rows, dict(zip(self.rows.ordinals, self.first.runs["a"], strict=True)), {})
        self.merges = Merges({"a": self.table}, self.make_writer, rate_bytes_s=1e12)

    def make_writer(self, _: str) -> RunWriter:
        self.trained.next_run += 1
        return RunWriter(self.trained.store, self.trained.next_run - 1, LAYOUT, buffer_bytes=8192)

    def spill(self, num: int) -> None:
        """What the writer of a training does: a run, and then its places; runs that are dead go."""
        self.trained.spill("a", num)
        run, writer = self.trained.runs["a"][-1], self.trained.unnamed.pop()
        ordinal = self.table.reader.add(run, writer.path)
        self.table.runs[ordinal], self.table.unnamed[ordinal] = run, writer
        self.table.reader.load(ordinal, self.table.places)
        for each in [i for i in self.table.runs if self.table.places.live(i) == 0]:
            self.table.reader.remove(each)
            del self.table.runs[each]
            if each in self.table.unnamed:
                self.table.unnamed.pop(each).discard()

    def merge(self, beside: Callable[[], None] = lambda: None) -> None:
        """Merges what there is to merge; `beside` is called between two parts."""
        self.merges.look()
        while self.merges.wait_s() is not None:
            self.merges.step()
            beside()

    def commit(self) -> Commit:
        self.trained.runs["a"] = list(self.table.runs.values())
        self.trained.unnamed = list(self.table.unnamed.values())
        self.table.unnamed = {}
        return self.trained.commit(9)


def test_a_merge_changes_nothing_that_a_commit_has(trained: Trained) -> None:
    merging = Merging(trained)
    merging.merge()
    after = merging.commit()
    assert content(trained.store, after) == trained.rows["a"] == content(trained.store, merging.first)
    assert sum(run.num_records for run in after.runs["a"]) < 1.5 * len(trained.rows["a"])
    assert merging.table.num_removing > 0


def test_merges_beside_steps_change_nothing_that_a_commit_has(trained: Trained) -> None:
    merging = Merging(trained)
    rng, num_parts = np.random.default_rng(3), 0

    def beside() -> None:
        nonlocal num_parts
        num_parts += 1
        if rng.random() < 0.5:
            merging.spill(int(rng.choice([20, 400, 2500, NUM_ROWS])))  # the last kills all runs: ordinals come again

    for _ in range(4):
        merging.merge(beside)
        after = merging.commit()
        assert content(trained.store, after) == trained.rows["a"]
    assert num_parts > 30


def test_a_merge_takes_no_more_than_its_memory_allows(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "MERGED_RECORDS_MAX", 300)
    merging = Merging(trained)
    for _ in range(8):
        merging.merge()
        after = merging.commit()
        assert content(trained.store, after) == trained.rows["a"]
    assert max(run.num_records for run in after.runs["a"][1:]) <= 300
    assert sum(run.num_records for run in after.runs["a"]) < 2 * len(trained.rows["a"])


def test_a_merge_that_fails_or_is_given_up_changes_nothing(trained: Trained) -> None:
    merging = Merging(trained)
    before = dict(merging.table.runs)
    merging.rows.reader._records.inject("failing", 3, 1)
    with pytest.raises(CorruptPageError):
        merging.merge()
    assert merging.merges.wait_s() is None
    merging.merges.look()
    for _ in range(4):
        merging.merges.step()
    merging.merges.close()
    assert merging.table.runs == before
    assert {f"training/{path.name}" for path in (trained.store / "training").iterdir()} == merging.first.files
    assert content(trained.store, merging.first) == trained.rows["a"]


def test_a_merge_keeps_its_rate(trained: Trained) -> None:
    merging = Merging(trained)
    merging.merges = Merges({"a": merging.table}, merging.make_writer, rate_bytes_s=8192)
    merging.merges.look()
    for _ in range(3):
        merging.merges.step()
    assert 1.0 < (merging.merges.wait_s() or 0) < 2.5  # two buffers of nearly 8 KiB, less a second
    merging.merges.close()


def test_a_read_that_a_merge_overtook_finds_the_records_again(trained: Trained) -> None:
    trained.spill("a", 1000)
    trained.spill("a", 4000)
    commit = trained.commit(1)
    with CommitRows(trained.store, commit, LAYOUT, NUM_ROWS, io="pread") as rows:
        part = next(rows.parts())
        merge = Merge(rows.reader, rows.places, rows.ordinals, lambda: RunWriter(trained.store, 77, LAYOUT))
        while merge.step():
            continue
        merged = merge.finish()
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
