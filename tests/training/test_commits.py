"""Commits: whole or not there, kept while they should be, one writer, damage named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training_runs import LAYOUTS, Trained, make_training

from tierstore.errors import BudgetError, ConfigError, FormatError
from tierstore.formats.catalog_records import CATALOG_FILE, read_records, write_records
from tierstore.formats.rates import read_rates
from tierstore.formats.training_records import PAYLOAD_BYTES_MAX, layouts_of
from tierstore.training import commits
from tierstore.training.commits import (
    checked_commit,
    go_back,
    pin,
    read_commits,
    read_training,
    remove_unnamed,
    unpin,
)
from tierstore.training.writer_lock import WriterLock


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(make_training(tmp_path / "store"))


def files(store: Path) -> set[str]:
    return {f"training/{path.name}" for path in (store / "training").iterdir()}


def commit_some(trained: Trained, step: int) -> commits.Commit:
    trained.spill("a", 40)
    trained.spill("b", 30)
    return trained.commit(step, payload=f"at {step}".encode())


def test_a_commit_comes_back_as_it_was_published(trained: Trained) -> None:
    trained.spill("a", 100)
    trained.spill("b", 50)
    trained.spill("a", 20)
    rates = {"a": np.linspace(0, 1, 1000) / 3, "b": np.zeros(0)}
    commit = trained.commit(17, payload=b"\0model\xff", rates=rates)
    records = read_training(trained.store)
    assert records is not None
    assert layouts_of(records.training) == LAYOUTS
    assert records.commits == {1: commit}
    assert (records.current, records.last_commit, records.last_run) == (1, 1, 3)
    assert (commit.step, commit.payload) == (17, b"\0model\xff")
    assert commit.runs == {name: tuple(runs) for name, runs in trained.runs.items()}
    assert files(trained.store) == commit.files
    assert commit.rates is not None
    found = read_rates(trained.store, commit.rates)
    assert {name: of.tolist() for name, of in found.items()} == {name: of.tolist() for name, of in rates.items()}


def test_a_store_without_a_training_has_no_commits(tmp_path: Path) -> None:
    write_records(tmp_path / CATALOG_FILE, {"format": b"{}"})
    assert read_training(tmp_path) is None
    assert read_commits(tmp_path) == {}
    with pytest.raises(ConfigError, match="has no training"):
        pin(tmp_path, 1)


def test_the_newest_two_and_pinned_commits_stay_with_their_files(trained: Trained) -> None:
    commit_some(trained, 1)
    commit_some(trained, 2)
    pin(trained.store, 2)
    kept_runs = dict(trained.runs)
    trained.runs = {name: [] for name in LAYOUTS}  # as after a merge: later commits need none of the old runs
    for step in (3, 4, 5):
        commit_some(trained, step)
    assert sorted(read_commits(trained.store)) == [2, 4, 5]
    assert {run.file for runs in kept_runs.values() for run in runs} <= files(trained.store)
    unpin(trained.store, 2)
    trained.runs = {name: [] for name in LAYOUTS}
    commit_some(trained, 6)
    assert sorted(read_commits(trained.store)) == [5, 6]
    records = read_training(trained.store)
    assert records is not None
    assert files(trained.store) == records.files


def test_a_pinned_commit_is_not_forgotten(trained: Trained) -> None:
    for step in (1, 2):
        commit_some(trained, step)
    pin(trained.store, 1)
    with pytest.raises(ConfigError, match=r"commit 1 is pinned; unpin it first: tierstore commits .* --unpin 1"):
        commits.forget_commit(trained.store, 1)
    with pytest.raises(ConfigError, match="commit 2 is the one that a training opens at"):
        commits.forget_commit(trained.store, 2)
    with pytest.raises(ConfigError, match="there is no commit 3; there are: 1, 2"):
        pin(trained.store, 3)
    unpin(trained.store, 1)
    commits.forget_commit(trained.store, 1)
    assert sorted(read_commits(trained.store)) == [2]


def test_going_back_forgets_what_came_later_but_gives_no_number_twice(trained: Trained) -> None:
    first, second = commit_some(trained, 1), commit_some(trained, 2)
    pin(trained.store, 1)
    third = commit_some(trained, 3)
    records = go_back(trained.store, 1)
    assert records.current == 1
    assert list(records.commits) == [1]
    assert records == read_training(trained.store)
    assert files(trained.store) == first.files < second.files < third.files
    trained.runs = {name: list(runs) for name, runs in first.runs.items()}
    trained.next_run = records.last_run + 1
    assert commit_some(trained, 2).number == 4
    records = go_back(trained.store, 0)
    assert (records.current, list(records.commits)) == (None, [1])  # it is pinned
    with pytest.raises(ConfigError, match="there is no commit 4"):
        go_back(trained.store, 4)


def test_a_second_writer_is_refused_with_the_firsts_process_id(trained: Trained) -> None:
    code = (
        "import sys; from pathlib import Path; from tierstore.training.writer_lock import WriterLock\n"
        "with WriterLock(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(trained.store)]
    with WriterLock(trained.store):
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert f"is being trained by process {os.getpid()}:" in refused.stderr
        with pytest.raises(ConfigError, match="one training at a time"), WriterLock(trained.store):
            pass
    subprocess.run(command, check=True, timeout=60)


def test_a_forked_child_does_not_keep_the_lock(trained: Trained) -> None:
    read, write = os.pipe()
    with WriterLock(trained.store):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    with WriterLock(trained.store):
        pass
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)


def test_a_writer_removes_what_no_commit_names_and_gives_its_number_to_nobody(trained: Trained) -> None:
    commit = commit_some(trained, 1)
    trained.spill("a", 10)
    trained.unnamed.clear()  # as after a kill
    (trained.store / "training" / "00000009-a.run").write_bytes(b"left")
    (trained.store / "training" / "notes.txt").write_bytes(b"somebody's")
    with WriterLock(trained.store):
        assert files(trained.store) == commit.files | {"training/notes.txt"}
        records = read_training(trained.store)
        assert records is not None
        assert records.last_run == 9
        (trained.store / "training" / "00000010-a.run.new").write_bytes(b"left")
    assert files(trained.store) == commit.files | {"training/notes.txt"}
    assert remove_unnamed(trained.store) == []


def test_room_on_the_disk_is_asked_for_before(trained: Trained) -> None:
    commits.check_room(trained.store, 1)
    with pytest.raises(BudgetError, match=r"needs .* \(1000000000016777216 bytes\), .* are free"):
        commits.check_room(trained.store, 10**18)


def test_a_payload_that_is_too_large_is_refused_before_anything_is_written(trained: Trained) -> None:
    with pytest.raises(ConfigError, match=f"{PAYLOAD_BYTES_MAX + 1} bytes, at most {PAYLOAD_BYTES_MAX}"):
        trained.commit(1, payload=bytes(PAYLOAD_BYTES_MAX + 1))
    assert read_commits(trained.store) == {}


@pytest.mark.parametrize("key", ["commit/00000001", "payload/00000001", "training_numbers"])
def test_a_record_that_was_changed_behind_its_checksum_is_named(trained: Trained, key: str) -> None:
    commit_some(trained, 1)
    value = read_records(trained.store)[key]
    for changed in (b"", b"{}", value.replace(b"1", b"2", 1), value[:-1]):
        write_records(trained.store / CATALOG_FILE, {key: changed})
        with pytest.raises(FormatError):
            read_training(trained.store)
    write_records(trained.store / CATALOG_FILE, {}, removed=[key])
    if key != "commit/00000001":
        with pytest.raises(FormatError):
            read_training(trained.store)


def test_rates_that_are_not_the_catalogs_are_named(trained: Trained) -> None:
    trained.spill("a", 5)
    commit = trained.commit(1, rates={"a": np.ones(50)})
    assert commit.rates is not None
    file = trained.store / commit.rates.file
    good = file.read_bytes()
    for byte in range(0, len(good), 3):
        file.write_bytes(good[:byte] + bytes([good[byte] ^ 4]) + good[byte + 1 :])
        with pytest.raises(FormatError, match=r"00000001\.rates: it is not the file that the catalog names"):
            read_rates(trained.store, commit.rates)
    file.unlink()
    with pytest.raises(FormatError, match=r"00000001\.rates"):
        read_rates(trained.store, commit.rates)


@pytest.mark.parametrize(
    ("step", "payload", "error", "words"),
    [
        (-1, b"", ConfigError, "0 or more"),
        (1, "text", TypeError, "must be bytes"),
        (1, bytes((1 << 20) + 1), ConfigError, "at most"),
        (1.5, b"", TypeError, "integer"),
    ],
)
def test_a_commit_has_a_step_from_0_on_and_a_payload_of_bytes(
    step: Any, payload: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        checked_commit(step, payload)
