"""A store over several servers keeps the contract of stores; which addresses make one, and the client's own set."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.shapes import HEADS, POISON, ROW_BYTES
from support.sliced import build_slices, serving_all
from support.stores import Model, make_model, random_keys

import tierstore
from tests.remote.test_remote import RemoteStore
from tierstore.formats.catalog import read_catalog
from tierstore.offline.compact import compact
from tierstore.remote import answers as remote_answers
from tierstore.remote import requests as remote_requests
from tierstore.tools.stat.command import command as stat

BUDGET = 2 * 60 * 3 * 400  # of two tables; enough for all of HOT
HOT = random_keys(np.random.default_rng(40), 60)


@pytest.fixture(scope="module")
def slices(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """Stores of the model's slices, by their number; those of two have HOT placed. Tests must not change them."""
    folder = tmp_path_factory.mktemp("slices")
    return {number: build_slices(model, folder, number, HOT if number == 2 else None) for number in (1, 2, 3)}


class SeveralStore(RemoteStore):
    """Servers in this process for each test, around the slices that `slices` has of `built`."""

    num_slices, own_dram, dram = 2, "0", "200KiB"  # which holds no slice whole

    @pytest.fixture(autouse=True)
    def sliced(self, slices: dict[int, list[Path]]) -> None:
        self._paths, self._urls = slices[self.num_slices], list[str]()

    def open_store(self, path: Path) -> tierstore.Store:  # noqa: ARG002
        if not self._urls:
            self._urls = self._stack.enter_context(serving_all(self._paths, dram=self.dram))
        return tierstore.connect(self._urls[::-1], dram=int(self.own_dram))

    test_single_pairs_get_their_own_entries = None  # of a GPU; refused as for one server


@pytest.mark.slow
class TestSeveral(SeveralStore):
    """Two servers, by one message each way if lookups are small."""


@pytest.mark.slow
class TestThreeStreamed(SeveralStore):
    """Three servers, of which one has heads of two orders; lookups cut into requests of few tokens, in parts."""

    num_slices = 3

    @pytest.fixture(autouse=True)
    def cuts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_requests, "UNARY_BYTES_MAX", 0)
        monkeypatch.setattr(remote_answers, "CHUNK_BYTES", 5000)
        monkeypatch.setattr(remote_requests, "HEAD_BYTES", 0)

    def open_store(self, path: Path) -> tierstore.Store:
        store = super().open_store(path)
        for member in store._engine._asked.members:
            member.requests.tokens_max = 97
        return store


class TestSeveralWithASet(SeveralStore):
    """Two servers with placements, of which the client has the rows of about half."""

    own_dram = str(60 * 3 * 340)


@contextlib.contextmanager
def connected(paths: list[Path], **options: object) -> Iterator[tierstore.Store]:
    with serving_all(paths) as urls, tierstore.connect(urls, **options) as store:
        yield store


# Which addresses make one store.


@pytest.mark.parametrize("num_slices", [1, pytest.param(24, marks=pytest.mark.slow), 26])
def test_any_number_of_slices_gives_the_rows_of_the_whole(model: Model, tmp_path: Path, num_slices: int) -> None:
    """26: slices that begin inside heads, whose rows are asked for by their ids."""
    small = replace(model, sources=model.sources[1:])
    keys = random_keys(np.random.default_rng(1), 50)
    plain = np.random.default_rng(2).integers(-1, 33, (40, 1))
    with connected(build_slices(small, tmp_path, num_slices)) as store:
        out = np.full((50, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        store.submit({"layers.14": (keys, out)}).wait(60)
        np.testing.assert_array_equal(out, model.expected("layers.14", keys))
        np.testing.assert_array_equal(store["plain"].lookup(plain), model.expected("plain", plain))
        ids = model.row_ids("layers.14", keys)
        np.testing.assert_array_equal(store["layers.14"].rows(ids), out)
        np.testing.assert_array_equal(store["layers.14"].rows(ids[:, 5:7]), out[:, 5:7])
        assert store.stats()["keys"] == int((keys >= 0).sum() * 2 + (plain >= 0).sum())


def test_missing_overlapping_and_foreign_slices_are_refused_by_name(
    slices: dict[int, list[Path]], tmp_path: Path
) -> None:
    other, hashed = make_model(tmp_path / "rows", seed=9), make_model(tmp_path / "hash", seed=0)
    sources = tuple(replace(each, spec=replace(each.spec, fingerprint="f" * 64)) for each in hashed.sources)
    paths = [
        *slices[2], *slices[3][:1], *build_slices(other, tmp_path / "a", 2)[1:],
        *build_slices(replace(hashed, sources=sources), tmp_path / "b", 2)[1:],
        *build_slices(replace(hashed, sources=hashed.sources[:1]), tmp_path / "c", 2)[1:],
    ]  # fmt: skip
    with serving_all(paths) as (low, high, low_of_three, high_of_others, of_another_hash, of_fewer_tables):
        for urls, kind, words in (
            ([low], tierstore.ConfigError, r"layers\.1: no address given holds rows 4765 to 9595 of 9595; add the one"),
            ([high], tierstore.ConfigError, "no address given holds rows 0 to 4765"),
            ([low, low_of_three, high], tierstore.ConfigError, rf"{low_of_three} and {low} both hold rows 0 to 3195"),
            ([low, high_of_others], tierstore.StoreNotReadyError, "the slices are at different versions: grpc"),
            ([low, of_another_hash], tierstore.FingerprintMismatchError, "with another hash"),
            ([low, of_fewer_tables], tierstore.ConfigError, "slices of different stores"),
            ([low, high, low], tierstore.ConfigError, f"{low} is given twice"),
            ([f"{low}|{high}"], tierstore.ConfigError, "has other tables"),
            ([low, "/run/tierstore.sock"], tierstore.ConfigError, "only grpc://HOST:PORT"),
            ([], tierstore.ConfigError, "at least one"),
        ):
            with pytest.raises(kind, match=words):
                tierstore.connect(urls, timeout_s=20)
        with pytest.raises(tierstore.BudgetError, match="holds no entry"):
            tierstore.connect([low, high], dram=100)
        with pytest.raises(tierstore.ConfigError, match="dram is of a"):
            tierstore.connect(low, dram="1MiB")


def test_slices_of_one_store_have_a_digest_in_common_and_no_others(
    slices: dict[int, list[Path]], tmp_path: Path
) -> None:
    def common(paths: list[Path]) -> set[str]:
        images = [read_catalog(path) for path in paths]
        assert len({image.identity for image in images}) == len(images)
        return {image.common_identity for image in images}

    other = make_model(tmp_path / "rows", seed=9)
    compacted = [tmp_path / f"compacted-{index}" for index in range(2)]
    for path, new_path in zip(slices[2], compacted, strict=True):
        compact(path, new_path)
    found = [common(slices[2]), common(build_slices(other, tmp_path, 2)), common(compacted)]
    assert [len(digests) for digests in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3
    assert common(slices[3]) == found[0]


def test_a_slice_that_nobody_serves_is_named(slices: dict[int, list[Path]]) -> None:
    with serving_all(slices[2][:1]) as urls, pytest.raises(tierstore.DaemonError, match=r"127\.0\.0\.1:1 cannot be"):
        tierstore.connect([*urls, "grpc://127.0.0.1:1"], timeout_s=20)


# The client's own set.


def test_a_set_of_half_of_the_accesses_halves_the_bytes_on_the_wire(
    model: Model, slices: dict[int, list[Path]]
) -> None:
    rng = np.random.default_rng(41)
    keys = rng.integers(0, 2**63 - 1, (400, 3), dtype=np.int64)
    is_hot = rng.random(keys.shape) < 0.5
    hot = np.where(HOT < 0, 7, HOT)[rng.integers(0, 40, 400)]
    keys = np.where(is_hot & (hot != 7), hot, keys)
    with connected(slices[2], dram=BUDGET) as store:
        table = store["layers.1"]
        own = store._engine._asked.keeper.current
        has = own.take(0, keys, None)
        before = store.stats()
        sources = np.empty(keys.shape, dtype=np.uint8)
        out = np.full((400, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        np.testing.assert_array_equal(table.lookup(keys, out), model.expected("layers.1", keys))
        after = store.stats()
        assert 0.4 < has.mean() < 0.6
        assert after["bytes_read"] - before["bytes_read"] == (~has).sum() * 8 * ROW_BYTES
        assert after["hits"]["dram"] - before["hits"]["dram"] >= has.sum()
        assert sum(after["tables"]["layers.1"]["static_hits"].values()) >= has.sum()
        assert after["keys"] - before["keys"] == keys.size
        table.lookup(keys, sources=sources)
        assert (np.array(tierstore.kernels.SOURCES)[sources[has]] == "static").all()
        assert 0 < after["memory"]["dram_bytes"] <= after["memory"]["budget_bytes"] == BUDGET
        whole = store.stats()["bytes_read"]
        assert table.lookup(HOT[:10]).any()  # all of it from here
        assert store.stats()["bytes_read"] == whole


def test_a_small_budget_holds_the_hottest(slices: dict[int, list[Path]]) -> None:
    with connected(slices[2], dram=20 * 2 * 340 + 2000) as store:
        own = store._engine._asked.keeper.current
        assert own.num_bytes <= 20 * 2 * 340 + 2000
        has = own.take(0, HOT, None)
    assert has[HOT >= 0][:15].all()
    assert not has[30:].any()


def test_without_placements_there_is_no_set_and_no_error(slices: dict[int, list[Path]], model: Model) -> None:
    with connected(slices[3], dram="1MiB") as store:
        assert store._engine._asked.keeper.current is None
        np.testing.assert_array_equal(store["layers.1"].lookup(HOT), model.expected("layers.1", HOT))


# The command.


def test_stat_of_several_addresses_says_whether_they_are_one_store(slices: dict[int, list[Path]]) -> None:
    with serving_all(slices[2]) as (low, high):
        found = CliRunner().invoke(stat, [high, f"{low}|grpc://127.0.0.1:1"])
        assert found.exit_code == 0
        assert "together: one store at one version, common digest" in found.output
        assert f"{high}: rows of layers.1 4,765 to 9,595" in found.output
        assert "grpc://127.0.0.1:1: does not answer: grpc://127.0.0.1:1 cannot be reached" in found.output
        found = CliRunner().invoke(stat, [low, low.replace("127.0.0.1", "localhost"), "--json"])
        record = json.loads(found.stdout)
        assert found.exit_code == 1
        assert "both hold rows 0 to 4765" in record["together"]["error"]
        assert [each["remote"]["calls"] > 0 for each in record["servers"]] == [True, True]
        with pytest.raises(tierstore.ConfigError, match="all must be URLs"):
            CliRunner().invoke(stat, [low, "/run/tierstore.sock"], catch_exceptions=False)
