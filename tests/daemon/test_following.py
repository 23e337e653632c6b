"""A daemon serves published versions to attached clients and over gRPC, and follows new ones by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.served import KIB, MIB, Traffic, request, serving
from support.stores import make_model, place_some, random_keys
from support.versions import VersionedModel, make_versions
from support.waiting import eventually

import tierstore
from tierstore.daemon import following
from tierstore.daemon.daemon import Daemon
from tierstore.daemon.remote_lookups import Remote
from tierstore.formats.catalog import publish_versions, set_epoch
from tierstore.formats.versions import VersionRecord
from tierstore.offline import versions as publishing
from tierstore.offline.place import prune_placements
from tierstore.offline.versions import publish_rows

NAME = "layers.1"
CACHED = 1400 * KIB
KEYS = random_keys(np.random.default_rng(0), 100, distinct=40)


@pytest.fixture
def versions(tmp_path: Path) -> VersionedModel:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store")
    place_some(tmp_path / "store")
    return make_versions(model, tmp_path / "store", 1)


def check(store: tierstore.Store, versions: VersionedModel, version: int) -> None:
    model = versions.at(version)
    for name, table in store.tables.items():
        spec = table.spec
        if not spec.is_plain:
            for _ in range(2):
                np.testing.assert_array_equal(table.lookup(KEYS), model.expected(name, KEYS))
        row_ids = np.random.default_rng(4).integers(0, spec.num_rows, 300)
        np.testing.assert_array_equal(table.rows(row_ids), model.rows[name][row_ids])


@pytest.mark.parametrize(
    "dram_bytes", [CACHED, pytest.param(16 * MIB, marks=pytest.mark.slow)], ids=["cached", "resident"]
)
def test_clients_get_the_newest_version_and_follow_the_next_ones(
    versions: VersionedModel, tmp_path: Path, dram_bytes: int
) -> None:
    socket = tmp_path / "socket"
    with serving(versions.store, socket, dram_bytes, follow=True) as daemon, tierstore.connect(socket) as store:
        check(store, versions, 1)
        for version in (2, 3):
            changed = versions.draw(part=0.05)
            rows = [versions.at(each).expected(NAME, KEYS) for each in (version - 1, version)]
            with Traffic(store, NAME, KEYS, *rows) as traffic:
                traffic.go_on()
                assert publish_rows(versions.store, changed) == version
                eventually(lambda version=version: daemon.stat().store.published == version)
                eventually(lambda version=version: store.stats()["attached"]["version"] == version)
                traffic.go_on()
            check(store, versions, version)
        stat = daemon.stat()
        assert stat.store.previous is None
        assert stat.memory.used_bytes <= dram_bytes
        assert stat.feed.errors == 0


def test_after_a_followed_swap_placed_entries_are_still_read_as_records(
    versions: VersionedModel, tmp_path: Path
) -> None:
    drawn = random_keys(np.random.default_rng(3), 700)[:120]
    with serving(versions.store, tmp_path / "s", CACHED, follow=True) as daemon, tierstore.connect(tmp_path / "s") as s:
        versions.publish(part=0.02)
        eventually(lambda: daemon.stat().store.published == 2)
        eventually(lambda: s.stats()["attached"]["version"] == 2)
        sources = s[NAME].explain(drawn)
        assert {"record", "pages"} <= set(sources.flat)  # a touched row's entry is read from pages
        before = s.stats()["entries_read"]
        np.testing.assert_array_equal(s[NAME].lookup(drawn), versions.at(2).expected(NAME, drawn))
        assert s.stats()["entries_read"] > before
        check(s, versions, 2)


def test_a_daemon_without_a_placement_gets_none_by_following(versions: VersionedModel, tmp_path: Path) -> None:
    with serving(versions.store, tmp_path / "s", CACHED, follow=True, placement="none") as daemon:
        versions.publish(part=0.02)
        eventually(lambda: daemon.stat().store.published == 2)
        eventually(lambda: daemon.stat().epochs.alive == 1)
        request(tmp_path / "s", "reload")
        request(tmp_path / "s", "swap", store=str(versions.store))
        assert sum(daemon.stat().epochs.static_entries.values()) == 0
        with tierstore.connect(tmp_path / "s") as store:
            assert "record" not in store[NAME].explain(KEYS)
            check(store, versions, 2)


def test_a_placement_that_was_pruned_is_not_missed_by_a_followed_swap(versions: VersionedModel, tmp_path: Path) -> None:
    with serving(versions.store, tmp_path / "s", CACHED, follow=True) as daemon, tierstore.connect(tmp_path / "s") as s:
        set_epoch(versions.store, None)
        prune_placements(versions.store, 0)
        versions.publish(part=0.02)
        eventually(lambda: daemon.stat().store.published == 2)
        eventually(lambda: s.stats()["attached"]["version"] == 2)
        check(s, versions, 2)


def test_a_daemon_that_does_not_follow_moves_when_it_is_told_to(versions: VersionedModel, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with serving(versions.store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        versions.publish(part=0.1)
        check(store, versions, 1)
        assert daemon.stat().store.published == 1
        with pytest.raises(tierstore.BudgetError, match=r"version 2 .* has set \d+ aside: start it again .*--follow"):
            request(socket, "swap", store=str(versions.store))
        check(store, versions, 1)
    with serving(versions.store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        assert daemon.stat().store.published == 2
        check(store, versions, 2)


def test_remote_clients_follow_too(versions: VersionedModel, tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    socket = tmp_path / "socket"
    daemon = Daemon(versions.store, socket, CACHED, replan_s=None, follow=True)
    try:
        daemon.start(remote=Remote("127.0.0.1:0", None, None, None))
        with tierstore.connect(f"grpc://{daemon.remote_address}") as store:
            check(store, versions, 1)
            versions.publish()
            wanted = versions.at(2).expected(NAME, KEYS)
            eventually(lambda: np.array_equal(store[NAME].lookup(KEYS), wanted))
            check(store, versions, 2)
    finally:
        assert daemon.close()


def test_clients_of_a_store_in_place_follow_too(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", plain=False)
    model.build(tmp_path / "store", in_place=True)
    versions, socket = make_versions(model, tmp_path / "store", 1), tmp_path / "socket"
    with serving(versions.store, socket, CACHED, follow=True) as daemon, tierstore.connect(socket) as store:
        check(store, versions, 1)
        number = versions.publish()
        eventually(lambda: daemon.stat().store.published == number)
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        check(store, versions, 2)


def test_a_version_published_within_the_same_tick_of_the_clock_is_not_missed(
    versions: VersionedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes of the catalog may have one time of change: here, all of them."""
    tick = 0, 0, time.time_ns() + 3600 * 10**9, 0
    monkeypatch.setattr(following, "_signature", lambda _: tick)
    with serving(versions.store, tmp_path / "socket", CACHED, follow=True) as daemon:
        for version in (2, 3):
            versions.publish(part=0.05)
            eventually(lambda version=version: daemon.stat().store.published == version)


def test_a_version_that_cannot_be_served_leaves_the_one_before(
    versions: VersionedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    socket = tmp_path / "socket"
    with serving(versions.store, socket, CACHED, follow=True) as daemon, tierstore.connect(socket) as store:
        file = versions.store / "versions" / "00000002-layers.1.rows"
        moved = file.with_name("moved")

        def lose_and_publish(path: Path, records: Sequence[VersionRecord]) -> None:
            file.rename(moved)
            publish_versions(path, records)

        monkeypatch.setattr(publishing, "publish_versions", lose_and_publish)
        versions.publish()
        eventually(lambda: "not_followed" in caplog.text)
        check(store, versions, 1)
        assert daemon.stat().store.published == 1
        moved.rename(file)
        eventually(lambda: daemon.stat().store.published == 2)


def test_after_a_restart_the_newest_version_is_served(versions: VersionedModel, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with serving(versions.store, socket, CACHED, follow=True) as daemon:
        number = versions.publish()
        eventually(lambda: daemon.stat().store.published == number)
    versions.publish()
    with serving(versions.store, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        assert (daemon.stat().store.published, daemon.stat().store.previous) == (3, None)
        check(store, versions, 3)
