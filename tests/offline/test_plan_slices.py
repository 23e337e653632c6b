"""Profiles and plans of the whole table place, in a slice, the entries of the heads that it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.stores import Model, make_model

import tierstore
from tierstore.errors import FingerprintMismatchError
from tierstore.formats.key_trace import KeyBlock, KeyTraceWriter, TracedTable
from tierstore.kernels import SOURCES

NUM_TOKENS = 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), plain=False)


def write_trace(path: Path, spec: tierstore.TableSpec, keys: np.ndarray) -> Path:
    """A trace of keys [N, O] of a table, all of them."""
    with KeyTraceWriter(
        path, tables=[TracedTable(spec.name, spec.fingerprint, spec.orders)], sample_rate=1.0
    ) as writer:
        orders = np.tile(np.arange(keys.shape[1], dtype=np.uint8), len(keys))
        batch = np.repeat(np.arange(len(keys), dtype=np.int64), keys.shape[1])
        writer.add(KeyBlock(np.zeros(keys.size, dtype=np.uint16), orders, keys.reshape(-1), batch))
        writer.finish(num_batches=len(keys), num_dropped=0)
    return path


@pytest.mark.parametrize(("part", "dram"), [((0, 2), "320KiB"), ((1, 3), "260KiB")])
def test_a_trace_of_the_whole_table_plans_a_slice(
    model: Model, tmp_path: Path, part: tuple[int, int], dram: str
) -> None:
    whole = model.sources[0].spec
    keys = np.random.default_rng(0).zipf(1.2, (NUM_TOKENS, 3)).astype(np.int64)
    trace = write_trace(tmp_path / "trace", whole, keys)
    store = tmp_path / "store"
    model.build(store, slice=part)
    profile = tierstore.profile(store, trace, held_out=0.3)
    tierstore.place(store, tierstore.plan(store, profile, dram=dram))
    with tierstore.open(store, dram=dram) as opened:
        table = opened["layers.1"]
        columns = table.spec.columns(whole.orders)
        hot = np.ascontiguousarray(np.ones((1, 3), dtype=np.int64)[:, columns])
        assert {SOURCES[each] for each in table.locate(hot).reshape(-1)} <= {"static", "resident"}
        assert opened.stats()["placement"]["static_entries"]["layers.1"] > 0
        held = [whole.offsets.index(offset) for offset in table.spec.offsets]
        found = table.lookup(np.ascontiguousarray(keys[:, columns]))
        np.testing.assert_array_equal(found, model.expected("layers.1", keys)[:, held])
    mine = write_trace(tmp_path / "mine", table.spec, np.ascontiguousarray(keys[:, columns]))
    again = tierstore.profile(store, mine, held_out=0.3)
    assert tierstore.place(store, tierstore.plan(store, again, dram=dram)) == 2
    assert tierstore.verify(store, source=model).faults == []


def test_a_plain_slice_places_the_rows_that_it_has(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=(1,))
    spec = model.sources[1].spec
    keys = np.random.default_rng(0).zipf(1.2, (NUM_TOKENS, 1)).astype(np.int64) % 33
    trace = write_trace(tmp_path / "trace", spec, keys)
    model.build(tmp_path / "store", slice=(1, 3))
    profile = tierstore.profile(tmp_path / "store", trace, held_out=0.3)
    plan = tierstore.plan(tmp_path / "store", profile, dram="400KiB", nvme_entries="64KiB")
    tierstore.place(tmp_path / "store", plan)
    with tierstore.open(tmp_path / "store", dram="400KiB") as opened:
        mine = np.arange(11, 22).reshape(-1, 1)
        np.testing.assert_array_equal(opened["plain"].lookup(mine), model.expected("plain", mine))
    assert tierstore.verify(tmp_path / "store").faults == []


def test_a_trace_of_another_slice_is_refused(model: Model, tmp_path: Path) -> None:
    other = model.sources[0].spec.cut_slice(1, 5)
    assert other.orders not in (model.sources[0].spec.orders, model.sources[0].spec.cut_slice(0, 3).orders)
    trace = write_trace(tmp_path / "trace", other, np.ones((50, len(other.orders)), dtype=np.int64))
    model.build(tmp_path / "store", slice=(0, 3))
    with pytest.raises(FingerprintMismatchError, match="profile it with the store that recorded it"):
        tierstore.profile(tmp_path / "store", trace)
