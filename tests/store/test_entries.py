"""Single keys of single orders get their entries; an order or a key that the table does not have is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierstore
from tests.support.stores import Model, make_model, random_keys


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["4MiB", "192KiB"])
def table(model: Model, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    model.build(tmp_path / "store")
    with tierstore.open(tmp_path / "store", dram=request.param) as store:
        yield store["layers.1"]


def test_each_key_gets_the_entry_of_its_order(model: Model, table: Any) -> None:
    spec, keys = table.spec, random_keys(np.random.default_rng(5), 70)
    entry_bytes = spec.rows_per_key * spec.row_bytes
    expected = model.expected("layers.1", keys).reshape(-1, entry_bytes)
    order = np.random.default_rng(6).permutation(keys.size)
    wanted, indices = keys.reshape(-1)[order], (order % keys.shape[1]).astype(np.int32)
    wanted[3], expected[order[3]] = -1, 0
    out = np.full((keys.size, entry_bytes), 255, dtype=np.uint8)
    ticket = table.submit_entries(indices, wanted, out)
    wanted[:], indices[:] = 0, 0
    ticket.wait(60)
    np.testing.assert_array_equal(out, expected[order])


def test_what_the_table_has_not_is_refused(table: Any) -> None:
    out = np.empty((2, table.spec.rows_per_key * table.spec.row_bytes), dtype=np.uint8)
    for indices, keys, why in [
        ([0, 3], [1, 1], "an order index is outside its 3 orders"),
        ([-1, 0], [1, 1], "an order index is outside its 3 orders"),
        ([0, 1], [1, -2], r"key -2 is outside -1 to 2\^63 - 1"),
    ]:
        with pytest.raises(ValueError, match=why):
            table.submit_entries(np.array(indices, dtype=np.int32), np.array(keys), out)
    for wrong in (out[:1], out.astype(np.int8)):
        with pytest.raises((TypeError, ValueError)):
            table.submit_entries(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.int64), wrong)


def test_a_plain_table_is_asked_by_row_id(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store")
    with (
        tierstore.open(tmp_path / "store", dram="4MiB") as store,
        pytest.raises(ValueError, match="plain is a plain embedding, whose keys are row ids: use submit_rows"),
    ):
        store["plain"].submit_entries(np.zeros(1, np.int32), np.zeros(1, np.int64), np.empty((1, 24), np.uint8))
