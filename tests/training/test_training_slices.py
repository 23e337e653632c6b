"""Training on slices gives, row by row, the bits of training on the whole store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.stores import make_model
from support.trainable import in_bits, make_trainable

import tierstore
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.compact import compact
from tierstore.offline.delta import apply_delta, write_delta
from tierstore.offline.init import init_store
from tierstore.offline.verify import verify_store

ADAGRAD = tierstore.RowWiseAdagrad(lr=0.05, eps=1e-8)
ROWS = 500


@pytest.fixture(params=[pytest.param("built", marks=pytest.mark.slow), "in place", "from scratch"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Makes a store, or a slice of it, under a name."""
    if request.param == "from scratch":
        specs = [tierstore.TableSpec.plain(name, ROWS, 64, "bf16", 32) for name in ("bf16", "fp32")]

        def init(name: str, **options: object) -> Path:
            init_store(tmp_path / name, specs, seed=5, deviation=0.02, origin={"digest": "ab" * 32}, **options)
            return tmp_path / name

        return init
    made = make_trainable(tmp_path / "model", ROWS, codecs={"bf16": "bf16", "fp32": "fp32"})

    def build(name: str, **options: object) -> Path:
        made.model.build(tmp_path / name, in_place=request.param == "in place", **options)
        return tmp_path / name

    return build


def test_steps_on_slices_give_the_bits_of_steps_on_the_whole_store(make: Callable[..., Path]) -> None:
    rng = np.random.default_rng(1)
    batches = [(rng.integers(0, ROWS, 300), rng.standard_normal((300, 32)).astype(np.float32)) for _ in range(4)]
    found = {}
    for name, slices in {"whole": [None], "halves": [(0, 2), (1, 2)], "quarters": [(i, 4) for i in range(4)]}.items():
        values: dict[str, list[np.ndarray]] = {"bf16": [], "fp32": []}
        for part in slices:
            path = make(f"{name}{part[0] if part else ''}", **({} if part is None else {"slice": part}))
            with tierstore.open_training(path, ADAGRAD, dram="4MiB") as training:
                spec = training["bf16"].spec
                for step, (row_ids, gradients) in enumerate(batches, start=1):
                    mine = np.flatnonzero((row_ids >= spec.row_start) & (row_ids < spec.row_end))
                    training.prefetch({"bf16": row_ids[mine]}).wait(20)
                    with training["bf16"].pinned(row_ids[mine]):
                        for table in ("bf16", "fp32"):
                            training[table].apply(row_ids[mine], gradients[mine])
                    training.commit(step).wait()
            with tierstore.open_training(path, ADAGRAD, dram="4MiB") as training:
                for table, parts in values.items():
                    parts.append(training[table].gather(np.arange(spec.row_start, spec.row_end)))
        found[name] = {table: np.concatenate(parts) for table, parts in values.items()}
    for name in ("halves", "quarters"):
        for table, expected in found["whole"].items():
            np.testing.assert_array_equal(in_bits(found[name][table]), in_bits(expected))


def test_versions_of_a_slice_serve_what_was_published_of_it(tmp_path: Path) -> None:
    made = make_trainable(tmp_path / "model", ROWS, codecs={"bf16": "bf16"})
    made.model.build(tmp_path / "store", slice=(1, 2))
    ids = np.array([260, 499, 250, 260])
    with tierstore.open_training(tmp_path / "store", ADAGRAD, dram="4MiB") as training:
        training["bf16"].apply(ids, np.ones((4, 32), dtype=np.float32))
        training.commit(1).wait()
        trained = training["bf16"].gather(np.arange(250, 500))
        assert training.publish() == 1
    expected = made.model.rows["bf16"][250:].copy()
    changed = [0, 10, 249]
    bits = trained[changed].view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    expected[changed] = rounded.view(np.uint8)
    for options in ({}, {"dram": "4MiB"}):
        with tierstore.open(tmp_path / "store", **options) as store:
            np.testing.assert_array_equal(store["bf16"].rows(np.arange(250, 500)), expected)
            found = store["bf16"].lookup(np.arange(250, 500).reshape(-1, 1))
            np.testing.assert_array_equal(found[:, 0], expected)
    compact(tmp_path / "store", tmp_path / "compacted")
    write_delta(tmp_path / "store", 0, 1, tmp_path / "delta")
    made.model.build(tmp_path / "elsewhere", slice=(1, 2))
    apply_delta(tmp_path / "elsewhere", tmp_path / "delta")
    made.model.build(tmp_path / "another", slice=(0, 2))
    with pytest.raises(ConfigError):
        apply_delta(tmp_path / "another", tmp_path / "delta")
    for name in ("compacted", "elsewhere"):
        with tierstore.open(tmp_path / name) as store:
            assert store["bf16"].spec.row_start == 250
            np.testing.assert_array_equal(store["bf16"].rows(np.arange(250, 500)), expected)
    with tierstore.open(tmp_path / "store", version=0) as store:
        np.testing.assert_array_equal(store["bf16"].rows(np.arange(250, 500)), made.model.rows["bf16"][250:])
    assert verify_store(tmp_path / "store", sources=made.model.sources).faults == []


def test_rows_of_other_slices_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    made = make_trainable(tmp_path / "model", ROWS, codecs={"bf16": "bf16"})
    made.model.build(tmp_path / "store", slice=(1, 2))
    what = "row 249 of table bf16 is not in this slice, rows 250 to 500 of 500"
    with tierstore.open_training(tmp_path / "store", ADAGRAD, dram="4MiB") as training:
        table, wrong = training["bf16"], np.array([300, 249])
        before = table.gather(np.arange(250, 500))
        for call in (
            lambda: table.gather(wrong),
            lambda: table.apply(wrong, np.ones((2, 32), dtype=np.float32)),
            lambda: table.pin_rows(wrong),
            lambda: training.prefetch({"bf16": wrong}),
        ):
            with pytest.raises(ValueError, match=what):
                call()
        assert not training.is_broken
        np.testing.assert_array_equal(in_bits(table.gather(np.arange(250, 500))), in_bits(before))
        np.testing.assert_array_equal(table.gather(np.array([-1])), np.zeros((1, 32)))


def test_a_slice_is_verified_and_repaired_from_the_whole_checkpoint(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    store = tmp_path / "store"
    model.build(store, slice=(1, 3), shard_bytes=4096 * 2)
    assert verify_store(store, sources=model.sources).rows_compared == sum(
        layout.spec.num_rows for layout in read_catalog(store).tables.values()
    )
    shard = sorted((store / "shards").glob("*/*.shard"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    assert tierstore.verify(store).damaged_shards
    report = tierstore.verify(store, source=model, repair=True)
    assert report.faults == []
    assert len(report.repaired) == 1
    assert tierstore.verify(store, source=model).faults == []
