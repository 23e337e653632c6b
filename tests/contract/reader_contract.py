"""What every way of reading pages promises: inherited by a test class for each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.shapes import POISON
from support.stores import Model, random_keys

import tierstore
from tierstore.errors import CorruptPageError
from tierstore.formats.catalog import read_catalog
from tierstore.layout import TableLayout


def rows_of_pages(layout: TableLayout, pages: np.ndarray) -> np.ndarray:
    """Returns the ids of all rows that lie on these pages."""
    ids = (pages[:, None] * layout.rows_per_page + np.arange(layout.rows_per_page)).reshape(-1)
    return ids[ids < layout.spec.num_rows]


class ReaderContract:
    """Subclasses say how to open a store, whose engine reads, in `open_store`."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        raise NotImplementedError

    @pytest.fixture
    def store(self, built: Path) -> Iterator[tierstore.Store]:
        with self.open_store(built) as store:
            yield store

    @pytest.mark.parametrize("which", ["none", "first", "three", "odd", "all", "last"])
    def test_rows_are_those_of_their_pages(self, store, built: Path, model: Model, which: str) -> None:
        layout = read_catalog(built).tables["layers.1"]
        every = np.arange(layout.num_pages)
        slices = {
            "none": slice(0),
            "first": slice(1),
            "three": slice(5, 8),
            "odd": slice(1, None, 2),
            "last": slice(-1, None),
        }
        wanted = every[slices.get(which, slice(None))]
        ids = rows_of_pages(layout, wanted)
        out = np.full((len(ids), layout.spec.row_bytes), POISON, dtype=np.uint8)
        store["layers.1"].rows(ids, out)
        np.testing.assert_array_equal(out, model.rows["layers.1"][ids])
        assert store.stats()["pages_read"] >= len(wanted)  # a page is read for each read batch that wants rows of it

    def test_a_page_that_several_keys_want_is_read_once(self, store, model: Model) -> None:
        keys = np.zeros((300, 3), dtype=np.int64)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert store.stats()["pages_read"] <= 24

    def test_many_threads_read_at_once(self, store, built: Path, model: Model) -> None:
        layout = read_catalog(built).tables["layers.1"]
        faults = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(10):
                ids = rows_of_pages(layout, np.flatnonzero(rng.random(layout.num_pages) < 0.3))
                if not np.array_equal(store["layers.1"].rows(ids), model.rows["layers.1"][ids]):
                    faults.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        assert not faults

    def test_a_flipped_bit_is_noticed_and_its_page_named(self, own_store: Path) -> None:
        layout = read_catalog(own_store).tables["layers.1"]
        file = own_store / layout.shard_file(1)
        damaged = bytearray(file.read_bytes())
        damaged[layout.page_bytes * 2 + 77] ^= 4
        file.write_bytes(damaged)
        bad = layout.pages_per_shard + 2
        with self.open_store(own_store) as store:
            with pytest.raises(CorruptPageError, match=f"page {bad} of table layers.1"):
                store["layers.1"].rows(rows_of_pages(layout, np.arange(bad - 1, bad + 2)))
            store["layers.1"].rows(rows_of_pages(layout, np.array([bad - 1])))

    def test_a_shard_cut_while_open_is_an_error_and_no_signal(self, own_store: Path) -> None:
        layout = read_catalog(own_store).tables["layers.1"]
        with self.open_store(own_store) as store:
            os.truncate(own_store / layout.shard_file(0), 3 * layout.page_bytes + 100)
            store["layers.1"].rows(rows_of_pages(layout, np.array([2])))
            for page in (3, 4, 5):
                with pytest.raises(CorruptPageError, match=f"page {page} of table layers.1|pages of table layers.1"):
                    store["layers.1"].rows(rows_of_pages(layout, np.array([page])))

    def test_small_staging_reads_large_requests(self, built: Path, model: Model) -> None:
        keys = random_keys(np.random.default_rng(5), 500)
        with self.open_store(built, dram="200KiB") as store:
            np.testing.assert_array_equal(store["layers.14"].lookup(keys), model.expected("layers.14", keys))
