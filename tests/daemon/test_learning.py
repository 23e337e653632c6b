"""The tiers follow what clients ask for: misses are fed, what is hot becomes static, and no client can damage that."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.served import KIB, Traffic, killed, request, serving
from support.shapes import POISON
from support.stores import Model, place_some
from support.waiting import eventually

import tierstore
from tierstore import kernels
from tierstore.daemon import attachments, replanner
from tierstore.daemon.daemon import Daemon
from tierstore.decisions.replan import Entries, caught, fresh_choice
from tierstore.store.embedded import open_placement

NAME = "layers.1"
CACHED = 900 * KIB
BASE = 10**12  # keys of tests begin here, so that they are not those that others draw


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def daemon(built: Path, socket: Path) -> Iterator[Daemon]:
    with serving(built, socket, CACHED) as opened:
        yield opened


@pytest.fixture
def store(daemon: Daemon, socket: Path) -> Iterator[tierstore.Store]:
    del daemon
    with tierstore.connect(socket) as opened:
        yield opened


def until_heard(daemon: Daemon) -> None:
    """Waits until the daemon has counted all that its clients have reported so far."""

    def heard() -> bool:
        written = sum(int(block[128:136].view("<u8")[0]) for block in blocks_of(daemon))
        lost = sum(reader.lost for reader in daemon._host.attachments.readers())
        return daemon._learner.reports.num_taken + lost >= written

    eventually(heard)


def blocks_of(daemon: Daemon) -> list[np.ndarray]:
    return [block for each in daemon._host.attachments._of.values() for block in each.blocks.values()]


def some_keys(count: int, start: int = BASE) -> np.ndarray:
    return np.arange(start, start + 3 * count, dtype=np.int64).reshape(-1, 3)


def test_a_key_that_one_client_missed_is_a_hit_of_another(
    daemon: Daemon, store: tierstore.Store, socket: Path, model: Model
) -> None:
    keys = some_keys(40)
    np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    assert store.stats()["hits"]["nvme"] == keys.size
    with tierstore.connect(socket) as other:
        eventually(lambda: (other[NAME].explain(keys) == "recency").all())
        np.testing.assert_array_equal(other[NAME].lookup(keys), model.expected(NAME, keys))
        stats = other.stats()
        assert (stats["hits"]["dram"], stats["hits"]["nvme"], stats["pages_read"]) == (keys.size, 0, 0)
    feed = daemon.stat().feed
    assert (feed.read_keys, feed.queued_keys, feed.dropped_keys, feed.errors) == (keys.size, 0, 0, 0)


def test_keys_in_demand_become_static_and_stay_static(daemon: Daemon, store: tierstore.Store, model: Model) -> None:
    keys = some_keys(30)
    for _ in range(4):
        store[NAME].lookup(keys)
    until_heard(daemon)
    assert daemon.stat().learning.tracked_keys == keys.size
    done = request(Path(daemon.path), "replan")
    assert (done["entered"], done["left"]) == (keys.size, 0)
    assert (store[NAME].explain(keys) == "static").all()
    np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    assert sum(store.stats()["tables"][NAME]["static_hits"].values()) >= keys.size
    stat = daemon.stat()
    assert stat.epochs.static_entries[NAME] == keys.size
    assert stat.epochs.current > 1
    for _ in range(4):  # nothing better was asked for since: it stays, however often that is looked into
        assert request(Path(daemon.path), "replan")["left"] == 0
    assert (store[NAME].explain(keys) == "static").all()
    assert daemon.stat().learning.replans == 5


def test_a_key_looked_up_once_does_not_become_static(daemon: Daemon, store: tierstore.Store) -> None:
    store[NAME].lookup(some_keys(30))
    until_heard(daemon)
    assert request(Path(daemon.path), "replan")["entered"] == 0


def test_a_little_more_traffic_moves_nothing_and_clearly_more_does(daemon: Daemon, store: tierstore.Store) -> None:
    capacity = daemon._host.tiers.slots[NAME].capacity
    static, hotter = some_keys(capacity // 3), some_keys(60, BASE * 2)
    count_as(daemon, static, 16)
    assert request(Path(daemon.path), "replan")["entered"] == static.size  # and counted 8 times from now on
    count_as(daemon, hotter, 8)
    room = capacity - static.size
    done = request(Path(daemon.path), "replan")
    assert (done["entered"], done["left"]) == (room, 0)
    assert done == msgspec.to_builtins(daemon.stat().learning.last_replan) | {"ok": True}
    count_as(daemon, hotter, 16)  # 4 + 16 = 20 times against 4
    done = request(Path(daemon.path), "replan")
    assert (done["entered"], done["left"]) == (hotter.size - room,) * 2
    assert (store[NAME].explain(hotter) == "static").all()


def test_a_replan_in_many_small_rounds_ends_as_one_would(
    daemon: Daemon, store: tierstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replanner, "ROUND_ENTRIES", 10)
    monkeypatch.setattr(replanner, "SCAN_SETS", 3)
    slots = daemon._host.tiers.slots[NAME]
    warm, hot = some_keys(slots.capacity // 3 - 20), some_keys(100, BASE * 2)
    count_as(daemon, warm, 2)
    count_as(daemon, hot, 8)
    assert request(Path(daemon.path), "replan")["entered"] == slots.num_live == slots.capacity
    assert (store[NAME].explain(hot) == "static").all()
    hottest = some_keys(slots.capacity // 3, BASE * 3)
    count_as(daemon, hottest, 16)
    done = request(Path(daemon.path), "replan")
    assert done["entered"] == done["left"] == hottest.size
    assert done["steps"] >= hottest.size / 10
    assert (store[NAME].explain(hottest) == "static").all()


def count_as(daemon: Daemon, keys: np.ndarray, times: int) -> None:
    """Has the daemon count keys of the first table, as reports do, a power of two of times."""
    reports = np.zeros(keys.size, dtype=kernels.REPORT)
    reports["key"], reports["order"] = keys.reshape(-1), np.tile(np.arange(3), len(keys))
    reports["source_and_weight"] = times.bit_length() - 1 << 3 | kernels.SOURCES.index("static")
    daemon._learner.reports.learn(reports)


def test_a_shift_of_traffic_is_regained_within_two_replans(daemon: Daemon, store: tierstore.Store) -> None:
    rng = np.random.default_rng(0)
    capacity = daemon._host.tiers.slots[NAME].capacity
    pool = capacity  # tokens of three keys each: a third of what is asked for has room

    def draw(num_lookups: int, start: int) -> Iterator[np.ndarray]:
        for _ in range(num_lookups):
            ranks = np.minimum(rng.zipf(1.3, 200) - 1, pool - 1)
            yield np.ascontiguousarray(some_keys(pool, start)[ranks])

    def look_up(num_lookups: int, start: int) -> float:
        """Returns the share of keys that the static set answered."""
        before = store.stats()
        for number, keys in enumerate(draw(num_lookups, start)):
            store[NAME].lookup(keys)
            if number % 10 == 0:
                until_heard(daemon)  # else the ring may be full, which is allowed, and is not what is tested
        until_heard(daemon)
        after = store.stats()
        hits = [sum(stats["tables"][NAME]["static_hits"].values()) for stats in (before, after)]
        return (hits[1] - hits[0]) / (after["keys"] - before["keys"])

    def best(start: int) -> float:
        """The share that a plan from scratch catches, of what is counted exactly."""
        keys, counts = np.unique(np.concatenate(list(draw(200, start))), return_counts=True)
        order_index = ((keys - start) % 3).astype(np.uint8)
        counted = Entries(order_index, keys, counts.astype(np.uint32))
        return caught(fresh_choice(counted, capacity), counted)

    for start in (BASE, 2 * BASE):
        first = look_up(60, start)
        assert first < 0.1  # nothing of it is static yet
        request(Path(daemon.path), "replan")
        look_up(60, start)
        request(Path(daemon.path), "replan")
        assert look_up(60, start) >= 0.9 * best(start)


def test_a_bad_page_costs_its_own_entries_only(own_store: Path, socket: Path, model: Model) -> None:
    keys = some_keys(40)
    expected = model.expected(NAME, keys)
    page = model.row_ids(NAME, keys)[5, 2] // ((4096 - 16) // 40)
    with open(own_store / "shards" / f"0-{NAME}" / f"{page // 16:05d}.shard", "r+b") as file:
        file.seek(4096 * (page % 16) + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with serving(own_store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        good = np.zeros(keys.shape, dtype=bool)
        for token, order in np.ndindex(keys.shape):
            one = np.full((1, 3), -1, dtype=np.int64)
            one[0, order] = keys[token, order]
            for _ in range(3):
                with contextlib.suppress(tierstore.CorruptPageError):
                    rows = store[NAME].lookup(one)[0, order * 8 : order * 8 + 8]
                    assert np.array_equal(rows, expected[token, order * 8 : order * 8 + 8])
                    good[token, order] = True
        assert 0 < (~good).sum() < good.sum()
        eventually(lambda: (store[NAME].explain(keys)[good] == "recency").all())
        assert (store[NAME].explain(keys)[~good] == "pages").all()
        until_heard(daemon)
        request(Path(daemon.path), "replan")
        assert (store[NAME].explain(keys)[good] == "static").all()
        assert (store[NAME].explain(keys)[~good] == "pages").all()
        assert daemon.stat().feed.errors > 0


def test_a_placement_that_was_made_meanwhile_is_adopted_on_reload(own_store: Path, socket: Path, model: Model) -> None:
    with serving(own_store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        with Traffic(store, NAME, keys := some_keys(50), model.expected(NAME, keys)) as traffic:
            chosen = place_some(own_store)[NAME]
            request(socket, "reload")
            traffic.go_on()
        hottest = np.full((1, 3), -1, dtype=np.int64)
        hottest[0, chosen.order_index[0]] = chosen.keys[0]
        assert "static" in store[NAME].explain(hottest)
        slots = daemon._host.tiers.slots[NAME]
        assert slots.num_live == min(slots.capacity, len(chosen.keys))


def test_a_damaged_placement_is_not_adopted(own_store: Path, socket: Path, model: Model) -> None:
    with serving(own_store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        place_some(own_store)
        _, placed = open_placement(own_store, None, direct=False)
        assert placed is not None
        with contextlib.closing(placed), open(placed.path, "r+b") as file:
            file.seek(placed.placement.tables[NAME].indexes[0].byte_start)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(tierstore.FormatError, match="index"):
            request(socket, "reload")
        assert daemon.stat().epochs.static_entries[NAME] == 0
        np.testing.assert_array_equal(store[NAME].lookup(keys := some_keys(30)), model.expected(NAME, keys))


@pytest.mark.parametrize("with_placement", [False, True])
@pytest.mark.parametrize("budget_bytes", [500_000, 700_001, 1 << 20, 3 << 20, 33_333_333])
def test_what_a_daemon_takes_stays_within_its_budget(
    built: Path, placed: Path, socket: Path, budget_bytes: int, with_placement: bool
) -> None:
    with serving(placed if with_placement else built, socket, budget_bytes) as daemon:
        tiers, plan = daemon._host.tiers, daemon._host.tiers.plan
        blocks = [tiers.static, tiers.recency]
        taken = (
            sum(os.fstat(block.fd).st_size for block in blocks)
            + plan.staging.num_bytes
            + plan.counts_bytes
            + plan.work_bytes
        )
        resident = daemon._host.epochs.current.resident
        if resident:
            taken += 2 * os.fstat(resident.fd).st_size  # two versions, while one takes the other's place
        memory = daemon.stat().memory
        assert taken <= budget_bytes
        assert memory.used_bytes <= memory.budget_bytes == budget_bytes


def test_garbage_from_a_client_costs_only_its_own_reports(
    daemon: Daemon, store: tierstore.Store, socket: Path, model: Model
) -> None:
    keys = some_keys(30)
    (mine,) = blocks_of(daemon)
    reports = np.zeros(5, dtype=kernels.REPORT)
    reports["key"] = [-1, BASE, BASE, BASE, 33]
    reports["table"] = [0, 3, 65535, 0, 2]  # below 0; no such tables; no such order; beyond the plain table's rows
    reports["order"] = [0, 0, 0, 3, 0]
    kernels.ReportWriter(mine).add(reports)
    eventually(lambda: daemon.stat().learning.reports_refused >= 4)
    mine[256:264].view("<u8")[0] = 2**64 - 1  # reports that it says it dropped
    mine[4096:] = np.random.default_rng(0).integers(0, 256, len(mine) - 4096, dtype=np.uint8)
    mine[128:136].view("<u8")[0] += 2**40
    with tierstore.connect(socket) as other:
        np.testing.assert_array_equal(other[NAME].lookup(keys), model.expected(NAME, keys))
        eventually(lambda: (other[NAME].explain(keys) == "recency").all())
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    assert request(socket, "stat")["learning"]["reports_lost"] > 0  # it can be told, whatever they wrote


def test_counters_that_are_too_large_are_told_as_far_as_messages_go(
    daemon: Daemon, store: tierstore.Store, socket: Path
) -> None:
    backing: Any = store._backing

    def most(counters: Any) -> Any:
        if isinstance(counters, dict):
            return {name: most(part) for name, part in counters.items()}
        return [most(part) for part in counters] if isinstance(counters, list) else 2**63 - 1

    for _ in range(3):
        backing._session.channel.send({"counters": most(store.stats() and backing.engine.counters())})
        eventually(lambda: request(socket, "stat")["counters"]["keys"] > 2**50)
        (peer,) = daemon._host.attachments.clients()
        peer.drop("so that it is counted among those that are gone")
        eventually(
            lambda peer=peer: (
                daemon._host.attachments.clients() not in ([peer], []) and store.stats()["attached"]["now"]
            )
        )
    assert request(socket, "stat")["clients"]["attached"] == 1


def test_a_stopped_client_has_the_right_rows_after_any_number_of_replans(
    built: Path, socket: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "GRACE_PERIOD_S", 0.002)
    keys = some_keys(200)
    expected = np.tile(model.expected(NAME, keys), (16, 1, 1))
    read, write = os.pipe()
    child = os.fork()  # before there is a daemon: it shall have none of its descriptors
    if not child:
        with contextlib.suppress(BaseException):
            look_up_for_ever(socket, np.tile(keys, (16, 1)), expected, write)
        os._exit(1)
    os.close(write)
    order_index, flat = np.tile(np.arange(3, dtype=np.uint8), len(keys)), keys.reshape(-1)
    parts, rng = [np.s_[start::3] for start in range(3)], np.random.default_rng(0)
    with killed(child), serving(built, socket, 1500 * KIB) as daemon, open(read) as said:
        assert said.readline() == "right\n"
        slots = daemon._host.tiers.slots[NAME]
        assert slots.capacity > len(flat)  # all that is not static is in the recency cache
        for _ in range(40):
            threading.Event().wait(rng.random() * 0.004)  # so that it is stopped anywhere in a lookup
            os.kill(child, signal.SIGSTOP)
            os.waitpid(child, os.WUNTRACED)
            for part in parts:  # each goes to the slots of the one but one before
                daemon._host.epochs.change({NAME: (order_index[part], flat[part])}, {NAME: np.flatnonzero(slots.live)})
            os.kill(child, signal.SIGCONT)
            assert said.readline() == "right\n"
        stat = daemon.stat()
        assert stat.epochs.changes >= 120
        assert stat.clients.list[0].pid == child
        os.kill(child, signal.SIGKILL)
        assert "wrong" not in said.read()


def look_up_for_ever(socket: Path, keys: np.ndarray, expected: np.ndarray, write: int) -> None:
    """Says "right" after every fifth lookup, or what is wrong."""
    store = eventually(lambda: connected(socket))
    out = np.empty(expected.shape, dtype=np.uint8)
    while True:
        for _ in range(5):
            out[:] = POISON
            store[NAME].lookup(keys, out)
            if not np.array_equal(out, expected):
                os.write(write, b"wrong rows\n")
                return
        os.write(write, b"right\n")


def connected(socket: Path) -> tierstore.Store | None:
    with contextlib.suppress(tierstore.DaemonError):
        return tierstore.connect(socket)
    return None
