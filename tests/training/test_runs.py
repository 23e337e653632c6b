"""Runs: what is written comes back, each record checked, and damage is named."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from support.held import open_files
from support.training_runs import records_of, written

from tierstore import kernels
from tierstore.errors import ConfigError, CorruptPageError, FormatError
from tierstore.formats.run import Run, RunLayout
from tierstore.training.run_writer import RunWriter
from tierstore.training.runs import RunReader

LAYOUT = RunLayout("layers.1", dim=33, state_floats=3, seed=77)
IO = ["uring", "pread"]


def write_run(
    store: Path, number: int, layout: RunLayout, row_ids: np.ndarray, records: np.ndarray, buffer_bytes: int = 1 << 16
) -> Run:
    """Writes a run in as many buffers as it takes, and names it."""
    writer, run = written(store, number, layout, row_ids, records, buffer_bytes)
    with writer:
        writer.sync()
        writer.rename()
        writer.keep()
    return run


def read_back(reader: RunReader, ordinals: np.ndarray, places: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    out = np.full((len(row_ids), reader.layout.record_bytes), 0xAB, dtype=np.uint8)
    reader.read(row_ids, ordinals.astype(np.uint16), places.astype(np.uint32), out)
    return out


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize(
    "layout",
    [LAYOUT, RunLayout("t", 1, 0, 5), RunLayout("t", 256, 1, 5), RunLayout("t", 3000, 6000, 5)],
    ids=["odd", "smallest", "row-wise", "above a read"],
)
def test_scattered_records_come_back_in_the_callers_order(tmp_path: Path, io: str, layout: RunLayout) -> None:
    rng = np.random.default_rng(1)
    reader = RunReader(tmp_path, layout, io=io, depth=7)
    written = []
    for number, num in enumerate((1, 700 if layout.dim < 3000 else 30, 123), start=1):
        row_ids = rng.permutation(10_000)[:num].astype(np.int64)
        records = records_of(rng, layout, num)
        run = write_run(tmp_path, number, layout, row_ids, records)
        assert (tmp_path / run.file).stat().st_size == run.num_bytes == layout.run_bytes(num)
        written.append((reader.add(run), row_ids, records))
    chosen = rng.integers(0, 3, 2000 if layout.dim < 3000 else 100)
    places = np.array([rng.integers(0, len(written[i][1])) for i in chosen])
    row_ids = np.array([written[i][1][place] for i, place in zip(chosen, places, strict=True)], dtype=np.int64)
    found = read_back(reader, np.array([written[i][0] for i in chosen]), places, row_ids)
    expected = np.stack([written[i][2][place] for i, place in zip(chosen, places, strict=True)])
    np.testing.assert_array_equal(found, expected)
    for ordinal, ids, _ in written:
        np.testing.assert_array_equal(reader.row_ids(ordinal), ids)
    reader.close()


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    row_ids, records = np.arange(4000, dtype=np.int64), records_of(rng, LAYOUT, 4000)
    reader = RunReader(tmp_path, LAYOUT, io="uring")
    ordinal = reader.add(write_run(tmp_path, 1, LAYOUT, row_ids, records))
    places = np.concatenate([np.arange(1000, 1008), np.arange(3000, 3016, 2)])
    found = read_back(reader, np.full(16, ordinal), places, row_ids[places])
    np.testing.assert_array_equal(found, records[places])
    assert reader._records.counts[0] == 2


def test_the_size_of_buffers_does_not_show(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    row_ids, records = rng.permutation(1500).astype(np.int64), records_of(rng, LAYOUT, 1500)
    runs = [
        write_run(tmp_path, number, LAYOUT, row_ids, records, buffer_bytes)
        for number, buffer_bytes in ((1, 4096), (2, 1 << 22))
    ]
    one, other = ((tmp_path / run.file).read_bytes() for run in runs)
    assert len(one) == len(other)
    size = LAYOUT.stored_bytes
    of = [
        np.frombuffer(each, np.uint8)[4096 : 4096 + 1500 * size].reshape(1500, size)[:, :-16] for each in (one, other)
    ]
    np.testing.assert_array_equal(of[0], of[1])


def test_every_flipped_bit_is_named_or_changes_nothing(tmp_path: Path) -> None:
    check_flips(tmp_path, np.random.default_rng(4), 300)


@pytest.mark.slow
def test_every_one_of_ten_thousand_flipped_bits_is_named_or_changes_nothing(tmp_path: Path) -> None:
    check_flips(tmp_path, np.random.default_rng(5), 10_000)


def check_flips(store: Path, rng: np.random.Generator, num_flips: int) -> None:
    """Flips a bit anywhere in a run, in its head and its row ids as often as in its records; reads everything."""
    num = 600
    row_ids, records = rng.permutation(5000)[:num].astype(np.int64), records_of(rng, LAYOUT, num)
    run = write_run(store, 3, LAYOUT, row_ids, records)
    file = store / run.file
    good = file.read_bytes()
    named = unnamed = 0
    for flip in range(num_flips):
        start, end = ((0, 4096), (4096, LAYOUT.row_ids_start(num)), (LAYOUT.row_ids_start(num), len(good)))[flip % 3]
        byte, bit = int(rng.integers(start, end)), int(rng.integers(8))
        with file.open("r+b") as damaged:
            damaged.seek(byte)
            damaged.write(bytes([good[byte] ^ 1 << bit]))
        try:
            reader = RunReader(store, LAYOUT, io="pread", depth=4)
            places = kernels.RowPlaces(5000)
            ordinal = reader.add(run)
            reader.load(ordinal, places)
            runs, found = np.empty(num, dtype=np.uint16), np.empty(num, dtype=np.uint32)
            assert places.find(row_ids, runs, found) == num
            out = np.full((num, LAYOUT.record_bytes), 0xAB, dtype=np.uint8)
            reader.read(row_ids, runs, found, out)
            np.testing.assert_array_equal(out, records)
        except (FormatError, CorruptPageError) as error:
            named += run.file in str(error)
            unnamed += run.file not in str(error)
        finally:
            reader.close()
            with file.open("r+b") as damaged:
                damaged.seek(byte)
                damaged.write(good[byte : byte + 1])
    assert unnamed == 0
    assert named > num_flips * 0.9


def test_a_record_of_another_row_run_or_table_is_not_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    row_ids, records = np.arange(100, dtype=np.int64), records_of(rng, LAYOUT, 100)
    reader = RunReader(tmp_path, LAYOUT)
    first, second = (write_run(tmp_path, number, LAYOUT, row_ids, records) for number in (1, 2))
    size = LAYOUT.stored_bytes
    ordinal = reader.add(first)
    one, two = np.array([0], dtype=np.uint16) + ordinal, np.array([10], dtype=np.uint32)
    out = np.empty((1, LAYOUT.record_bytes), dtype=np.uint8)
    with pytest.raises(CorruptPageError, match=r"record 10 \(row 11 .*another row's record"):
        reader.read(np.array([11]), one, two, out)
    taken = (tmp_path / second.file).read_bytes()[4096 + 10 * size : 4096 + 11 * size]
    with (tmp_path / first.file).open("r+b") as file:  # the same row, from the other run
        file.seek(4096 + 10 * size)
        file.write(taken)
    with pytest.raises(CorruptPageError, match=r"record 10 \(row 10 of table layers.1\)"):
        reader.read(np.array([10]), one, two, out)
    other = RunReader(tmp_path, RunLayout("layers.1", 33, 3, seed=78))
    with pytest.raises(FormatError, match="the catalog says run 2"):
        other.add(second)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("what", ["failing", "short", "corrupt"])
def test_each_read_that_fails_is_named(tmp_path: Path, io: str, what: str) -> None:
    rng = np.random.default_rng(7)
    row_ids, records = np.arange(3000, dtype=np.int64), records_of(rng, LAYOUT, 3000)
    reader = RunReader(tmp_path, LAYOUT, io=io, depth=3)
    ordinal = reader.add(write_run(tmp_path, 1, LAYOUT, row_ids, records))
    places = np.arange(0, 3000, 200)
    for number in range(len(places)):
        reader._records.inject(what, number, 1)
        expectation: contextlib.AbstractContextManager[object] = pytest.raises(
            CorruptPageError, match=r"record .* of table layers\.1"
        )
        if what == "corrupt":  # may hit bytes between the records
            expectation = contextlib.suppress(CorruptPageError)
        with expectation:
            found = read_back(reader, np.full(len(places), ordinal), places, row_ids[places])
            np.testing.assert_array_equal(found, records[places])
    reader._records.inject("none")
    found = read_back(reader, np.full(len(places), ordinal), places, row_ids[places])
    np.testing.assert_array_equal(found, records[places])


def test_a_run_that_was_removed_is_closed_and_asked_for_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    row_ids, records = np.arange(10, dtype=np.int64), records_of(rng, LAYOUT, 10)
    before = open_files()
    reader = RunReader(tmp_path, LAYOUT, io="pread")
    ordinal = reader.add(write_run(tmp_path, 1, LAYOUT, row_ids, records))
    reader.remove(ordinal)
    assert open_files() <= before
    with pytest.raises(ConfigError, match="row 4 should be record 4"):
        read_back(reader, np.full(1, ordinal), np.array([4]), np.array([4]))


def test_a_writer_that_is_left_leaves_no_file(tmp_path: Path) -> None:
    with RunWriter(tmp_path, 1, LAYOUT) as writer:
        writer.buffer()[:5] = 0
        writer.write(5, np.arange(5))
    assert list((tmp_path / "training").iterdir()) == []


def test_a_failed_sync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with RunWriter(tmp_path, 1, LAYOUT) as writer:
        writer.buffer()[:5] = 0
        writer.write(5, np.arange(5))
        writer.finish()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(ConfigError, match=r"00000001-layers\.1\.run"):
                writer.sync()
        with pytest.raises(ConfigError, match="write its rows anew"):
            writer.sync()
    assert list((tmp_path / "training").iterdir()) == []
