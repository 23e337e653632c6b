"""verify: finds every kind of damage, names its place, and a lookup of it raises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.stores import Model, make_model

import tierstore
from tierstore.formats.catalog import read_catalog
from tierstore.offline.verify import verify_store


def verify(store: Path, model: Model | None = None, **options):
    sources = model.sources if model else None
    origin = model.checkpoint.to_dict() if model else None
    return verify_store(store, sources=sources, origin=origin, **options)


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def test_a_good_store_has_no_faults(model: Model, built: Path) -> None:
    report = verify(built, model)
    assert report.faults == []
    assert report.rows_compared == sum(len(rows) for rows in model.rows.values())
    assert report.pages_checked == sum(table.num_pages for table in read_catalog(built).tables.values())


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_anywhere_is_found_and_its_page_not_looked_up(own_store: Path, model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = read_catalog(own_store)
    name = list(image.tables)[int(rng.integers(len(image.tables)))]
    layout = image.tables[name]
    shard_index = int(rng.integers(layout.num_shards))
    file = own_store / layout.shard_file(shard_index)
    at = int(rng.integers(file.stat().st_size))
    flip(file, at, int(rng.integers(8)))
    page = layout.shard_pages(shard_index)[0] + at // 4096
    faults = verify(own_store).faults
    assert any(f"page {page} of table {name}" in fault for fault in faults)
    assert any("SHA-256" in fault for fault in faults)
    row_id = page * layout.rows_per_page
    for dram in ("600KiB", "64MiB"):  # from a cache, and from resident tables: the rest of the table still answers
        with tierstore.open(own_store, dram=dram) as store:
            with pytest.raises(tierstore.CorruptPageError, match=f"page {page} of table {name}"):
                store[name].rows(np.array([-1, row_id]))
            good = np.flatnonzero(np.arange(layout.spec.num_rows) // layout.rows_per_page != page)
            np.testing.assert_array_equal(store[name].rows(good), model.rows[name][good])


@pytest.mark.parametrize("origin", ["another place", "another table", "another store"])
def test_a_page_from_elsewhere_is_found_and_not_looked_up(own_store: Path, tmp_path: Path, origin: str) -> None:
    image = read_catalog(own_store)
    target = own_store / image.tables["layers.1"].shard_file(0)
    if origin == "another store":
        other = make_model(tmp_path / "other", seed=1)
        other.build(tmp_path / "other-store", shard_bytes=65536)
        source = (tmp_path / "other-store" / image.tables["layers.1"].shard_file(0), 2)
    else:
        table = {"another place": "layers.1", "another table": "layers.14"}[origin]
        source = (own_store / image.tables[table].shard_file(0), 3 if origin == "another place" else 2)
    page = source[0].read_bytes()[source[1] * 4096 :][:4096]
    with target.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(page)
    assert any("page 2 of table layers.1" in fault for fault in verify(own_store).faults)
    with tierstore.open(own_store, dram="600KiB") as store, pytest.raises(tierstore.CorruptPageError, match="page 2 "):
        store["layers.1"].rows(np.array([2 * image.tables["layers.1"].rows_per_page]))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_or_folder_in_place_of_a_shard_is_named_and_not_waited_for(own_store: Path, kind: str) -> None:
    file = own_store / read_catalog(own_store).tables["layers.1"].shard_file(1)
    file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.mkdir()
    code = "import sys; from tierstore.offline.verify import verify_store; print(*verify_store(sys.argv[1]).faults)"
    done = subprocess.run([sys.executable, "-c", code, str(own_store)], capture_output=True, text=True, timeout=60)
    assert re.search(r"shard 1 of table layers\.1 .*not a regular file", done.stdout), done.stderr


@pytest.mark.parametrize("damage", ["missing", "short", "long", "another"])
def test_a_shard_that_is_not_the_one_built_is_named(own_store: Path, damage: str) -> None:
    layout = read_catalog(own_store).tables["layers.1"]
    file = own_store / layout.shard_file(1)
    if damage == "missing":
        file.unlink()
    elif damage == "another":
        shutil.copy(own_store / layout.shard_file(0), file)
    else:
        os.truncate(file, file.stat().st_size + (1 if damage == "long" else -1))
    assert any("shard 1 of table layers.1" in fault for fault in verify(own_store).faults)
    if damage == "another":
        with (
            tierstore.open(own_store, dram="600KiB") as store,
            pytest.raises(tierstore.CorruptPageError, match="moved"),
        ):
            store["layers.1"].rows(np.array([layout.shard_pages(1)[0] * layout.rows_per_page]))
    else:
        with pytest.raises(tierstore.FormatError, match="shard 1 of table"):
            tierstore.open(own_store)


def test_a_shard_cut_while_it_is_open_raises(own_store: Path) -> None:
    layout = read_catalog(own_store).tables["layers.1"]
    with tierstore.open(own_store, dram="600KiB") as store:
        os.truncate(own_store / layout.shard_file(0), 4096 + 100)
        with pytest.raises(tierstore.CorruptPageError, match="cut while open"):
            store["layers.1"].rows(np.array([layout.rows_per_page]))
        store["layers.1"].rows(np.array([0]))


def test_rows_that_differ_from_the_checkpoint_are_named(own_store: Path, tmp_path: Path) -> None:
    """A store that is whole in itself, compared with a checkpoint of other values."""
    other = make_model(tmp_path / "other", seed=1)
    report = verify(own_store, other)
    assert any("another checkpoint" in fault for fault in report.faults)
    assert any("row 0 of table layers.1 differs" in fault for fault in report.faults)
    assert any("more rows" in fault for fault in report.faults)


def test_a_checkpoint_without_the_stores_tables_is_refused(own_store: Path, tmp_path: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match="has tables"):
        verify(own_store, make_model(tmp_path / "other", layers=(1,)))


def test_a_table_of_another_hash_is_a_fault(own_store: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", layers=(14, 1))
    assert any("table layers.1: the checkpoint gives" in fault for fault in verify(own_store, other).faults)


def test_a_sample_finds_damage_where_it_looks(own_store: Path, model: Model) -> None:
    report = verify(own_store, model, sample_rows=10, seed=1)
    assert report.faults == []
    assert 0 < report.pages_checked <= 30
    layout = read_catalog(own_store).tables["layers.1"]
    for index in range(layout.num_shards):
        file = own_store / layout.shard_file(index)
        for page in range(file.stat().st_size // 4096):
            flip(file, page * 4096)
    assert verify(own_store, model, sample_rows=10, seed=1).faults


def test_a_sample_of_more_rows_than_there_are_is_all_of_them_whatever_its_size(built: Path, model: Model) -> None:
    report = verify(built, model, sample_rows=10**18)
    assert report.faults == []
    assert report.rows_compared == sum(len(rows) for rows in model.rows.values())


def test_a_shard_that_may_not_be_read_is_named_with_its_remedy(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: object, *arguments: int, **options: int) -> int:
        if str(path).endswith(".shard"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    faults = verify(built).faults
    assert faults
    assert all("Permission denied; make it readable for this user" in fault for fault in faults)


def test_an_unfinished_store_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(tierstore.StoreNotReadyError):
        verify(tmp_path / "nothing")
