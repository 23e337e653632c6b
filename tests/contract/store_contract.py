"""What every store promises, whatever its tiers and budgets: inherited by a test class for each kind of store."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract.rows_contract import RowsContract
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shapes import ENTRY_BYTES, HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore
from tierstore import kernels


class StoreContract(RowsContract):
    """Subclasses say how to open a store in `open_store`."""

    # Whether one probe answers a key and reports its source: not of a store that asks another host in several requests.
    sources_are_exact = True

    def open_store(self, path: Path) -> tierstore.Store:
        raise NotImplementedError

    @pytest.fixture
    def store(self, built: Path) -> Iterator[tierstore.Store]:
        with self.open_store(built) as store:
            yield store

    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 101, 102, 103, pytest.param(700, marks=pytest.mark.long)])
    @pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_lookup_equals_the_oracle(self, store, model: Model, num_tokens: int, seed: int) -> None:
        keys = random_keys(np.random.default_rng(seed), num_tokens)
        for name in ("layers.1", "layers.14"):
            out = np.full((num_tokens, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
            for _ in range(2):  # the second time from the caches
                assert store[name].lookup(keys, out) is out
                np.testing.assert_array_equal(out, model.expected(name, keys))
                out[:] = 0x5A

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(keys=st.lists(st.lists(st.integers(-1, 2**63 - 1), min_size=3, max_size=3), max_size=12))
    def test_lookup_equals_the_oracle_for_any_keys(self, store, model: Model, keys: list[list[int]]) -> None:
        keys_array = np.array(keys, dtype=np.int64).reshape(-1, 3)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys_array), model.expected("layers.1", keys_array))

    def test_a_lookup_reports_what_answered_each_key(self, store, model: Model) -> None:
        for seed in range(3):  # later ones find some of their keys in the caches
            keys = random_keys(np.random.default_rng(seed // 2), 150)
            before, expected = store.stats(), store["layers.1"].locate(keys)
            sources = np.full(keys.shape, POISON, dtype=np.uint8)
            out = store["layers.1"].lookup(keys, sources=sources)
            np.testing.assert_array_equal(out, model.expected("layers.1", keys))
            names, after = np.array(kernels.SOURCES)[sources], store.stats()
            assert ((names == "none") == (keys < 0)).all()
            if not self.sources_are_exact:
                continue
            read = int(np.isin(names, ("record", "pages")).sum())
            assert after["hits"]["nvme"] - before["hits"]["nvme"] == read
            assert after["hits"]["hbm"] - before["hits"]["hbm"] == int((names == "hbm").sum())
            if "attached" not in before:  # a daemon's cache changes between the two calls
                np.testing.assert_array_equal(sources, expected)

    def test_sources_that_do_not_fit_are_refused_by_name(self, store) -> None:
        keys = np.zeros((4, 3), dtype=np.int64)
        for sources in (np.zeros((4, 2), np.uint8), np.zeros((3, 4), np.uint8).T, np.zeros((8, 3), np.uint8)[::2]):
            with pytest.raises(ValueError, match="sources is"):
                store["layers.1"].lookup(keys, sources=sources)
        with pytest.raises(TypeError, match="sources is int64"):
            store["layers.1"].lookup(keys, sources=keys)

    def test_a_lookup_with_time_to_spare_gives_the_same_rows(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(21), 60)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys, timeout_s=60.0), model.expected("layers.1", keys))

    def test_equal_keys_of_different_orders_have_their_own_rows(self, store, model: Model) -> None:
        keys = np.array([[0, 0, 0], [7, 7, 7], [0, 7, 0], [2**63 - 1] * 3], dtype=np.int64)
        for _ in range(3):
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))

    def test_lookup_returns_zero_rows_for_sentinel(self, store) -> None:
        out = np.full((5, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        store["layers.1"].lookup(np.full((5, 3), -1, dtype=np.int64), out)
        assert not out.any()

    def test_strided_keys_and_buffers_give_the_same_rows(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(2), 60)
        wide = np.full((60, 6), 12345, dtype=np.int64)
        wide[:, ::2] = keys
        out = np.full((120, 24, 80), POISON, dtype=np.uint8)[::2, :, :40]
        store["layers.1"].lookup(wide[:, ::2], out)
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))
        backwards = store["layers.1"].lookup(keys[::-1])
        np.testing.assert_array_equal(backwards, model.expected("layers.1", keys)[::-1])

    @pytest.mark.parametrize("how", ["lookup", "rows", "submit"])
    def test_keys_may_lie_where_the_rows_go(self, store, model: Model, how: str) -> None:
        keys = random_keys(np.random.default_rng(11), 90)
        for _ in range(2):  # the second time from the caches
            buffer = np.zeros(90 * HEADS * ROW_BYTES, dtype=np.uint8)
            out, ids = buffer.reshape(90, HEADS, ROW_BYTES), keys if how != "rows" else model.row_ids("layers.1", keys)
            inside = buffer[8 : 8 + ids.nbytes].view(np.int64).reshape(ids.shape)
            inside[:] = ids
            if how == "lookup":
                store["layers.1"].lookup(inside, out)
            elif how == "rows":
                store["layers.1"].rows(inside, out)
            else:
                store.submit({"layers.1": (inside, out)}).wait(timeout_s=60)
            np.testing.assert_array_equal(out, model.expected("layers.1", keys))

    def test_one_tables_keys_may_lie_where_anothers_rows_go(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(12), 40)
        buffer = np.zeros(40 * HEADS * ROW_BYTES, dtype=np.uint8)
        other = np.zeros((40, HEADS, ROW_BYTES), dtype=np.uint8)
        inside = buffer[: keys.nbytes].view(np.int64).reshape(keys.shape)
        inside[:] = keys
        out = buffer.reshape(40, HEADS, ROW_BYTES)
        store.submit({"layers.14": (keys, out), "layers.1": (inside, other)}).wait(timeout_s=60)
        np.testing.assert_array_equal(out, model.expected("layers.14", keys))
        np.testing.assert_array_equal(other, model.expected("layers.1", keys))

    def test_keys_that_are_not_aligned_give_the_same_rows(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(13), 30)
        odd = np.zeros(keys.nbytes + 1, dtype=np.uint8)[1:].view(np.int64).reshape(keys.shape)
        odd[:] = keys
        assert not odd.flags.aligned
        np.testing.assert_array_equal(store["layers.1"].lookup(odd), model.expected("layers.1", keys))
        out = np.zeros((30, HEADS, ROW_BYTES), dtype=np.uint8)
        store.submit({"layers.1": (odd, out)}).wait(timeout_s=60)
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))

    def test_a_strided_buffer_is_not_written_beside_its_rows(self, store) -> None:
        whole = np.full((6, 24, 50), POISON, dtype=np.uint8)
        store["layers.1"].lookup(np.full((6, 3), 3, dtype=np.int64), whole[:, :, :40])
        assert (whole[:, :, 40:] == POISON).all()

    def test_duplicate_keys_all_get_their_rows(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(3), 400, distinct=5)
        np.testing.assert_array_equal(store["layers.14"].lookup(keys), model.expected("layers.14", keys))

    def test_rows_by_id_equal_the_checkpoint(self, store, model: Model) -> None:
        rows = model.rows["layers.1"]
        ids = np.random.default_rng(4).integers(-1, len(rows), (7, 11))
        expected = np.where((ids >= 0)[..., None], rows[ids], 0)
        np.testing.assert_array_equal(store["layers.1"].rows(ids), expected)
        every = np.arange(len(rows))
        np.testing.assert_array_equal(store["layers.1"].rows(every), rows)
        assert store["layers.1"].rows(np.array(len(rows) - 1)).tolist() == rows[-1].tolist()
        assert store["layers.1"].rows(np.empty((0, 24), dtype=np.int64)).shape == (0, HEADS, ROW_BYTES)

    def test_row_ids_of_whole_tokens_give_the_same_rows_as_keys(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(5), 50)
        ids = model.row_ids("layers.1", keys)
        out = np.full((5, 10, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        assert store["layers.1"].rows(ids.reshape(5, 10, 24), out) is out
        np.testing.assert_array_equal(out.reshape(50, HEADS, ROW_BYTES), model.expected("layers.1", keys))

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_row_ids_that_are_no_token_are_still_exact(self, store, model: Model, seed: int) -> None:
        rng = np.random.default_rng(seed)
        ids = model.row_ids("layers.1", random_keys(rng, 40))
        damage = rng.random(ids.shape) < 0.02
        ids[damage] = rng.integers(-1, len(model.rows["layers.1"]), damage.sum())
        expected = np.where((ids >= 0)[..., None], model.rows["layers.1"][ids], 0)
        for _ in range(2):
            np.testing.assert_array_equal(store["layers.1"].rows(ids), expected)

    def test_plain_tables_are_looked_up_by_row_id(self, store, model: Model) -> None:
        keys = np.array([[0], [32], [-1], [5], [5]], dtype=np.int64)
        expected = np.where(keys[..., None] >= 0, model.rows["plain"][keys], 0)
        for _ in range(2):
            np.testing.assert_array_equal(store["plain"].lookup(keys), expected)
            np.testing.assert_array_equal(store["plain"].rows(keys[:, 0]), expected[:, 0])

    def test_submit_fills_every_table_of_a_step(self, store, model: Model) -> None:
        rng = np.random.default_rng(6)
        requests = {}
        for name, heads, row_bytes, orders in (("layers.1", HEADS, ROW_BYTES, 3), ("layers.14", HEADS, ROW_BYTES, 3)):
            requests[name] = (random_keys(rng, 90, orders), np.full((90, heads, row_bytes), POISON, dtype=np.uint8))
        ticket = store.submit(requests)
        ticket.wait(timeout_s=60)
        ticket.wait(timeout_s=60)
        for name, (keys, out) in requests.items():
            np.testing.assert_array_equal(out, model.expected(name, keys))

    def test_submit_does_not_need_a_wait(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(7), 30)
        outs = [np.full((30, HEADS, ROW_BYTES), POISON, dtype=np.uint8) for _ in range(20)]
        for out in outs:
            store.submit({"layers.1": (keys, out)})
        store.close()
        for out in outs:
            np.testing.assert_array_equal(out, model.expected("layers.1", keys))

    def test_submit_keeps_its_own_keys(self, store, model: Model) -> None:
        keys = random_keys(np.random.default_rng(8), 50)
        expected = model.expected("layers.1", keys)
        out = np.full((50, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        ticket = store.submit({"layers.1": (keys, out)})
        keys[:] = 0
        ticket.wait(timeout_s=60)
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("num_pairs", [0, 1, 2, 350])
    def test_single_pairs_get_their_own_entries(self, store, model: Model, num_pairs: int) -> None:
        rng = np.random.default_rng(num_pairs)
        tokens = random_keys(rng, 200)
        tokens[0] = 7  # equal keys of all orders
        pairs = rng.integers(0, tokens.size, num_pairs).astype(np.int32)
        pairs[:3] = [2, 0, 1][:num_pairs]
        keys = tokens.reshape(-1)[pairs]
        for index, name in enumerate(("layers.1", "layers.14")):
            expected = model.expected(name, tokens).reshape(-1, ENTRY_BYTES)[pairs]
            before = store.stats()
            for _ in range(2):  # the second time from the caches
                out = np.full((num_pairs, ENTRY_BYTES), POISON, dtype=np.uint8)
                pending = store._engine.submit_pairs(index, keys, pairs, out)
                if pending is not None:
                    pending.wait(60)
                    pending.wait(60)
                np.testing.assert_array_equal(out, expected)
            stats = store.stats()
            assert stats["keys"] - before["keys"] == 2 * (keys >= 0).sum()
            assert stats["sentinels"] - before["sentinels"] == 2 * (keys < 0).sum()
            assert stats["batches"] - before["batches"] == 2
            old, new = (part["tables"][name]["orders"] for part in (before, stats))
            counted = [sum(new[order].values()) - sum(old[order].values()) for order in (2, 3, 4)]
            assert counted == [2 * int((keys[pairs % 3 == i] >= 0).sum()) for i in range(3)]

    def test_single_pairs_keep_their_own_keys_and_need_no_wait(self, store, model: Model) -> None:
        tokens = random_keys(np.random.default_rng(10), 30)
        keys, pairs = tokens.reshape(-1).copy(), np.arange(90, dtype=np.int32)
        out = np.full((90, ENTRY_BYTES), POISON, dtype=np.uint8)
        pending = store._engine.submit_pairs(0, keys, pairs, out)
        if pending is not None:
            pending.detach()
        del pending
        keys[:], pairs[:] = 0, 0
        store.close()
        np.testing.assert_array_equal(out, model.expected("layers.1", tokens).reshape(90, ENTRY_BYTES))

    def test_a_closed_store_takes_no_single_pairs(self, store) -> None:
        store.close()
        out = np.full((1, ENTRY_BYTES), POISON, dtype=np.uint8)
        with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
            store._engine.submit_pairs(0, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32), out)
        assert (out == POISON).all()

    @pytest.mark.long
    def test_many_threads_get_their_own_rows(self, store, model: Model) -> None:
        faults = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(12):
                keys = random_keys(rng, 40, distinct=60)
                name = ("layers.1", "layers.14")[int(rng.integers(2))]
                if not np.array_equal(store[name].lookup(keys), model.expected(name, keys)):
                    faults.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        assert not faults

    def test_wrong_arguments_are_refused_by_name(self, store) -> None:
        table = store["layers.1"]
        with pytest.raises(TypeError, match="int32"):
            table.lookup(np.zeros((1, 3), dtype=np.int32))
        with pytest.raises(TypeError, match="float64"):
            table.rows(np.zeros(3))
        with pytest.raises(ValueError, match=r"\[1, 2\]"):
            table.lookup(np.zeros((1, 2), dtype=np.int64))
        with pytest.raises(ValueError, match="-2"):
            table.lookup(np.array([[0, -2, 0]]))
        with pytest.raises(ValueError, match="-5"):
            table.rows(np.array([1, -5]))
        with pytest.raises(ValueError, match=str(table.spec.num_rows)):
            table.rows(np.array([table.spec.num_rows]))
        with pytest.raises(ValueError, match="33"):
            store["plain"].lookup(np.array([[33]]))
        with pytest.raises(ValueError, match=r"\[2, 24, 40\]"):
            table.lookup(np.zeros((1, 3), dtype=np.int64), np.zeros((2, HEADS, ROW_BYTES), dtype=np.uint8))
        with pytest.raises(TypeError, match="int8"):
            table.lookup(np.zeros((1, 3), dtype=np.int64), np.zeros((1, HEADS, ROW_BYTES), dtype=np.int8))
        read_only = np.zeros((1, HEADS, ROW_BYTES), dtype=np.uint8)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            table.lookup(np.zeros((1, 3), dtype=np.int64), read_only)
        with pytest.raises(TypeError, match="no out"):
            store.submit({"layers.1": (np.zeros((1, 3), dtype=np.int64), None)})
        with pytest.raises(KeyError, match="no table"):
            store["layers.2"]

    def test_a_closed_store_says_so(self, store) -> None:
        table = store["layers.1"]
        store.close()
        store.close()
        for call in (
            lambda: table.lookup(np.zeros((1, 3), dtype=np.int64)),
            lambda: table.rows(np.zeros(3, dtype=np.int64)),
            lambda: store.submit({}),
        ):
            with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
                call()

    def test_stats_add_up(self, store) -> None:
        keys = random_keys(np.random.default_rng(9), 200)
        for _ in range(3):
            store["layers.1"].lookup(keys)
        stats = store.stats()
        valid = int((keys >= 0).sum())
        assert stats["keys"] == sum(stats["hits"].values()) == 3 * valid
        assert stats["sentinels"] == 3 * (keys.size - valid)
        assert set(stats["hits"]) == {"hbm", "dram", "nvme"}
        assert stats["batches"] == 3
        orders = stats["tables"]["layers.1"]["orders"]
        assert [sum(orders[o].values()) for o in (2, 3, 4)] == [3 * int((keys[:, i] >= 0).sum()) for i in range(3)]
        assert stats["zero_miss_batches"] <= 3
        assert (stats["pages_read"] == 0) == (stats["hits"]["nvme"] == 0)

    def test_a_store_is_a_collection_of_its_tables(self, store) -> None:
        assert "layers.1" in store
        assert "layers.2" not in store
        assert 0 not in store
        assert list(store) == list(store.tables)
        assert len(store) == len(store.tables)
        assert "layers.1" in repr(store)
        assert "layers.1" in repr(store["layers.1"])

    def test_a_table_keeps_its_store_open(self, built: Path, model: Model) -> None:
        keys = random_keys(np.random.default_rng(14), 10)
        table = self.open_store(built)["layers.1"]
        np.testing.assert_array_equal(table.lookup(keys), model.expected("layers.1", keys))

    def test_what_to_do_instead_of_pickling_an_open_store_is_said(self, store) -> None:
        for what in (store, store["layers.1"]):
            with pytest.raises(TypeError, match="open the store in each worker"):
                pickle.dumps(what)

    def test_tables_and_attachments_are_what_was_built(self, store, model: Model) -> None:
        assert list(store.tables) == [source.spec.name for source in model.sources]
        for source in model.sources:
            assert store.tables[source.spec.name] is store[source.spec.name]
            assert store[source.spec.name].spec == source.spec
        assert store.attachment("note") == b"kept"
        with pytest.raises(KeyError):
            store.attachment("other")
        with pytest.raises(TypeError):
            store.tables["x"] = None
