"""A store through a daemon, held to what every store promises; and traces, explanations and the adapter over one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from contract.store_contract import StoreContract
from support.device import DEVICE
from support.served import KIB, MIB, least_budget, request, serving
from support.stores import Model, place_some, random_keys
from support.waiting import eventually

import tierstore
from tierstore.formats.key_trace import read_key_blocks
from tierstore.tiers.nvme import choose_io


@pytest.fixture(scope="class")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The daemon of a class."""
    asked: Any = request.cls
    if asked.io != "auto" and choose_io(asked.io).mode != asked.io:
        pytest.skip(f"the kernel has no {asked.io} here")
    store, asked.socket = request.getfixturevalue(asked.fixture), tmp_path_factory.mktemp("daemon") / "socket"
    with serving(store, asked.socket, asked.dram_bytes or least_budget(store), io=asked.io) as daemon:
        yield
        eventually(lambda: daemon.stat().clients.attached == 0)  # who closes, leaves nothing behind
        stat = daemon.stat()
        assert (stat.feed.errors, stat.learning.reports_refused, stat.clients.refused) == (0, 0, 0)


@pytest.mark.usefixtures("served")
class AttachedContract(StoreContract):
    """One daemon serves all tests of a class; each of them attaches by itself."""

    fixture = "built"
    dram_bytes: ClassVar[int] = 0
    io: ClassVar[str] = "auto"
    socket: ClassVar[Path]

    def open_store(self, path: Path) -> tierstore.Store:
        store = tierstore.connect(self.socket, io=self.io, staging="1MiB")
        assert store.name.startswith(str(path))
        return store


class TestAttachedCached(AttachedContract):
    """About a third of the tables: entries come and go while lookups run."""

    dram_bytes = 900 * KIB


class TestAttachedResident(AttachedContract):
    """Every table whole in the daemon's memory."""

    dram_bytes = 16 * MIB


class TestAttachedSmallest(AttachedContract):
    """The least that a daemon takes: a slot or two, and one set of entries a table."""


class TestAttachedUring(AttachedContract):
    """Misses by io_uring."""

    dram_bytes, io = 700 * KIB, "uring"


class TestAttachedMmap(AttachedContract):
    """Misses by memory maps."""

    dram_bytes, io = 700 * KIB, "mmap"


class TestAttachedPread(AttachedContract):
    """Misses by threads of pread."""

    dram_bytes, io = 700 * KIB, "pread"


class PlacedContract(AttachedContract):
    """A placement, part of it in the daemon's memory and part in its file."""

    fixture = "placed"

    @pytest.fixture
    def built(self, placed: Path) -> Path:
        return placed


class TestAttachedPlaced(PlacedContract):
    """With room for a part of it."""

    dram_bytes = 900 * KIB


class TestAttachedHbm(PlacedContract):
    """Part of the placement in HBM, the rest as the daemon has it."""

    dram_bytes = 900 * KIB

    def open_store(self, path: Path) -> tierstore.Store:
        store = tierstore.connect(self.socket, io=self.io, staging="1MiB", hbm="256KiB", device=DEVICE)
        assert store.name.startswith(str(path))
        return store


class TestAttachedPlacedPread(PlacedContract):
    """With room for most of it, by pread."""

    dram_bytes, io = 1200 * KIB, "pread"


def accesses_of(path: Path) -> list[tuple[int, int, int]]:
    """(table, order index, key) of each access in a trace, in order."""
    return [
        (int(table), int(order), int(key))
        for block in read_key_blocks(path)
        for table, order, key, _ in zip(*block, strict=True)
    ]


@pytest.mark.parametrize("dram_bytes", [900 * KIB, 16 * MIB], ids=["cached", "resident"])
def test_a_trace_of_an_attached_store_has_every_access(
    built: Path, model: Model, tmp_path: Path, dram_bytes: int
) -> None:
    keys = random_keys(np.random.default_rng(0), 50)
    with serving(built, tmp_path / "s", dram_bytes), tierstore.connect(tmp_path / "s") as store:
        store.start_trace(tmp_path / "trace", share=1)
        np.testing.assert_array_equal(store["layers.14"].lookup(keys), model.expected("layers.14", keys))
        request(tmp_path / "s", "swap", store=str(built))  # a new engine takes the old one's place under the recorder
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert store.stop_trace() is not None
    expected = [(table, o, k) for table in (1, 0) for token in keys.tolist() for o, k in enumerate(token) if k >= 0]
    assert accesses_of(tmp_path / "trace") == expected


def test_explain_says_where_a_key_is(own_store: Path, tmp_path: Path) -> None:
    chosen = place_some(own_store)["layers.1"]
    keys = np.full((3, 3), -1, dtype=np.int64)
    for token, place in enumerate((0, -1)):  # the hottest of the placement, and its coldest
        keys[token, chosen.order_index[place]] = chosen.keys[place]
    keys[2] = 77
    with serving(own_store, tmp_path / "s", 900 * KIB) as daemon, tierstore.connect(tmp_path / "s") as store:
        table = store["layers.1"]
        sources = table.explain(keys)
        assert sources[keys < 0].tolist() == ["none"] * 4
        assert sources[keys >= 0].tolist() == ["static", "record", "pages", "pages", "pages"]
        table.lookup(keys)
        eventually(lambda: (table.explain(keys)[keys >= 0] == ["static", *["recency"] * 4]).all())
        assert store.stats()["keys"] == 5  # explaining counts nothing
        eventually(lambda: daemon.stat().feed.read_keys == 4)  # counted once the entries can be seen
    with serving(own_store, tmp_path / "s", 32 * MIB), tierstore.connect(tmp_path / "s") as store:
        assert store["layers.1"].explain(keys)[2].tolist() == ["resident"] * 3


def test_what_does_not_fit_of_a_placement_is_read_as_records(placed: Path, tmp_path: Path) -> None:
    with serving(placed, tmp_path / "s", 900 * KIB) as daemon, tierstore.connect(tmp_path / "s") as store:
        drawn = random_keys(np.random.default_rng(3), 700)[:120]
        sources = store["layers.1"].explain(drawn)
        assert {"static", "record", "pages"} <= set(sources.flat)
        store["layers.1"].lookup(drawn)
        counters = store.stats()
        assert counters["entries_read"] > 0
        assert counters["hits"]["dram"] == (sources == "static").sum()
        stat = daemon.stat()
        assert stat.memory.used_bytes <= stat.memory.budget_bytes == 900 * KIB


def test_stats_of_a_client_are_its_own_and_the_daemons_are_of_all(built: Path, tmp_path: Path) -> None:
    keys = np.arange(30, dtype=np.int64).reshape(-1, 3)
    with serving(built, tmp_path / "s", 900 * KIB) as daemon:
        with tierstore.connect(tmp_path / "s") as one, tierstore.connect(tmp_path / "s") as other:
            one["layers.1"].lookup(keys)
            for _ in range(2):
                other["layers.14"].lookup(keys)
            assert (one.stats()["keys"], other.stats()["keys"]) == (30, 60)
            assert one.stats()["attached"] == {"socket": str(tmp_path / "s"), "now": True, "version": 1}
            memory = one.stats()["memory"]
            assert memory["dram_bytes"] == daemon.stat().memory.used_bytes <= memory["budget_bytes"] == 900 * KIB
        eventually(lambda: daemon.stat().clients.attached == 0)
        counters = daemon.stat().counters
        assert counters.keys == 90  # reported at the end, and kept when they are gone
        assert counters.tables["layers.14"].hits.dram + counters.tables["layers.14"].hits.nvme == 60
        eventually(lambda: daemon.stat().learning.reports >= 90)  # what it told last, too


@pytest.mark.parametrize(
    ("options", "named"),
    [({"io": "fast"}, "io: 'fast'"), ({"staging": "much"}, "staging"), ({"token_file": "t"}, "token_file")],
)
def test_options_that_do_not_exist_are_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(tierstore.ConfigError, match=named):
        tierstore.connect(tmp_path / "s", **options)


def test_without_a_daemon_connecting_says_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(tierstore.DaemonError, match="tierstore serve"):
        tierstore.connect(tmp_path / "s")
