"""Stores in place through the contract: rows in the checkpoint's own files, whatever reads and keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from contract.store_contract import StoreContract
from support.stores import Model, random_keys

import tierstore
from tierstore.formats import in_place


@pytest.fixture(scope="session")
def in_place_planes(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in place whose rows lie in two planes of blocks: nothing is copied."""
    store = tmp_path_factory.mktemp("in_place_planes") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "COPIED_FRACTION", 0)
        model.build(store, in_place=True, shard_bytes=65536)
    return store


class InPlaceStore(StoreContract):
    """Values in the checkpoint's blocks, scales in the store's pages."""

    @pytest.fixture
    def built(self, in_place_built: Path) -> Path:
        return in_place_built


class TestInPlaceStore(InPlaceStore):
    """Scales in memory; blocks by io_uring, where there is one."""

    def open_store(self, path: Path) -> tierstore.Store:
        store = tierstore.open(path, dram="700KiB")
        assert store.stats()["memory"]["side_bytes"] > 100_000
        return store


@pytest.mark.slow
class TestInPlaceSmallestStore(InPlaceStore):
    """The least budget that the error names: checksums, one set of entries a table, one key a read batch."""

    def open_store(self, path: Path) -> tierstore.Store:
        with pytest.raises(tierstore.BudgetError, match="staging") as caught:
            tierstore.open(path, dram=1)
        least = int(str(caught.value).split("below the ")[1].split()[0])
        store = tierstore.open(path, dram=least)
        assert store.stats()["memory"]["dram_bytes"] <= least
        return store


@pytest.mark.slow
class TestInPlaceMmapStore(InPlaceStore):
    """Scales read by page; maps only ask for read-ahead, bytes are read."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="300KiB", io="mmap")


@pytest.mark.slow
class TestInPlacePreadStore(InPlaceStore):
    """Blocks by a pool of threads."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="300KiB", io="pread")


@pytest.mark.slow
class TestInPlaceResidentStore(InPlaceStore):
    """Every row in DRAM, checked as it was loaded."""

    def open_store(self, path: Path) -> tierstore.Store:
        store = tierstore.open(path, dram="64MiB")
        assert store.stats()["memory"]["side_bytes"] == 0
        return store


def test_rows_of_two_planes_in_place_are_two_reads(in_place_planes: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(0), 100)
    for io in ("auto", "mmap", "pread"):
        with tierstore.open(in_place_planes, dram="500KiB", io=io) as store:
            for name in ("layers.1", "layers.14"):
                np.testing.assert_array_equal(store[name].lookup(keys), model.expected(name, keys))


@pytest.mark.slow
class TestInPlacePlanes(StoreContract):
    """Both planes in the checkpoint's blocks: a row is two reads."""

    @pytest.fixture
    def built(self, in_place_planes: Path) -> Path:
        return in_place_planes

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="500KiB")


@pytest.mark.slow
class TestInPlacePlacedStore(StoreContract):
    """With a placement, which is made of checked blocks."""

    @pytest.fixture
    def built(self, in_place_placed: Path) -> Path:
        return in_place_placed

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="400KiB")
