"""A store with slices of tables gives the rows that the whole store gives, under the table's own row ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.stores import PRIMES, Model, make_model, random_keys

import tierstore
from tierstore.errors import ConfigError
from tierstore.formats.catalog import SLICE_FORMAT_VERSION, read_catalog
from tierstore.slices import slice_bounds

CUTS = [
    *((num_slices, in_place) for num_slices in (1, 2, 3) for in_place in (False, True)),
    *(pytest.param(n, in_place, marks=pytest.mark.slow) for n in (4, 24, 29) for in_place in (False, True)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"))


def built(model: Model, folder: Path, num_slices: int, **options: object) -> list[Path]:
    """Builds all slices; returns their stores."""
    paths = [folder / f"{index}of{num_slices}" for index in range(num_slices)]
    for index, path in enumerate(paths):
        model.build(path, slice=(index, num_slices), shard_bytes=4096 * 3, **options)
    return paths


@pytest.mark.parametrize(("num_slices", "in_place"), CUTS)
def test_slices_hold_every_row_of_the_table_once_under_its_own_id(
    model: Model, tmp_path: Path, num_slices: int, in_place: bool
) -> None:
    paths = built(model, tmp_path, num_slices, in_place=in_place)
    for path in paths:
        assert read_catalog(path).format_version == (SLICE_FORMAT_VERSION if num_slices > 1 else 2 if in_place else 1)
        with tierstore.open(path, dram="4MiB") as store:
            for name, rows in model.rows.items():
                spec = store[name].spec
                ids = np.arange(spec.row_start, spec.row_end)
                assert spec.num_rows == len(rows)
                np.testing.assert_array_equal(store[name].rows(ids), rows[ids])
    ends = [
        [(table.public_spec.row_start, table.public_spec.row_end) for table in read_catalog(path).tables.values()]
        for path in paths
    ]
    for name, parts in zip(model.rows, zip(*ends, strict=True), strict=True):
        assert [start for start, _ in parts] + [len(model.rows[name])] == [0, *(end for _, end in parts)]


@pytest.mark.parametrize("num_slices", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_keys_of_the_whole_table_give_each_slice_its_heads(model: Model, tmp_path: Path, num_slices: int) -> None:
    keys = random_keys(np.random.default_rng(3), 60)
    plain = np.random.default_rng(4).integers(-1, 33, (40, 1))
    found: dict[str, list[np.ndarray]] = {"layers.1": [], "layers.14": []}
    for path in built(model, tmp_path, num_slices):
        with tierstore.open(path, dram="4MiB") as store:
            for name, parts in found.items():
                table = store[name]
                parts.append(table.lookup(np.ascontiguousarray(keys[:, table.spec.columns((2, 3, 4))])))
                by_id = np.ascontiguousarray(table.spec.row_ids(keys[:, table.spec.columns((2, 3, 4))]))
                np.testing.assert_array_equal(table.rows(by_id), parts[-1])
            spec = store["plain"].spec
            mine = plain[((plain >= spec.row_start) & (plain < spec.row_end)) | (plain < 0)].reshape(-1, 1)
            np.testing.assert_array_equal(store["plain"].lookup(mine), model.expected("plain", mine))
    for name, parts in found.items():
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), model.expected(name, keys))


def test_a_row_of_another_slice_is_refused_by_name(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store", slice=(1, 3))
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        table, spec = store["plain"], store["plain"].spec
        assert (spec.row_start, spec.row_end, spec.num_rows, spec.own_rows, spec.is_slice) == (11, 22, 33, 11, True)
        out = np.empty((2, 24), dtype=np.uint8)
        for wrong in (0, 10, 22, 32):
            what = f"row {wrong} of table plain is not in this slice, rows 11 to 22 of 33"
            with pytest.raises(ValueError, match=what):
                table.rows(np.array([11, wrong]))
            with pytest.raises(ValueError, match=what):
                table.submit_rows(np.array([11, wrong]), out)
            with pytest.raises(ValueError, match=what):
                table.lookup(np.array([[11], [wrong]]))
        with pytest.raises(ValueError, match="row id 33 is outside -1 to 32"):
            table.rows(np.array([33]))
        with pytest.raises(ValueError, match="expected a range of this slice's rows, 11 to 22"):
            table.rows(np.array([12]), within=(0, 33))
        ids = np.array([-1, 0, 12, 15, 10, 11, 21, 22, 33, 2**62, -5])
        wanted = np.zeros((11, 24), dtype=np.uint8)
        wanted[[2, 3]] = model.rows["plain"][[12, 15]]
        np.testing.assert_array_equal(table.rows(ids, within=(12, 20)), wanted)
        big = np.full((11, 24), 7, dtype=np.uint8)
        table.submit_rows(ids, big, within=(12, 20)).wait()
        np.testing.assert_array_equal(big, wanted)


def test_a_slice_that_is_cut_inside_a_head_has_rows_and_no_keys(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store", slice=(3, 29))
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        spec = store["layers.1"].spec
        assert (spec.orders, spec.num_heads) == ((), 0)
        with pytest.raises(ValueError, match=r"begin or end inside a head.*read them by row id"):
            store["layers.1"].lookup(np.zeros((4, 3), dtype=np.int64))
        assert store.stats()["keys"] == 0


def test_more_slices_than_rows_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="table plain: 34 slices of 33 rows, must be 1 to 33"):
        model.build(tmp_path / "store", slice=(0, 34))
    with pytest.raises(ConfigError, match="slice 3 of 3: slices are 0/3 to 2/3"):
        model.build(tmp_path / "store", slice=(3, 3))
    assert not (tmp_path / "store").exists()


def test_slices_begin_at_the_heads_that_are_nearest_to_an_even_cut(model: Model) -> None:
    spec = model.sources[0].spec
    assert set(slice_bounds(spec, 7)) <= set(spec.offsets)
    assert slice_bounds(spec, 24) == list(spec.offsets)
    assert slice_bounds(spec, 25) == [index * spec.num_rows // 25 for index in range(25)]
    widths = np.diff([*slice_bounds(spec, 2), spec.num_rows])
    assert abs(int(widths[0]) - int(widths[1])) <= max(spec.moduli)


def test_a_build_of_another_slice_does_not_go_on_in_its_place(model: Model, tmp_path: Path) -> None:
    model.build(tmp_path / "store", slice=(0, 2))
    with pytest.raises(ConfigError, match="with other tables"):
        model.build(tmp_path / "store", slice=(1, 2))
    assert model.build(tmp_path / "store", slice=(0, 2)).shards_built == 0
    assert read_catalog(tmp_path / "store").origin["slice"] == "0/2"


def test_a_page_of_another_slice_does_not_pass_for_ones_own(model: Model, tmp_path: Path) -> None:
    first, second, _ = built(model, tmp_path, 3)
    of_both = [next(path.glob("shards/2-plain/*.shard")) for path in (first, second)]
    assert of_both[0].stat().st_size == of_both[1].stat().st_size
    of_both[1].write_bytes(of_both[0].read_bytes())
    with (
        tierstore.open(second, dram="4MiB") as store,
        pytest.raises(tierstore.CorruptPageError, match="page 0 of table plain"),
    ):
        store["plain"].rows(np.array([11]))


def test_slices_of_many_heads_keep_their_keys() -> None:
    moduli = tuple(PRIMES[:64])
    offsets = tuple(sum(moduli[:head]) for head in range(64))
    spec = tierstore.TableSpec(
        "many", sum(moduli), 8, tuple(range(2, 10)), 8, moduli, offsets, "raw", 1, "0" * 64
    )  # fmt: skip
    for num_slices in range(1, 65):
        bounds = slice_bounds(spec, num_slices)
        assert len(set(bounds)) == num_slices
        for start, end in zip(bounds, [*bounds[1:], spec.num_rows], strict=True):
            part = spec.cut(start, end)
            assert 1 <= len(part.orders) <= 16
            assert part.num_heads == len(part.moduli)
            assert end - start <= spec.num_rows / num_slices + 3 * max(moduli)
    assert spec.cut(0, offsets[17]).orders == ()  # of 8, 8 and 1 heads: 17 groups
