"""What every store promises of rows by their ids: ranges of rows, stale ids, buffers of any strides, early starts."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore

NAME = "layers.1"

# Buffers for rows [N, 24, 40], each a view of a larger array: (the array's shape, the view).
STRIDES: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[np.ndarray], np.ndarray]]] = {
    "together": (lambda n: (n, HEADS, ROW_BYTES), lambda a: a),
    "rows of a wider buffer": (lambda n: (n, HEADS, ROW_BYTES + 9), lambda a: a[:, :, 4:-5]),
    "every other token": (lambda n: (2 * n, HEADS, ROW_BYTES), lambda a: a[::2]),
    "heads of a wider token": (lambda n: (n, HEADS + 3, ROW_BYTES), lambda a: a[:, 2:-1]),
    "backwards": (lambda n: (n, HEADS, ROW_BYTES), lambda a: a[::-1, ::-1]),
    "heads outermost": (lambda n: (HEADS, n, ROW_BYTES), lambda a: a.transpose(1, 0, 2)),
    "every third byte": (lambda n: (n, HEADS, 3 * ROW_BYTES), lambda a: a[:, :, 1::3]),
    "bytes backwards": (lambda n: (n, HEADS, ROW_BYTES), lambda a: a[:, :, ::-1]),
}


def poisoned(strides: str, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a buffer of the named strides, and the array that it is a view of."""
    shape, view = STRIDES[strides]
    whole = np.full(shape(num_tokens), POISON, dtype=np.uint8)
    return view(whole), whole


def expected_rows(model: Model, ids: np.ndarray, within: tuple[int, int] | None = None) -> np.ndarray:
    """The rows of ids, of any values, by plain indexing."""
    rows = model.rows[NAME]
    start, end = within or (0, len(rows))
    is_wanted = (ids >= start) & (ids < end)
    return np.where(is_wanted[..., None], rows[np.where(is_wanted, ids, 0)], 0).astype(np.uint8)


def some_ids(model: Model, seed: int, num_tokens: int = 60) -> np.ndarray:
    """Ids of whole tokens, and in between of tokens of which single ids are those of no key."""
    rng = np.random.default_rng(seed)
    ids = model.row_ids(NAME, random_keys(rng, num_tokens))
    loose = rng.random(num_tokens) < 0.2
    ids[loose, rng.integers(HEADS)] = rng.integers(0, len(model.rows[NAME]), int(loose.sum()))
    return ids


def answer(store: tierstore.Store, how: str, ids: np.ndarray, out: np.ndarray, **options: Any) -> np.ndarray:
    """Has a store look ids up, by `rows` or `submit_rows`."""
    if how == "rows":
        assert store[NAME].rows(ids, out, **options) is out
    else:
        store[NAME].submit_rows(ids, out, **options).wait(timeout_s=60)
    return out


both_ways = pytest.mark.parametrize("how", ["rows", "submit_rows"])


class RowsContract:
    """Inherited by `StoreContract`, whose subclasses open the store."""

    @pytest.mark.long
    @both_ways
    @pytest.mark.parametrize("strides", STRIDES)
    def test_rows_by_id_go_to_buffers_of_any_strides_and_nowhere_else(
        self, store, model: Model, how: str, strides: str
    ) -> None:
        ids = some_ids(model, seed=3)
        for within in (None, (0, len(model.rows[NAME])), (700, 4321)):  # the second time from the caches
            out, whole = poisoned(strides, len(ids))
            answer(store, how, ids, out, within=within)
            np.testing.assert_array_equal(out, expected_rows(model, ids, within))
            out[...] = POISON
            assert (whole == POISON).all()

    @both_ways
    def test_the_rows_of_all_ranks_together_are_all_rows(self, store, model: Model, how: str) -> None:
        ids = some_ids(model, seed=4)
        num_rows = len(model.rows[NAME])
        for num_ranks in (2, 5, 40):  # ranges end within an order's heads, and within one head's rows
            bounds = np.linspace(0, num_rows, num_ranks + 1).astype(int)
            summed = np.zeros((len(ids), HEADS, ROW_BYTES), dtype=np.uint8)
            for within in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                out, _ = poisoned("together", len(ids))
                answer(store, how, ids, out, within=within)
                np.testing.assert_array_equal(out, expected_rows(model, ids, within))
                summed |= out
            np.testing.assert_array_equal(summed, expected_rows(model, ids))

    @both_ways
    def test_stale_ids_of_padded_tokens_give_zero_rows_and_no_error(self, store, model: Model, how: str) -> None:
        ids, num_rows = some_ids(model, seed=5), len(model.rows[NAME])
        stale = np.array([-2, -(2**63), 2**63 - 1, num_rows, -1, 2**40])
        ids[40:] = stale[np.random.default_rng(5).integers(0, len(stale), ids[40:].shape)]
        ids[10, 3:] = num_rows  # a part of a token
        out, _ = poisoned("together", len(ids))
        answer(store, how, ids, out, within=(0, num_rows))
        np.testing.assert_array_equal(out, expected_rows(model, ids))
        assert not out[40:].any()
        with pytest.raises(ValueError, match="is outside -1 to"):
            answer(store, how, ids, out)

    @both_ways
    def test_an_empty_range_gives_zero_rows_and_reads_nothing(self, store, model: Model, how: str) -> None:
        ids, out = some_ids(model, seed=6), poisoned("rows of a wider buffer", 60)[0]
        before = store.stats()
        answer(store, how, ids, out, within=(500, 500))
        assert not out.any()
        assert store.stats()["hits"] == before["hits"]
        assert store.stats()["pages_read"] == before["pages_read"]

    @both_ways
    def test_ids_that_make_no_tokens_are_looked_up_one_by_one(self, store, model: Model, how: str) -> None:
        ids = np.random.default_rng(7).integers(0, len(model.rows[NAME]), (30, 7))
        for chosen in (ids, ids.reshape(-1), ids[:3, :2]):
            shape = (*chosen.shape[:-1], chosen.shape[-1] + 2, ROW_BYTES)
            out = np.full(shape, POISON, dtype=np.uint8)[..., 1:-1, :]
            answer(store, how, chosen, out, within=(100, 2000))
            np.testing.assert_array_equal(out, expected_rows(model, chosen, (100, 2000)))

    @both_ways
    def test_plain_tables_keep_to_the_range_too(self, store, model: Model, how: str) -> None:
        ids = np.array([[0, 32, -1], [5, 5, 33], [-7, 6, 20]])
        out = np.full((3, 5, 24), POISON, dtype=np.uint8)[:, ::2]
        is_wanted = (ids >= 5) & (ids < 33)
        for _ in range(2):
            if how == "rows":
                store["plain"].rows(ids, out, within=(5, 33))
            else:
                store["plain"].submit_rows(ids, out, within=(5, 33)).wait(timeout_s=60)
            rows = model.rows["plain"][np.where(is_wanted, ids, 0)]
            np.testing.assert_array_equal(out, np.where(is_wanted[..., None], rows, 0))

    @both_ways
    def test_ids_of_any_strides_shape_and_place_are_taken(self, store, model: Model, how: str) -> None:
        ids = some_ids(model, seed=8)
        expected = expected_rows(model, ids)
        wide = np.full((60, 2 * HEADS + 1), -77, dtype=np.int64)
        wide[:, 1::2] = ids
        odd = np.zeros(ids.nbytes + 1, dtype=np.uint8)[1:].view(np.int64).reshape(ids.shape)
        odd[:] = ids
        for given in (wide[:, 1::2], odd, np.asfortranarray(ids)):
            np.testing.assert_array_equal(answer(store, how, given, poisoned("together", 60)[0]), expected)
        np.testing.assert_array_equal(
            answer(store, how, ids[::-1], poisoned("every other token", 60)[0]), expected[::-1]
        )
        inside = np.zeros(60 * HEADS * ROW_BYTES, dtype=np.uint8)
        within_out = inside[8 : 8 + ids.nbytes].view(np.int64).reshape(ids.shape)
        within_out[:] = ids
        out = inside.reshape(60, HEADS, ROW_BYTES)[:, ::-1]
        np.testing.assert_array_equal(answer(store, how, within_out, out), expected)

    @both_ways
    def test_batches_of_several_axes_may_have_any_strides(self, store, model: Model, how: str) -> None:
        ids = some_ids(model, seed=9).reshape(4, 15, HEADS)
        expected = expected_rows(model, ids)
        joined = np.full((4, 15, HEADS + 1, ROW_BYTES), POISON, dtype=np.uint8)[:, :, :-1]
        apart = np.full((15, 4, HEADS, ROW_BYTES), POISON, dtype=np.uint8).transpose(1, 0, 2, 3)
        for out in (joined, apart):
            np.testing.assert_array_equal(answer(store, how, ids, out), expected)
        nothing = np.empty((0, 3, HEADS), dtype=np.int64)
        assert answer(store, how, nothing, np.empty((0, 3, HEADS, ROW_BYTES), dtype=np.uint8)).size == 0

    def test_rows_that_were_submitted_need_no_wait_and_no_ids(self, store, model: Model) -> None:
        ids = some_ids(model, seed=10)
        expected = expected_rows(model, ids, (100, 5000))
        outs = [poisoned(strides, 60)[0] for strides in STRIDES for _ in range(3)]
        for out in outs:
            given = ids.copy()
            store[NAME].submit_rows(given, out, within=(100, 5000))
            given[:] = 0
        store.close()
        for out in outs:
            np.testing.assert_array_equal(out, expected)

    def test_a_submit_keeps_its_buffer_until_its_rows_are_there(self, store, model: Model) -> None:
        ids = some_ids(model, seed=11)
        whole = np.full((60, HEADS, ROW_BYTES + 8), POISON, dtype=np.uint8)
        gone = threading.Event()
        weakref.finalize(whole, gone.set)
        out = whole[:, :, 8:]
        ticket = store[NAME].submit_rows(ids, out)
        del whole, out
        ticket.wait(timeout_s=60)
        ticket.wait(timeout_s=60)
        del ticket
        gc.collect()
        store[NAME].rows(ids[:1])  # the next call drops what jobs held
        assert gone.wait(10)

    def test_wrong_requests_by_row_id_are_refused_by_name(self, store, model: Model) -> None:
        table, num_rows = store[NAME], len(model.rows[NAME])
        ids, out = np.zeros((2, HEADS), dtype=np.int64), np.zeros((2, HEADS, ROW_BYTES), dtype=np.uint8)
        for act in (table.rows, table.submit_rows):
            with pytest.raises(TypeError, match="row_ids are int32, expected int64"):
                act(ids.astype(np.int32), out)
            with pytest.raises(ValueError, match=r"out is \[2, 24, 39\], the rows are \[2, 24, 40\]"):
                act(ids, out[:, :, 1:])
            with pytest.raises(TypeError, match="out is int8"):
                act(ids, out.view(np.int8))
            for bad in (-2, num_rows, -(2**63), 2**63 - 1):
                ids[1, 5] = bad
                with pytest.raises(ValueError, match=f"row id {bad} is outside -1 to {num_rows - 1}"):
                    act(ids, out)
            ids[1, 5] = 0
            for within in ((5, 4), (-1, 4), (0, num_rows + 1)):
                with pytest.raises(ValueError, match=f"within is {within[0]} to {within[1]}"):
                    act(ids, out, within=within)
            for within in (7, (1,), (1, 2, 3), ("a", "b"), (0.0, 5.0)):
                with pytest.raises(TypeError, match="expected two ints"):
                    act(ids, out, within=within)
        with pytest.raises(TypeError, match="has no out"):
            table.submit_rows(ids, None)
        read_only = out.copy()
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            table.submit_rows(ids, read_only)

    def test_a_closed_store_takes_no_row_ids(self, store) -> None:
        table, ids = store[NAME], np.zeros((2, HEADS), dtype=np.int64)
        store.close()
        out = poisoned("rows of a wider buffer", 2)[0]
        for act in (table.rows, table.submit_rows):
            with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
                act(ids, out, within=(0, 5))
        assert (out == POISON).all()
