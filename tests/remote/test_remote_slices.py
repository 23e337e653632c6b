"""A slice behind a daemon or a server: clients use the table's own row ids, and learn which rows it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.remote_servers import serving as serving_grpc
from support.served import MIB, request, serving
from support.stores import Model, make_model, random_keys

import tierstore
from tierstore.errors import ConfigError
from tierstore.formats.key_trace import read_key_blocks, read_key_trace_info
from tierstore.remote import messages
from tierstore.store.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def connected(model: Model, folder: Path, how: str, part: tuple[int, int]) -> Iterator[Store]:
    model.build(folder / "store", slice=part)
    with contextlib.ExitStack() as stack:
        if how == "daemon":
            stack.enter_context(serving(folder / "store", folder / "socket", 2 * MIB))
            address = str(folder / "socket")
        else:
            address = f"grpc://{stack.enter_context(serving_grpc(folder / 'store')).address}"
        yield stack.enter_context(tierstore.connect(address))


@pytest.mark.parametrize("how", ["daemon", "grpc"])
@pytest.mark.parametrize("part", [(1, 3), (20, 29)])
def test_clients_of_a_slice_use_the_tables_own_ids(
    model: Model, tmp_path: Path, how: str, part: tuple[int, int]
) -> None:
    keys = random_keys(np.random.default_rng(3), 90)
    with connected(model, tmp_path, how, part) as store, tierstore.open(tmp_path / "store", dram="4MiB") as own:
        for name, rows in model.rows.items():
            spec, table = store[name].spec, store[name]
            assert spec == own[name].spec
            assert (spec.is_slice, spec.num_rows) == (True, len(rows))
            ids = np.random.default_rng(1).integers(spec.row_start, spec.row_end, (7, 9))
            ids[2, 3] = -1
            expected = np.where((ids >= 0)[..., None], rows[ids], 0)
            for _ in range(2):  # from pages, then from the daemon's cache
                np.testing.assert_array_equal(table.rows(ids), expected)
            out = np.full_like(expected, 7)
            table.submit_rows(ids, out).wait()
            np.testing.assert_array_equal(out, expected)
            within = (spec.row_start, spec.row_start + max(1, spec.own_rows // 2))
            outside = (ids < within[0]) | (ids >= within[1])
            np.testing.assert_array_equal(table.rows(ids, within=within), np.where(outside[..., None], 0, expected))
            with pytest.raises(ValueError, match=f"row {spec.row_start - 1} of table {name} is not in this slice"):
                table.rows(np.array([spec.row_start, spec.row_start - 1]))
            if spec.is_plain:
                found = table.lookup(ids.reshape(-1, 1))
                np.testing.assert_array_equal(found[:, 0], expected.reshape(-1, spec.row_bytes))
            elif spec.orders:
                held = [list(model.sources[0 if name == "layers.1" else 1].spec.offsets).index(o) for o in spec.offsets]
                found = table.lookup(np.ascontiguousarray(keys[:, spec.columns((2, 3, 4))]))
                np.testing.assert_array_equal(found, model.expected(name, keys)[:, held])
                whole_tokens = spec.row_ids(np.ascontiguousarray(keys[:, spec.columns((2, 3, 4))]))
                np.testing.assert_array_equal(table.rows(whole_tokens), found)
            else:
                with pytest.raises(ValueError, match="begin or end inside a head"):
                    table.lookup(keys)
        assert store.stats()["keys"] > 0


def test_another_slice_does_not_take_the_place_of_one(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store", slice=(0, 3))
    model.build(tmp_path / "second", slice=(1, 3))
    with (
        serving(tmp_path / "store", tmp_path / "socket", 2 * MIB),
        pytest.raises(ConfigError, match=r"second cannot take the place of .*store: table layers.1: "),
    ):
        request(tmp_path / "socket", "swap", store=str(tmp_path / "second"))


def test_a_description_carries_the_range_and_another_slice_has_another_identity(model: Model) -> None:
    whole = model.sources[0].spec
    first, second = whole.cut_slice(0, 2), whole.cut_slice(1, 2)
    for spec in (whole, first, second, whole.cut_slice(3, 29)):
        assert messages.table_message(spec).as_spec() == spec
    assert len({messages.identity_of([spec]) for spec in (whole, first, second)}) == 3


def test_traces_that_a_slice_records_hold_keys_of_its_tables(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store", slice=(20, 29))
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        spec = store["plain"].spec
        store.start_trace(tmp_path / "trace", 1.0)
        store["plain"].lookup(np.array([[spec.row_start], [-1], [spec.row_start]]))
        store["layers.1"].rows(np.array([store["layers.1"].spec.row_start]))  # has no key
        store.stop_trace()
    (block,) = read_key_blocks(tmp_path / "trace")
    assert block.keys.tolist() == [spec.row_start] * 2
    assert read_key_trace_info(tmp_path / "trace").tables[0].orders == ()
