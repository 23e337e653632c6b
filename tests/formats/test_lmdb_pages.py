"""The reader of LMDB files: it gives what LMDB gives, as of one commit,
and no file that others change ends the process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from tierstore import FormatError
from tierstore.formats import lmdb_pages
from tierstore.formats.lmdb_pages import read_lmdb_records


def records_by_lmdb(file: Path) -> list[tuple[bytes, bytes]]:
    """LMDB's own answer, from a copy, so that nothing that it leaves is beside the original."""
    copy = file.with_name("copy.mdb")
    shutil.copyfile(file, copy)
    with lmdb.open(os.fsencode(copy), subdir=False, map_size=1 << 30, lock=False) as env, env.begin() as transaction:
        return [(bytes(key), bytes(value)) for key, value in transaction.cursor()]


def write_random(file: Path, seed: int) -> None:
    """Some transactions of puts, overwrites and deletes: deep and flat trees, values in pages of their own,
    free lists."""
    rng = np.random.default_rng(seed)
    key_bytes_max = int(rng.choice([1, 8, 40, 511]))
    value_bytes_max = int(rng.choice([0, 30, 2000, 3000, 9000]))
    there: list[bytes] = []
    with lmdb.open(os.fsencode(file), subdir=False, map_size=1 << 30, sync=False) as env:
        for _ in range(int(rng.integers(0, 8))):
            with env.begin(write=True) as transaction:
                for _ in range(int(rng.choice([1, 5, 200]))):
                    key = rng.bytes(int(rng.integers(1, key_bytes_max + 1)))
                    transaction.put(key, rng.bytes(int(rng.integers(0, value_bytes_max + 1))))
                    there.append(key)
                removed = 1.0 if rng.integers(6) == 0 else float(rng.random()) / 2
                for key in rng.permutation(np.array(there, dtype=object))[: int(len(there) * removed)]:
                    transaction.delete(key)


@pytest.mark.parametrize("seed", range(40))
def test_the_records_are_those_that_lmdb_finds(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "some.mdb"
    write_random(file, seed)
    assert read_lmdb_records(file) == records_by_lmdb(file)


def test_an_environment_without_a_commit_has_no_records(tmp_path: Path) -> None:
    lmdb.open(os.fsencode(tmp_path / "new.mdb"), subdir=False).close()
    assert read_lmdb_records(tmp_path / "new.mdb") == []


def test_all_records_deleted_are_no_records(tmp_path: Path) -> None:
    with lmdb.open(os.fsencode(tmp_path / "some.mdb"), subdir=False) as env:
        with env.begin(write=True) as transaction:
            transaction.put(b"key", b"value" * 3000)
        with env.begin(write=True) as transaction:
            transaction.delete(b"key")
    assert read_lmdb_records(tmp_path / "some.mdb") == []


def test_named_databases_are_refused_and_not_read_as_records(tmp_path: Path) -> None:
    with lmdb.open(os.fsencode(tmp_path / "some.mdb"), subdir=False, max_dbs=2) as env:
        env.open_db(b"inner")
    with pytest.raises(FormatError, match="flags 0x2"):
        read_lmdb_records(tmp_path / "some.mdb")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match="not a regular file"):
            read_lmdb_records(path)


def test_a_file_larger_than_lmdb_may_map_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random(tmp_path / "some.mdb", 1)
    monkeypatch.setattr(lmdb_pages, "FILE_BYTES_MAX", 1 << 16)
    os.truncate(tmp_path / "some.mdb", (1 << 16) + 1)
    with pytest.raises(FormatError, match=r"65537 bytes, a catalog has at most 65536"):
        read_lmdb_records(tmp_path / "some.mdb")


def test_records_out_of_order_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.mdb"
    with lmdb.open(os.fsencode(file), subdir=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"first", b"1")
        transaction.put(b"other", b"2")
    file.write_bytes(file.read_bytes().replace(b"first", b"zirst"))
    with pytest.raises(FormatError, match="keys must ascend"):
        read_lmdb_records(file)


# Every commit gives all records the same number; values of several pages move from commit to commit, so that pages are
# freed and used again. Prints a line once it has begun, and commits until it is killed.
WRITER = """
import sys, lmdb
env = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 30, sync=False)
number = 0
while True:
    number += 1
    with env.begin(write=True) as transaction:
        for key in range(30):
            transaction.put(b"%04d" % key, b"%08d" % number * (1 + (key * 37 + number * 11) % 1500))
    if number == 3:
        print("begun", flush=True)
"""


@pytest.mark.parametrize("kill_after", [3, 40, 400])
def test_a_reader_beside_a_writer_sees_one_commit_whole_also_after_the_writer_is_killed(
    tmp_path: Path, kill_after: int
) -> None:
    file = tmp_path / "some.mdb"
    with subprocess.Popen([sys.executable, "-c", WRITER, file], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "begun\n"
            numbers = [number_of(read_lmdb_records(file)) for _ in range(kill_after)]
            assert writer.poll() is None
        finally:
            writer.send_signal(signal.SIGKILL)
    assert numbers == sorted(numbers)
    if kill_after > 3:
        assert len(set(numbers)) > 3, "the writer committed meanwhile"
    last = read_lmdb_records(file)
    assert number_of(last) >= numbers[-1]
    assert last == records_by_lmdb(file)


def number_of(records: list[tuple[bytes, bytes]]) -> int:
    """The number of the commit that all records are of."""
    numbers = {value[:8] for _, value in records} | {value[-8:] for _, value in records}
    assert len(records) == 30
    assert len(numbers) == 1, numbers
    return int(numbers.pop())


def test_a_file_that_always_changes_ends_in_an_error_and_not_in_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.mdb"
    lmdb.open(os.fsencode(file), subdir=False).close()
    pread, commits = os.pread, iter(range(1 << 30))

    def pread_beside_a_writer(fd: int, num_bytes: int, start: int) -> bytes:
        with lmdb.open(os.fsencode(file), subdir=False) as env, env.begin(write=True) as transaction:
            transaction.put(b"key", b"%d" % next(commits))
        return pread(fd, num_bytes, start)

    monkeypatch.setattr(os, "pread", pread_beside_a_writer)
    monkeypatch.setattr(lmdb_pages, "SNAPSHOT_WAIT_S", 0.2)
    with pytest.raises(FormatError, match="changed during every one"):
        read_lmdb_records(file)
