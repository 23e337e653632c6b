"""A store at a version answers with the rows of that version, from every tier, whatever is published meanwhile."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import Model, make_model, open_behind_hbm, place_some, random_keys
from support.versions import VersionedModel, make_versions

import tierstore
from tierstore.formats import catalog
from tierstore.formats.catalog import CATALOG_FILE, read_catalog
from tierstore.formats.version_rows import VERSIONS_FOLDER
from tierstore.offline.versions import PUBLISH_LOCK, ChangedRows, publish_rows

IO = ["auto", pytest.param("mmap", marks=pytest.mark.slow), "pread"]
LARGE, SMALL = "64MiB", "640KiB"  # whole tables; static sets and caches of entries


@pytest.fixture(scope="module")
def versioned(tmp_path_factory: pytest.TempPathFactory) -> VersionedModel:
    folder = tmp_path_factory.mktemp("versions")
    model = make_model(folder / "model")
    model.build(folder / "store")
    place_some(folder / "store")
    return make_versions(model, folder / "store", 3)


@pytest.fixture(scope="module")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> VersionedModel:
    folder = tmp_path_factory.mktemp("versions_in_place")
    model = make_model(folder / "model", plain=False)
    model.build(folder / "store", in_place=True)
    place_some(folder / "store")
    return make_versions(model, folder / "store", 2)


def check(store: tierstore.Store, model: Model, seeds: int = 2) -> None:
    """Compares lookups, cold and then warm, by key and by row id, with the model's rows."""
    for name, table in store.tables.items():
        spec = table.spec
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            keys = rng.integers(-1, spec.num_rows, (50, 1)) if spec.is_plain else random_keys(rng, 60)
            for _ in range(2):
                np.testing.assert_array_equal(table.lookup(keys), model.expected(name, keys))
        row_ids = np.random.default_rng(9).integers(-1, spec.num_rows, 500)
        wanted = np.where((row_ids >= 0)[:, None], model.rows[name][row_ids], 0)
        np.testing.assert_array_equal(table.rows(row_ids), wanted)


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("dram", [LARGE, SMALL])
@pytest.mark.parametrize("placement", [None, pytest.param("none", marks=pytest.mark.slow)])
def test_each_version_has_its_own_rows(versioned: VersionedModel, io: str, dram: str, placement: str | None) -> None:
    for version in range(4):
        with tierstore.open(versioned.store, dram, io, placement=placement, version=version) as store:
            check(store, versioned.at(version))
            assert store.stats()["version"] == version


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("dram", [LARGE, SMALL])
def test_rows_of_a_table_in_place_have_versions_too(in_place: VersionedModel, io: str, dram: str) -> None:
    for version in range(3):
        with tierstore.open(in_place.store, dram, io, version=version) as store:
            check(store, in_place.at(version))


def test_the_newest_version_is_the_default_and_stays_while_others_are_published(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store")
    versions = make_versions(model, tmp_path / "store", 1)
    with tierstore.open(tmp_path / "store", SMALL) as before:
        versions.publish()
        with tierstore.open(tmp_path / "store", SMALL) as after:
            check(before, versions.at(1))
            check(after, versions.at(2))
        check(before, versions.at(1))


def test_records_in_the_placement_file_are_not_read_for_entries_with_a_touched_row(versioned: VersionedModel) -> None:
    # Every entry that the placement has is left to NVMe: hbm is said to hold what DRAM would.
    with open_behind_hbm(versioned.store, 1 << 20, SMALL) as store:
        check(store, versioned.at(3), seeds=7)
        name, keys = "layers.1", random_keys(np.random.default_rng(1), 300)
        sources = store[name].explain(keys)
        touched = versioned.touched(name, 3)[versioned.model.row_ids(name, keys)].reshape(*keys.shape, -1).any(axis=-1)
        assert not ((sources == "record") & touched).any()
    with tierstore.open(versioned.store, SMALL, version=0) as base:
        assert (base[name].explain(keys) == "static").any()


def test_static_entries_are_put_together_again(versioned: VersionedModel) -> None:
    name, keys = "layers.1", random_keys(np.random.default_rng(2), 300)
    touched = versioned.touched(name, 3)[versioned.model.row_ids(name, keys)].reshape(*keys.shape, -1).any(axis=-1)
    with tierstore.open(versioned.store, SMALL) as store:
        static = store[name].explain(keys) == "static"
        assert (static & touched).any()
        np.testing.assert_array_equal(store[name].lookup(keys), versioned.at(3).expected(name, keys))


@pytest.mark.parametrize("version", [4, -1, True, "1", 1.0])
def test_a_version_that_is_not_there_is_refused_by_name(versioned: VersionedModel, version: object) -> None:
    with pytest.raises(tierstore.ConfigError, match=r"version: .* versions 0 \(the base\) to 3"):
        tierstore.open(versioned.store, SMALL, version=version)  # type: ignore[arg-type]


def test_a_store_without_versions_keeps_its_bytes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store")
    before = {file: file.read_bytes() for file in (tmp_path / "store").rglob("*.shard")}
    records = (tmp_path / "store" / CATALOG_FILE).read_bytes()
    with tierstore.open(tmp_path / "store", version=0) as store:
        check(store, model)
    with pytest.raises(tierstore.ConfigError, match="only its base"):
        tierstore.open(tmp_path / "store", version=1)
    assert (tmp_path / "store" / CATALOG_FILE).read_bytes() == records
    assert read_catalog(tmp_path / "store").format_version == 1
    make_versions(model, tmp_path / "store", 1)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert read_catalog(tmp_path / "store").format_version == 3


def test_the_index_of_rows_counts_in_the_budget(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=(1,), plain=False)
    model.build(tmp_path / "store")
    versions = make_versions(model, tmp_path / "store", 1, part=1.0)
    num_rows = len(model.rows["layers.1"])
    image = read_catalog(tmp_path / "store")
    assert image.touched == {"layers.1": num_rows}
    with tierstore.open(tmp_path / "store", "300KiB") as store:
        memory = store.stats()["memory"]
        assert num_rows * 18 <= memory["overlay_bytes"] <= num_rows * 19 + 4096
        assert memory["dram_bytes"] <= 300 << 10
        check(store, versions.at(1))
    needed = 100 << 10
    tierstore.open(tmp_path / "store", needed, version=0).close()
    with pytest.raises(tierstore.BudgetError, match=rf"{needed} bytes.*{num_rows} rows that versions have.*version=0"):
        tierstore.open(tmp_path / "store", needed)


def test_eight_readers_see_one_version_whole_while_others_are_published(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", plain=False)
    model.build(tmp_path / "store")
    place_some(tmp_path / "store")
    versions = make_versions(model, tmp_path / "store", 1)
    wrong: list[str] = []
    ended = threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not ended.is_set():
            with tierstore.open(tmp_path / "store", SMALL, readers=1) as store:
                model = versions.at(store.stats()["version"])
                for name in store.tables:
                    keys = random_keys(rng, 20)
                    if not np.array_equal(store[name].lookup(keys), model.expected(name, keys)):
                        wrong.append(name)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(6):
            versions.publish(part=0.3)
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert not wrong


def refused_rows(store: Path, dram: str, wanted: np.ndarray) -> list[str]:
    """Reads all rows in parts; returns what was raised. Whatever is answered must be right."""
    errors = []
    try:
        with tierstore.open(store, dram) as opened:
            for part in np.array_split(np.arange(len(wanted)), 40):
                try:
                    np.testing.assert_array_equal(opened["layers.1"].rows(part), wanted[part])
                except tierstore.CorruptPageError as error:
                    errors.append(str(error))
    except tierstore.FormatError as error:
        errors.append(str(error))
    return errors


def check_flips(tmp_path: Path, count: int) -> None:
    model = make_model(tmp_path / "model", layers=(1,), plain=False)
    model.build(tmp_path / "store")
    versions = make_versions(model, tmp_path / "store", 1)
    file = next((tmp_path / "store" / VERSIONS_FOLDER).glob("*.rows"))
    content, rng = file.read_bytes(), np.random.default_rng(3)
    wanted = versions.at(1).rows["layers.1"]
    for number, at in enumerate([0, 9, 4092, len(content) - 1, *rng.integers(0, len(content), count).tolist()]):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        errors = refused_rows(tmp_path / "store", (LARGE, "300KiB")[number % 2], wanted)
        assert errors, f"byte {at}"  # every byte of the file is read for all rows
        assert all(file.name in error for error in errors)
        report = tierstore.verify(tmp_path / "store")
        assert any(file.name in fault for fault in report.faults), f"byte {at}"


def test_a_flipped_bit_in_a_file_of_rows_is_never_an_answer(tmp_path: Path) -> None:
    check_flips(tmp_path, 8)


@pytest.mark.slow
def test_a_thousand_flipped_bits_in_files_of_rows_are_never_answers(tmp_path: Path) -> None:
    check_flips(tmp_path, 1000)


@pytest.mark.parametrize("what", ["missing", "short", "another"])
def test_files_that_are_not_the_catalogs_are_refused_by_name(tmp_path: Path, what: str) -> None:
    model = make_model(tmp_path / "model", layers=(1,), plain=False)
    model.build(tmp_path / "store")
    make_versions(model, tmp_path / "store", 2)
    first, second = sorted((tmp_path / "store" / VERSIONS_FOLDER).glob("*.rows"))
    if what == "missing":
        second.unlink()
    elif what == "short":
        os.truncate(second, second.stat().st_size - 1)
    else:
        second.write_bytes(first.read_bytes())
    with pytest.raises(tierstore.FormatError, match=second.name):
        tierstore.open(tmp_path / "store", SMALL)
    tierstore.open(tmp_path / "store", SMALL, version=1).close()


def publish_and_die(store: Path, operation: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Publishes in a forked child, which dies after so many writes, syncs and renames; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = operation

    def counting(act: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            result = act(*arguments, **options)
            left -= 1
            if left == 0:
                os._exit(9)
            return result

        return called

    status = 1
    try:
        for name in ("fsync", "write", "pwrite"):
            monkeypatch.setattr(os, name, counting(getattr(os, name)))
        monkeypatch.setattr(Path, "rename", counting(Path.rename))
        rows = np.full((40, 40), 7, dtype=np.uint8)
        publish_rows(store, {name: ChangedRows.of(np.arange(40), rows) for name in ("layers.1", "layers.14")})
        status = 0
    finally:
        os._exit(status)


def test_a_publish_killed_anywhere_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", plain=False)
    model.build(tmp_path / "store")
    versions = make_versions(model, tmp_path / "store", 1)
    for operation in range(1, 60):
        status = publish_and_die(tmp_path / "store", operation, monkeypatch)
        image = read_catalog(tmp_path / "store")
        if status == 0:
            break
        assert status == 9
        assert len(image.versions) == 1
        with tierstore.open(tmp_path / "store", SMALL) as store:
            check(store, versions.at(1), seeds=1)
    assert 10 < operation < 59
    assert len(image.versions) == 2
    named = {Path(table.file).name for version in image.versions.values() for table in version.tables.values()}
    assert {file.name for file in (tmp_path / "store" / VERSIONS_FOLDER).iterdir()} - {PUBLISH_LOCK} == named


def test_an_older_reader_refuses_a_store_with_versions_by_name(
    versioned: VersionedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "KNOWN_FORMAT_VERSIONS", (1, 2))  # those that the release before knew
    with pytest.raises(tierstore.FormatError, match=r"store format 3, this tierstore .* reads 1, 2;"):
        tierstore.open(versioned.store, SMALL, version=0)


def test_the_digest_of_a_store_is_that_of_its_version(versioned: VersionedModel) -> None:
    image = read_catalog(versioned.store)
    digests = [image.at_version(version).identity for version in range(4)]
    assert len(set(digests)) == 4
    assert digests[0] == image.base_identity
    assert image.identity == digests[3]
    assert [replace(image, version=version).identity for version in range(4)] == digests


@pytest.fixture
def old_store(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A store that commit 8498e4b built, with a placement, and its rows, uint8 [240, 16]."""
    with tarfile.open(Path(__file__).parents[1] / "data" / "store-8498e4b.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "store", np.fromfile(tmp_path / "rows.bin", dtype=np.uint8).reshape(-1, 16)


def test_a_store_of_an_early_release_opens_for_ever(old_store: tuple[Path, np.ndarray]) -> None:
    store, rows = old_store
    assert tierstore.verify(store).faults == []
    for version in (None, 0):
        for dram in ("4MiB", "100KiB"):
            with tierstore.open(store, dram, version=version) as opened:
                table = opened["layers.1"]
                np.testing.assert_array_equal(table.rows(np.arange(240)), rows)
                keys = np.arange(40, dtype=np.int64).reshape(20, 2) * 7919
                ids = np.stack(
                    [keys[:, head // 2] % (53, 59, 61, 67)[head] + (0, 53, 112, 173)[head] for head in range(4)]
                )
                np.testing.assert_array_equal(table.lookup(keys), rows[ids.T])
    newer = rows.copy()
    newer[::3] ^= 1
    assert publish_rows(store, {"layers.1": ChangedRows.of(np.arange(0, 240, 3), newer[::3])}) == 1
    for version, wanted in ((0, rows), (1, newer)):
        with tierstore.open(store, "100KiB", version=version) as opened:
            np.testing.assert_array_equal(opened["layers.1"].rows(np.arange(240)), wanted)
