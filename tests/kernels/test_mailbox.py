"""Mailboxes: a GPU, played by NumPy, gets the entries that it asked for or a status,
whatever it writes and whatever fails."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.shapes import ENTRY_BYTES, POISON
from support.stores import Model, open_behind_hbm, random_keys
from support.waiting import WAIT_S

import tierstore
from tierstore import kernels

TABLE_ENTRY_BYTES = {0: ENTRY_BYTES, 1: ENTRY_BYTES, 2: 24}
NAMES = ("layers.1", "layers.14", "plain")

Opener = Callable[[Path, Path], tierstore.Store]
STORES: dict[str, Opener] = {
    "cached": lambda built, _: tierstore.open(built, dram="600KiB"),
    "resident": lambda built, _: tierstore.open(built, dram="64MiB"),
    "placed": lambda _, placed: tierstore.open(placed, dram="400KiB"),
    "mmap": lambda _, placed: tierstore.open(placed, dram="400KiB", io="mmap"),
    "behind hbm": lambda _, placed: open_behind_hbm(placed, 600),
}


@pytest.fixture
def store(built: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(built, dram="600KiB") as store:
        yield store


def server_of(store: tierstore.Store) -> Any:
    """The server of a store's engine, made when it is first wanted."""
    if not hasattr(store, "server_of_test"):
        store.server_of_test = kernels.MailboxServer(store._engine.native)  # type: ignore[attr-defined]
    return store.server_of_test


def inject(store: tierstore.Store, what: str, first: int = 0, count: int = 1) -> None:
    store._engine._engine.inject(what, first, count)


def block_of(num_bytes: int) -> np.ndarray:
    memory = np.full(num_bytes + 64, POISON, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


class Device:
    """What a GPU does: writes a request, its number last, and waits for the answer."""

    def __init__(self, server: Any, index: int = 0, pairs_max: int = 600, *, by_row_id: bool = False) -> None:
        self.pairs_max, self.index, self.step = pairs_max, index, 0
        entry_bytes = TABLE_ENTRY_BYTES[index]
        self.block = block_of(kernels.mailbox_bytes(pairs_max, entry_bytes, 8 if by_row_id else 0))
        self.words = self.block[:192].view(np.int64)
        pairs_start, entries_start = kernels.mailbox_pairs_start(pairs_max), kernels.mailbox_entries_start(pairs_max)
        self.keys = self.block[kernels.MAILBOX_STARTS["keys"] : pairs_start].view(np.int64)
        self.pairs = self.block[pairs_start : pairs_start + 4 * pairs_max].view(np.int32)
        entries_end = entries_start + pairs_max * entry_bytes
        self.entries = self.block[entries_start:entries_end].reshape(pairs_max, entry_bytes)
        if by_row_id:
            row_ids_start = kernels.mailbox_row_ids_start(pairs_max, entry_bytes)
            assert row_ids_start % 64 == 0
            assert 0 <= row_ids_start - entries_end < 64
            self.row_ids = self.block[row_ids_start:].view(np.int64).reshape(pairs_max, 8)
        self.id = server.add(index, self.block, pairs_max, by_row_id)

    def __getitem__(self, word: str) -> int:
        return int(self.words[kernels.MAILBOX_STARTS[word] // 8])

    def __setitem__(self, word: str, value: int) -> None:
        self.words[kernels.MAILBOX_STARTS[word] // 8] = value

    def ask(self, keys: np.ndarray, pairs: np.ndarray, count: int | None = None) -> None:
        self.entries[...] = POISON
        self["num_misses"] = len(keys) if count is None else count
        self.keys[: len(keys)], self.pairs[: len(pairs)] = keys, pairs
        self.step += 1
        self["requested"] = self.step

    def answer(self) -> str:
        """Waits for it, and returns the status."""
        until = time.monotonic() + WAIT_S
        while self["answered"] != self.step:
            assert time.monotonic() < until, "no answer"
            time.sleep(0)
        return kernels.MAILBOX_STATUSES[self["status"]]

    def looks_up(self, tokens: np.ndarray, pairs: np.ndarray, model: Model) -> None:
        """Asks for pairs of tokens [N, O] and checks every byte of what comes."""
        self.ask(tokens.reshape(-1)[pairs], pairs)
        assert self.answer() == "there"
        self.check(tokens, pairs, model)

    def check(self, tokens: np.ndarray, pairs: np.ndarray, model: Model) -> None:
        expected = model.expected(NAMES[self.index], tokens).reshape(-1, self.entries.shape[1])[pairs]
        np.testing.assert_array_equal(self.entries[: len(pairs)], expected)
        assert (self.entries[len(pairs) :] == POISON).all()


def keys_of(seed: int, num_tokens: int = 200, distinct: int | None = None) -> np.ndarray:
    """Random keys [N, O] without sentinels, which a device does not ask for."""
    keys = random_keys(np.random.default_rng(seed), num_tokens, distinct=distinct)
    keys[keys < 0] = 5
    return keys


def wait_for_threads(count: int) -> None:
    """Until there are so many threads that serve mailboxes; one that was told to end may take a moment more."""
    until = time.monotonic() + WAIT_S
    while True:
        names = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                names.append((task / "comm").read_text().strip())
        if names.count("tierstore-mail") == count:
            return
        assert time.monotonic() < until, names
        time.sleep(0.001)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_device_gets_exact_entries_from_wherever_they_lie(
    built: Path, placed: Path, model: Model, kind: str, seed: int
) -> None:
    with STORES[kind](built, placed) as store:
        device = Device(server_of(store))
        tokens, rng = keys_of(seed), np.random.default_rng(seed)
        store["layers.1"].lookup(tokens[:80])
        before = store.stats()
        pairs = rng.integers(0, 600, 500).astype(np.int32)  # with repeats
        for _ in range(3):
            device.looks_up(tokens, pairs, model)
        stats = store.stats()
        assert stats["keys"] - before["keys"] == 1500
        assert stats["batches"] - before["batches"] == 3
        assert server_of(store).served(device.id) == 3
        if kind in ("placed", "behind hbm"):
            assert set(store["layers.1"].explain(tokens).reshape(-1)) >= {"static", "recency"}
            assert stats["entries_read"] > 0
            assert stats["pages_read"] > 0


@pytest.mark.parametrize("count", [0, 1, 599, 600])
def test_a_request_of_nothing_and_a_full_one_are_answered(store: tierstore.Store, model: Model, count: int) -> None:
    device, tokens = Device(server_of(store)), keys_of(2)
    assert (
        device["requested"],
        device["answered"],
        device["status"],
        device["timed_out"],
        device["invalid_token_position"],
    ) == (0,) * 5
    device.looks_up(tokens, np.arange(600, dtype=np.int32)[::-1][:count], model)


def test_a_thousand_steps_are_answered_in_turn(store: tierstore.Store, model: Model) -> None:
    device, tokens, rng = Device(server_of(store), pairs_max=64), keys_of(3, 21, distinct=15), np.random.default_rng(3)
    expected = model.expected("layers.1", tokens).reshape(63, ENTRY_BYTES)
    for _ in range(1000):
        pairs = rng.integers(0, 63, rng.integers(0, 60)).astype(np.int32)
        device.ask(tokens.reshape(-1)[pairs], pairs)
        assert device.answer() == "there"
        np.testing.assert_array_equal(device.entries[: len(pairs)], expected[pairs])
    assert server_of(store).served(device.id) == 1000


def test_mailboxes_of_several_tables_are_served_side_by_side(store: tierstore.Store, model: Model) -> None:
    devices = [Device(server_of(store), index, 90) for index in (0, 1, 2, 1)]
    wrong = []

    def work(device: Device, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(40):
            try:
                if device.index == 2:
                    pairs = rng.integers(0, 33, 20).astype(np.int32)
                    device.looks_up(np.arange(33)[:, None], pairs, model)
                else:
                    pairs = rng.integers(0, 90, 50).astype(np.int32)
                    device.looks_up(keys_of(seed + step % 9, 30), pairs, model)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(device, seed)) for seed, device in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert not wrong
    assert [server_of(store).served(device.id) for device in devices] == [40] * 4


BAD_REQUESTS = {
    "one more than there is room for": {"count": 601},
    "a count below 0": {"count": -1},
    "the largest count": {"count": 2**63 - 1},
    "the least count": {"count": -(2**63)},
    "key -1": {"keys": -1},
    "the least key": {"keys": -(2**63)},
    "pair -1": {"pairs": -1},
    "a pair past the batch": {"pairs": 600},
    "the largest pair": {"pairs": 2**31 - 1},
    "the least pair": {"pairs": -(2**31)},
    "a row that a plain table has not": {"index": 2, "keys": 33},
    "the largest row": {"index": 2, "keys": 2**63 - 1},
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_request_that_cannot_be_is_damaged_and_writes_nothing(store: tierstore.Store, model: Model, bad: str) -> None:
    request = BAD_REQUESTS[bad]
    device = Device(server_of(store), request.get("index", 0))
    tokens = np.arange(11)[:, None] if device.index == 2 else keys_of(4)
    pairs = np.arange(11, dtype=np.int32)
    keys = tokens.reshape(-1)[pairs]
    keys[7], pairs[7] = request.get("keys", keys[7]), request.get("pairs", pairs[7])
    device.ask(keys, pairs, request.get("count"))
    assert device.answer() == "damaged"
    assert (device.entries == POISON).all()
    assert server_of(store).fault(device.id) is None
    device.looks_up(tokens, np.arange(11, dtype=np.int32), model)


@pytest.mark.parametrize("kind", STORES)
def test_rows_of_pairs_without_a_key_come_by_their_ids(built: Path, placed: Path, model: Model, kind: str) -> None:
    rows, rng = model.rows["layers.1"], np.random.default_rng(8)
    with STORES[kind](built, placed) as store:
        device = Device(server_of(store), by_row_id=True)
        tokens, ids = keys_of(8, 40), rng.integers(-1, len(rows), (120, 8))
        is_loose = rng.random(120) < 0.4
        expected = model.expected("layers.1", tokens).reshape(120, -1)
        expected[is_loose] = np.where((ids >= 0)[..., None], rows[ids], 0).reshape(120, -1)[is_loose]
        for _ in range(2):
            device.row_ids[:120] = ids
            device.ask(np.where(is_loose, -2, tokens.reshape(-1)), np.arange(120, dtype=np.int32))
            assert device.answer() == "there"
            np.testing.assert_array_equal(device.entries[:120], expected)
            assert (device.entries[120:] == POISON).all()


@pytest.mark.parametrize("bad", [-2, -(2**63), 2**63 - 1, 10**6])
def test_row_ids_that_the_table_does_not_have_are_no_request(store: tierstore.Store, model: Model, bad: int) -> None:
    device = Device(server_of(store), by_row_id=True)
    device.row_ids[:3] = 5
    device.row_ids[1, 4] = bad
    pairs = np.arange(3, dtype=np.int32)
    device.ask(np.array([7, -2, -2]), pairs)
    assert device.answer() == "damaged"
    device.row_ids[1, 4] = 6
    device.ask(np.array([7, -2, -2]), pairs)
    assert device.answer() == "there"
    np.testing.assert_array_equal(device.entries[1, 4 * 40 : 5 * 40], model.rows["layers.1"][6])
    other = Device(server_of(store))  # one that takes no row ids
    other.ask(np.array([7, -2, -2]), pairs)
    assert other.answer() == "damaged"


def test_random_bytes_get_an_answer_and_harm_nobody(store: tierstore.Store, model: Model) -> None:
    server, rng = server_of(store), np.random.default_rng(5)
    device = Device(server, pairs_max=8)
    other, tokens = Device(server, pairs_max=90), keys_of(5, 30)
    end = kernels.mailbox_entries_start(8)
    seen = set()
    for round_number in range(400):
        device.step = int(rng.integers(-(2**63), 2**63 - 1))
        device.block[8:64] = rng.integers(0, 256, 56, dtype=np.uint8)
        device.block[64:end] = rng.integers(0, 256, end - 64, dtype=np.uint8)  # also what is the thread's to write
        if round_number % 4:
            device["num_misses"] = int(rng.integers(-1, 10))
        if round_number % 3:
            device.pairs[:] = rng.integers(-1, 9, 8)
        if round_number % 3 == 1:
            device.keys[:] &= 2**63 - 1
        device["requested"] = device.step
        seen.add(device.answer())
    assert seen == {"there", "damaged"}
    other.looks_up(tokens, np.arange(90, dtype=np.int32), model)


def test_a_device_that_writes_while_it_is_served_harms_nobody(store: tierstore.Store, model: Model) -> None:
    server = server_of(store)
    wild, device, tokens = Device(server), Device(server), keys_of(6)
    stop = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(6)
        while not stop.is_set():
            wild["num_misses"] = int(rng.integers(-1, 601))
            wild.keys[:] = rng.integers(-1, 2**62, 600)
            wild.pairs[:] = rng.integers(-1 if rng.random() < 0.5 else 0, 600, 600)
            wild["requested"] = int(rng.integers(0, 2**62))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for seed in range(20):
            tokens = keys_of(seed)
            device.looks_up(tokens, np.arange(600, dtype=np.int32), model)
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert server.served(wild.id) > 0


def test_a_failing_read_is_a_fault_that_names_its_page(store: tierstore.Store, model: Model) -> None:
    device, tokens = Device(server_of(store)), keys_of(7)
    pairs = np.arange(600, dtype=np.int32)
    inject(store, "failing", 3)
    device.ask(tokens.reshape(-1), pairs)
    assert device.answer() == "fault"
    with pytest.raises(tierstore.CorruptPageError, match=r"page \d+ of table layers\.1 cannot be read"):
        raise server_of(store).fault(device.id)
    assert server_of(store).fault(device.id) is None
    device.looks_up(tokens, pairs, model)


def test_the_first_fault_is_kept_until_it_is_taken(store: tierstore.Store, model: Model) -> None:
    server, tokens = server_of(store), keys_of(8, 30)
    device, pairs = Device(server, 1), np.arange(90, dtype=np.int32)
    for what in ("corrupt", "failing"):
        inject(store, what, 0)
        device.ask(tokens.reshape(-1), pairs)
        assert device.answer() == "fault"
    device.looks_up(tokens, pairs, model)
    with pytest.raises(tierstore.CorruptPageError, match=r"table layers\.14.*checksum"):
        raise server.fault(device.id)
    assert server.fault(device.id) is None


def test_a_damaged_record_is_a_fault_that_names_its_place(placed: Path, model: Model) -> None:
    with open_behind_hbm(placed, 600) as store:
        device, tokens = Device(server_of(store)), keys_of(0)
        (pairs,) = np.nonzero(store["layers.1"].explain(tokens).reshape(-1) == "record")
        pairs = pairs[:5].astype(np.int32)
        assert len(pairs) == 5
        inject(store, "corrupt", 1)
        device.ask(tokens.reshape(-1)[pairs], pairs)
        assert device.answer() == "fault"
        with pytest.raises(tierstore.CorruptPageError, match=r"placed entry \d+ of table layers\.1"):
            raise server_of(store).fault(device.id)
        device.looks_up(tokens, pairs, model)


def test_a_closed_engine_is_said_to_be_closed(store: tierstore.Store) -> None:
    server = server_of(store)
    device, tokens = Device(server), keys_of(9)
    assert store._engine._engine.close(WAIT_S)  # before the server, as nobody should
    for _ in range(2):
        device.ask(tokens.reshape(-1)[:3], np.arange(3, dtype=np.int32))
        assert device.answer() == "closed"
        assert (device.entries == POISON).all()
    with pytest.raises(RuntimeError, match="closed"):
        Device(server)


def test_a_server_that_closes_ends_its_thread_and_touches_no_block(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as store:
        server = server_of(store)
        device = Device(server)
        device.ask(keys_of(10).reshape(-1), np.arange(600, dtype=np.int32))
        assert server.close(WAIT_S)
        assert device["answered"] in (0, 1)
        device.block[...] = POISON
        wait_for_threads(0)
    with pytest.raises(ValueError, match="no such mailbox"):
        server.served(device.id)
    with pytest.raises(RuntimeError, match="closed"):
        Device(server)
    assert (device.block == POISON).all()


def test_there_is_a_thread_only_while_there_are_mailboxes(store: tierstore.Store, model: Model) -> None:
    server, tokens = server_of(store), keys_of(11, 3)
    pairs = np.arange(9, dtype=np.int32)
    wait_for_threads(0)
    for _ in range(3):
        one, other = Device(server), Device(server, 1)
        wait_for_threads(1)
        one.looks_up(tokens, pairs, model)
        assert server.remove(one.id, WAIT_S)
        assert server.remove(one.id, WAIT_S)  # harmless
        other.looks_up(tokens, pairs, model)
        assert server.remove(other.id, WAIT_S)
        wait_for_threads(0)


def test_a_mailbox_that_is_removed_in_flight_is_let_go_when_its_request_ends(
    store: tierstore.Store, model: Model
) -> None:
    server = server_of(store)
    removed, other, tokens = Device(server), Device(server), keys_of(12)
    inject(store, "slow", 0, 8)  # 20 ms each
    removed.ask(tokens.reshape(-1), np.arange(600, dtype=np.int32))
    wait_for_reads(store)
    assert not server.remove(removed.id, 0)
    with pytest.raises(ValueError, match="no such mailbox"):
        server.fault(removed.id)
    assert server.remove(removed.id, WAIT_S)
    assert removed.answer() == "there"
    removed.check(tokens, np.arange(600), model)
    removed.ask(tokens.reshape(-1)[:5], np.arange(5, dtype=np.int32))
    for _ in range(2):  # the thread has looked at all mailboxes in between
        other.looks_up(tokens, np.arange(600, dtype=np.int32), model)
    assert removed["answered"] == 1
    assert (removed.entries == POISON).all()


def wait_for_reads(store: tierstore.Store) -> None:
    """Until a read of injected slowness has arrived: a request is under way."""
    until = time.monotonic() + WAIT_S
    while store._engine._engine.injected_reads() == 0:
        assert time.monotonic() < until
        time.sleep(0)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_server_that_goes_in_flight_waits_for_the_request(store: tierstore.Store, model: Model, how: str) -> None:
    server = kernels.MailboxServer(store._engine._engine)
    device, tokens = Device(server), keys_of(13)
    inject(store, "slow", 0, 8)
    device.ask(tokens.reshape(-1), np.arange(600, dtype=np.int32))
    wait_for_reads(store)
    if how == "close":
        assert not server.close(0)
        assert server.close(WAIT_S)
    else:
        del server
        gc.collect()
    assert device["answered"] == device.step
    device.check(tokens, np.arange(600), model)


def test_a_block_lives_until_its_mailbox_is_removed(store: tierstore.Store) -> None:
    server = server_of(store)
    device = Device(server)
    number, block = device.id, weakref.ref(device.block.base)
    del device
    gc.collect()
    assert block() is not None
    assert server.remove(number, WAIT_S)
    gc.collect()
    assert block() is None


def test_what_is_no_mailbox_is_refused(store: tierstore.Store) -> None:
    server = server_of(store)
    size = kernels.mailbox_bytes(10, ENTRY_BYTES)
    read_only = block_of(size)
    read_only.flags.writeable = False
    for block in (
        block_of(size)[:-1],
        block_of(size + 8)[8:],
        read_only,
        block_of(size * 2)[::2],
        block_of(size)[None],
    ):
        with pytest.raises(ValueError, match="a mailbox's block must be"):
            server.add(0, block, 10)
    with pytest.raises(ValueError, match="a mailbox's block must be"):
        server.add(0, block_of(size).view(np.int8), 10)
    for pairs_max in (0, 2**31, 2**63):
        with pytest.raises(ValueError, match="pairs_max must be"):
            server.add(0, block_of(size), pairs_max)
    with pytest.raises(ValueError, match="no such table"):
        server.add(3, block_of(size), 10)
    with pytest.raises(ValueError, match="no such mailbox"):
        server.served(99)
    with pytest.raises(ValueError, match="entry_bytes must be"):
        kernels.mailbox_bytes(1, 0)
    with pytest.raises(TypeError, match="must be an Engine"):
        kernels.MailboxServer(store)
    assert server.remove(99, 0)


def test_parts_of_a_block_follow_each_other_and_begin_at_lines() -> None:
    for pairs_max in (1, 2, 5, 16, 17, 10_000):
        pairs_start, entries_start = kernels.mailbox_pairs_start(pairs_max), kernels.mailbox_entries_start(pairs_max)
        assert pairs_start == 192 + 8 * pairs_max
        assert 0 <= entries_start - (pairs_start + 4 * pairs_max) < 64
        assert entries_start % 64 == 0
        assert kernels.mailbox_bytes(pairs_max, 2112) == entries_start + 2112 * pairs_max


def in_child(server: Any, act: Callable[[], None]) -> int:
    """Runs act in a forked child; returns its exit status, 0 where it raised nothing."""
    server.before_fork()
    pid = os.fork()
    server.after_fork(pid == 0)
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_forked_child_has_a_closed_server_and_a_store_that_works(
    store: tierstore.Store, model: Model, in_flight: bool
) -> None:
    server = server_of(store)
    device, tokens = Device(server), keys_of(14)
    device.looks_up(tokens[:5], np.arange(15, dtype=np.int32), model)
    if in_flight:
        inject(store, "slow", 0, 8)
        device.ask(tokens.reshape(-1), np.arange(600, dtype=np.int32))
        wait_for_reads(store)

    def act() -> None:
        with pytest.raises(RuntimeError, match="forked child"):
            Device(server)
        assert server.close(0)
        assert server.remove(device.id, 0)
        np.testing.assert_array_equal(store["layers.1"].lookup(tokens), model.expected("layers.1", tokens))
        before = device.block.copy()
        device["requested"] = 77
        store.close()
        before[:8] = device.block[:8]
        assert (device.block == before).all()

    assert in_child(server, act) == 0
    if in_flight:
        assert device.answer() == "there"
        device.check(tokens, np.arange(600), model)
    device.looks_up(tokens, np.arange(600, dtype=np.int32), model)
    assert server.served(device.id) == 2 + in_flight


def test_only_mailboxes_that_are_to_be_timed_are_and_only_requests_that_were_answered(store: tierstore.Store) -> None:
    def timed() -> int:
        return sum(store.stats()["latency"]["counts"])

    device, tokens, pairs = Device(server_of(store)), keys_of(3, 4), np.arange(3, dtype=np.int32)

    def ask_often(count: int | None = None) -> None:
        for _ in range(200):  # one in eight is timed, by chance: none of 200 would be once in 10^11 runs
            device.ask(tokens.reshape(-1)[pairs], pairs, count)
            device.answer()

    ask_often()
    assert timed() == 0
    server_of(store).time(device.id)
    ask_often(-1)  # which cannot be answered
    assert timed() == 0
    ask_often()
    assert 0 < timed() < 200
    with pytest.raises(ValueError, match="no such mailbox"):
        server_of(store).time(device.id + 1)
