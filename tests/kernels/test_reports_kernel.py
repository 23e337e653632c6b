"""The ring of reports: what is taken was written, none twice, and what is missing is counted;
whatever clients do to it."""

from __future__ import annotations

import inspect
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import POISON
from support.waiting import WAIT_S

from tierstore import kernels
from tierstore.kernels import CLIENT_BLOCK_BYTES, NUM_RING_REPORTS, REPORT

HEADER = {"active_0": 0, "active_1": 8, "written": 16, "read": 24, "dropped": 32, "magic": 40}  # in words of 8 bytes
FACTOR = 0x9E3779B97F4A7C15


def fresh_block() -> np.ndarray:
    block = np.frombuffer(mmap.mmap(-1, CLIENT_BLOCK_BYTES), dtype=np.uint8)
    block[:] = POISON
    kernels.init_client_block(block)
    return block


def told(names: np.ndarray) -> np.ndarray:
    """Reports whose every field is told by a name, int64 [n], so that a torn one shows."""
    mixed = names.astype(np.uint64) * np.uint64(FACTOR)
    reports = np.zeros(len(names), dtype=REPORT)
    reports["key"] = names
    for field, shift in (("table", 16), ("order", 32), ("source_and_weight", 40)):
        reports[field] = (mixed >> np.uint64(shift)).astype(reports.dtype[field])
    return reports


def drain(reader: kernels.ReportReader, size: int = NUM_RING_REPORTS) -> np.ndarray:
    """All that is there; what was reserved and not written is passed by."""
    parts, out = [], np.zeros(size, dtype=REPORT)
    for _ in range(2 + NUM_RING_REPORTS // size):
        parts.append(out[: reader.take(out)].copy())
    return np.concatenate(parts)


def words(block: np.ndarray) -> np.ndarray:
    return block.view(np.uint64)


def test_a_block_is_laid_out_as_drawn() -> None:
    block = fresh_block()
    assert len(block) == CLIENT_BLOCK_BYTES == 4096 + NUM_RING_REPORTS * REPORT.itemsize
    assert np.flatnonzero(words(block)).tolist() == [HEADER["magic"]]
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    writer.add(told(np.arange(5)))
    assert words(block)[[HEADER["written"], HEADER["read"], HEADER["dropped"]]].tolist() == [5, 0, 0]
    records = block[4096:].view([("report", REPORT.descr[:4]), ("seal", "<u4")])
    for field in ("key", "table", "order", "source_and_weight"):
        assert records["report"][field][:5].tolist() == told(np.arange(5))[field].tolist()
    assert np.all(records["seal"][5:] == 0)
    assert reader.take(np.zeros(3, dtype=REPORT)) == 3
    assert words(block)[[HEADER["written"], HEADER["read"]]].tolist() == [5, 3]


@pytest.mark.parametrize("size", [1, 7, NUM_RING_REPORTS - 1, NUM_RING_REPORTS])
@pytest.mark.parametrize("room", [1, 100, NUM_RING_REPORTS])
def test_reports_come_out_as_they_went_in_over_many_laps(size: int, room: int) -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    out, taken = np.zeros(room, dtype=REPORT), [np.zeros(0, dtype=REPORT)]
    written = told(np.arange(min(40 * size, 5 * NUM_RING_REPORTS)))
    for start in range(0, len(written), size):
        writer.add(written[start : start + size])
        while count := reader.take(out):
            taken.append(out[:count].copy())
    np.testing.assert_array_equal(np.concatenate(taken), written)
    assert (reader.lost, reader.dropped) == (0, 0)


def test_a_full_ring_drops_what_is_new_and_a_dead_reader_costs_no_more() -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    written = told(np.arange(NUM_RING_REPORTS + 10))
    writer.add(written[:20])
    writer.add(written[20:])  # 10 too many
    for _ in range(3):
        writer.add(written[:7])
    assert reader.dropped == 10 + 3 * 7
    np.testing.assert_array_equal(drain(reader), written[:NUM_RING_REPORTS])
    assert reader.lost == 0
    writer.add(written[:7])
    np.testing.assert_array_equal(drain(reader), written[:7])


def test_no_reports_and_no_room_are_nothing() -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    writer.add(told(np.arange(0)))
    assert reader.take(np.zeros(9, dtype=REPORT)) == 0
    writer.add(told(np.arange(3)))
    assert reader.take(np.zeros(0, dtype=REPORT)) == 0
    assert len(drain(reader)) == 3
    assert (reader.lost, reader.dropped) == (0, 0)


@pytest.mark.parametrize("num_threads", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 48, 3000])
def test_every_report_of_many_threads_is_read_once_or_counted_as_lost(num_threads: int, batch: int) -> None:
    block = fresh_block()
    reader = kernels.ReportReader(block)
    enough = threading.Event()
    written = [0] * num_threads

    def write(thread: int) -> None:
        writer = kernels.ReportWriter(block)
        while not enough.is_set():
            start = thread * 10**12 + written[thread]
            writer.add(told(np.arange(start, start + batch)))
            written[thread] += batch

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    taken = [take_until(reader, 3000 if batch == 1 else 100_000)]
    enough.set()
    for thread in threads:
        thread.join(WAIT_S)
    taken.append(drain(reader))
    reports = np.concatenate(taken)
    np.testing.assert_array_equal(reports, told(reports["key"]))
    assert len(np.unique(reports["key"])) == len(reports)
    assert np.all(reports["key"] % 10**12 < np.array(written)[reports["key"] // 10**12])
    assert len(reports) + reader.lost + reader.dropped == sum(written)


# A client in a process of its own reports start, start + 1, .. until its input ends, then says how many. Arguments: the
# block's descriptor, the start, how many at once.
CLIENT = """
import mmap, select, sys
import numpy as np
from tierstore import kernels
from tierstore.kernels import REPORT
FACTOR = {factor}
{told}
descriptor, start, batch = map(int, sys.argv[1:])
block = np.frombuffer(mmap.mmap(descriptor, kernels.CLIENT_BLOCK_BYTES), dtype=np.uint8)
writer, count = kernels.ReportWriter(block), 0
while not select.select([sys.stdin], [], [], 0)[0]:
    writer.add(told(np.arange(start + count, start + count + batch)))
    count += batch
print(count)
"""


def start_client(descriptor: int, start: int, batch: int) -> subprocess.Popen[str]:
    code = CLIENT.format(factor=FACTOR, told=inspect.getsource(told))  # importing this file would load all of pytest
    arguments = [sys.executable, "-c", code, *(str(number) for number in (descriptor, start, batch))]
    return subprocess.Popen(arguments, pass_fds=[descriptor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def take_until(reader: kernels.ReportReader, wanted: int) -> np.ndarray:
    """Takes so many reports or more, while they come; fails where they have not in WAIT_S. Until the first, writers
    start."""
    parts, out, num_taken = [], np.zeros(NUM_RING_REPORTS, dtype=REPORT), 0
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while num_taken < wanted:
        assert time.monotonic() < deadline, f"{num_taken:,} of {wanted:,} reports came in {WAIT_S} s"
        if count := reader.take(out):
            parts.append(out[:count].copy())
            num_taken += count
        elif not parts:
            pause.wait(0.001)
    return np.concatenate(parts)


@pytest.fixture
def shared() -> Iterator[tuple[int, np.ndarray]]:
    descriptor = os.memfd_create("reports")
    os.ftruncate(descriptor, CLIENT_BLOCK_BYTES)
    block = np.frombuffer(mmap.mmap(descriptor, CLIENT_BLOCK_BYTES), dtype=np.uint8)
    kernels.init_client_block(block)
    yield descriptor, block
    os.close(descriptor)


def test_two_processes_report_into_one_block(shared: tuple[int, np.ndarray]) -> None:
    descriptor, block = shared
    reader = kernels.ReportReader(block)
    clients = [start_client(descriptor, start, 100) for start in (0, 10**12)]
    taken = [take_until(reader, 100_000)]
    while not (taken[-1]["key"] >= 10**12).any() or not (taken[-1]["key"] < 10**12).any():
        taken.append(take_until(reader, 100_000))  # until both are at it
    written = [int(client.communicate(timeout=WAIT_S)[0]) for client in clients]
    taken.append(drain(reader))
    reports = np.concatenate(taken)
    np.testing.assert_array_equal(reports, told(reports["key"]))
    assert len(np.unique(reports["key"])) == len(reports)
    assert np.all(reports["key"] % 10**12 < np.where(reports["key"] < 10**12, *written))
    assert len(reports) + reader.lost + reader.dropped == sum(written)


def test_a_writer_killed_again_and_again_leaves_a_ring_that_works(shared: tuple[int, np.ndarray]) -> None:
    descriptor, block = shared
    reader, writer = kernels.ReportReader(block), kernels.ReportWriter(block)
    names = []
    for client_number in range(4):
        with start_client(descriptor, client_number * 10**12, 5000) as client:
            reports = take_until(reader, 20_000)
            client.send_signal(signal.SIGKILL)
            assert client.wait(WAIT_S) == -signal.SIGKILL
        reports = np.concatenate([reports, drain(reader)])
        np.testing.assert_array_equal(reports, told(reports["key"]))
        names.append(reports["key"])
        lost, own = reader.lost, told(-1 - np.arange(NUM_RING_REPORTS))
        writer.add(own)
        np.testing.assert_array_equal(drain(reader), own)
        assert reader.lost == lost
    taken = np.concatenate(names)
    assert len(np.unique(taken)) == len(taken)


def reserve(block: np.ndarray, count: int) -> None:
    """What a writer does that is stopped as soon as it has reserved."""
    words(block)[HEADER["written"]] += np.uint64(count)


def test_a_report_not_yet_written_gets_the_time_of_a_call_and_is_then_lost() -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    out = np.zeros(NUM_RING_REPORTS, dtype=REPORT)
    writer.add(told(np.arange(4)))
    reserve(block, 3)
    writer.add(told(np.arange(10, 14)))
    assert reader.take(out) == 4
    assert reader.lost == 0
    reserve(block, 1)
    writer.add(told(np.arange(20, 22)))
    assert reader.take(out) == 4  # past the first gap, and up to the second, which is new
    assert out["key"][:4].tolist() == [10, 11, 12, 13]
    assert reader.lost == 3
    assert reader.take(out) == 2
    assert reader.lost == 4


def test_a_writer_that_comes_a_lap_late_damages_only_the_report_it_overwrites() -> None:
    """The late one's key beside the other's table would be a report that nobody wrote."""
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    reserve(block, 1)
    assert len(drain(reader)) == 0
    assert reader.lost == 1
    reports = told(np.arange(NUM_RING_REPORTS))
    writer.add(reports)
    words(block)[512] = 10**6  # the key of position 0, which has been NUM_RING_REPORTS's since
    np.testing.assert_array_equal(drain(reader), reports[:-1])
    assert reader.lost == 2


def test_a_report_half_written_over_an_old_one_is_not_taken() -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    writer.add(told(np.arange(NUM_RING_REPORTS)))
    drain(reader)
    reserve(block, 2)  # one with nothing written, one with its key
    words(block)[512 + 2] = 77
    assert len(drain(reader)) == 0
    assert reader.lost == 2


U64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]))
TAMPERING = st.lists(
    st.one_of(
        st.tuples(st.just("word"), st.sampled_from(sorted(HEADER.values())), U64),
        st.tuples(st.just("record"), st.integers(0, 2 * NUM_RING_REPORTS - 1), U64),
        st.tuples(st.just("noise"), st.integers(0, 2**32 - 1), st.just(0)),
        st.tuples(st.just("copies"), st.integers(0, NUM_RING_REPORTS - 1), st.just(0)),
        st.tuples(st.just("move"), st.sampled_from(["written", "read"]), U64),
        st.tuples(st.just("add"), st.integers(0, 2 * NUM_RING_REPORTS), st.just(0)),
        st.tuples(st.just("take"), st.integers(0, 2 * NUM_RING_REPORTS), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(TAMPERING)
def test_whatever_stands_in_a_block_reading_it_ends_and_the_ring_recovers(tampering: list[tuple[Any, ...]]) -> None:
    block = fresh_block()
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    for what, where, value in tampering:
        if what == "word":
            words(block)[where] = value
        elif what == "record":
            words(block)[512 + where] = value
        elif what == "noise":
            block[:] = np.random.default_rng(where).integers(0, 256, len(block), dtype=np.uint8)
        elif what == "copies":
            words(block)[512:].reshape(-1, 2)[:] = words(block)[512 + 2 * where : 514 + 2 * where]
        elif what == "move":
            words(block)[HEADER[where] : HEADER[where] + 1] += np.uint64(value)  # a scalar would warn of overflow
        elif what == "add":
            writer.add(told(np.arange(where)))
        else:
            lost = reader.lost
            out = np.zeros(where, dtype=REPORT)
            assert 0 <= reader.take(out) <= min(where, NUM_RING_REPORTS)
            assert 0 <= reader.lost - lost <= NUM_RING_REPORTS
    drain(reader)
    drain(reader)  # where `written` jumped, the first went on from there
    reports = told(np.arange(NUM_RING_REPORTS))
    writer.add(reports)
    np.testing.assert_array_equal(drain(reader), reports)


def test_random_records_do_not_pass_for_reports() -> None:
    block = fresh_block()
    reader, rng = kernels.ReportReader(block), np.random.default_rng(0)
    for _ in range(10):
        block[4096:] = rng.integers(0, 256, CLIENT_BLOCK_BYTES - 4096, dtype=np.uint8)
        reserve(block, NUM_RING_REPORTS)
        assert len(drain(reader)) == 0
    assert reader.lost == 10 * NUM_RING_REPORTS


def test_blocks_and_arrays_that_do_not_fit_are_refused() -> None:
    block = fresh_block()
    read_only = block.view()
    read_only.flags.writeable = False
    longer = np.frombuffer(mmap.mmap(-1, CLIENT_BLOCK_BYTES + 4096), dtype=np.uint8)
    for bad in (longer, longer[8 : CLIENT_BLOCK_BYTES + 8], longer[:-8192], block.view(np.int8), block.reshape(2, -1),
                longer[: 2 * CLIENT_BLOCK_BYTES : 2], read_only):  # fmt: skip
        for use in (kernels.init_client_block, kernels.ReportReader, kernels.ReportWriter):
            with pytest.raises(ValueError):
                use(bad)
    writer, reader = kernels.ReportWriter(block), kernels.ReportReader(block)
    for bad in (np.zeros((2, 2), dtype=REPORT), np.zeros(3, dtype=np.int64)):
        with pytest.raises((ValueError, TypeError)):
            writer.add(bad)
        with pytest.raises(ValueError):
            reader.take(bad)
    with pytest.raises(ValueError):
        reader.take(np.zeros(6, dtype=REPORT)[::2])
    writer.add(told(np.arange(6))[::2])
    assert drain(reader)["key"].tolist() == [0, 2, 4]


def test_a_writer_refuses_a_block_of_another_version() -> None:
    block = fresh_block()
    words(block)[HEADER["magic"]] += np.uint64(1)
    with pytest.raises(ValueError, match="version"):
        kernels.ReportWriter(block)
