"""`tierstore versions --keep`: the oldest versions become one. Base and kept ones stay exact, others are refused."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from support.served import KIB, request, serving
from support.stores import make_model, place_some, random_keys
from support.text_store import good, good_json
from support.versions import VersionedModel, make_versions
from support.waiting import eventually

import tierstore
from tierstore.formats import catalog
from tierstore.formats.catalog import CATALOG_FILE, read_catalog
from tierstore.formats.catalog_records import read_records
from tierstore.offline import fold
from tierstore.offline.compact import compact
from tierstore.offline.delta import apply_delta, write_delta
from tierstore.offline.fold import fold_versions

NAME = "layers.1"


@pytest.fixture
def versions(tmp_path: Path) -> VersionedModel:
    model = make_model(tmp_path / "model")
    model.build(tmp_path / "store")
    place_some(tmp_path / "store")
    return make_versions(model, tmp_path / "store", 6, part=0.1)


def check(store: tierstore.Store, versions: VersionedModel, version: int) -> None:
    model = versions.at(version)
    for name, table in store.tables.items():
        row_ids = np.arange(table.spec.num_rows)
        np.testing.assert_array_equal(table.rows(row_ids), model.rows[name])
        if not table.spec.is_plain:
            keys = random_keys(np.random.default_rng(1), 60)
            np.testing.assert_array_equal(table.lookup(keys), model.expected(name, keys))


def files_of(store: Path) -> set[str]:
    return {file.name for file in (store / "versions").glob("*.rows")}


def test_base_and_kept_versions_stay_exact_and_the_others_are_refused_by_name(versions: VersionedModel) -> None:
    before = read_catalog(versions.store)
    identities = {number: before.at_version(number).identity for number in range(7)}
    report = fold_versions(versions.store, keep=3)
    assert (report.version, report.num_folded) == (4, 4)
    image = read_catalog(versions.store)
    assert (sorted(image.versions), image.folded, image.format_version) == ([4, 5, 6], 4, 6)
    for number in (0, 4, 5, 6):
        assert image.at_version(number).identity == identities[number]
        for dram in ("64MiB", "900KiB"):
            with tierstore.open(versions.store, dram, version=number) as store:
                check(store, versions, number)
    for number in (1, 2, 3):
        with pytest.raises(tierstore.ConfigError, match=r"0 \(the base\) and 4 to 6; those before 4 were folded into"):
            tierstore.open(versions.store, version=number)
    assert sorted({name[:8] for name in files_of(versions.store)}) == ["00000005", "00000006", "folded-0"]
    assert report.freed_bytes > report.num_bytes == sum(t.num_bytes for t in image.versions[4].tables.values())
    assert not tierstore.verify(versions.store).faults


def test_versions_go_on_after_a_fold_and_are_folded_again(versions: VersionedModel) -> None:
    fold_versions(versions.store, keep=1)
    assert sorted(read_catalog(versions.store).versions) == [6]
    versions.publish()
    versions.publish()
    assert read_catalog(versions.store).format_version == 6
    assert fold_versions(versions.store, keep=2).version == 7
    assert fold_versions(versions.store, keep=2).num_folded == 0
    for number in (0, 7, 8):
        with tierstore.open(versions.store, "900KiB", version=number) as store:
            check(store, versions, number)
    assert not tierstore.verify(versions.store).faults
    with pytest.raises(tierstore.ConfigError, match="at least 1 version stays"):
        fold_versions(versions.store, keep=0)


def test_compact_and_deltas_of_a_folded_store(versions: VersionedModel, tmp_path: Path) -> None:
    shutil.copytree(versions.store, tmp_path / "other")
    fold_versions(versions.store, keep=2)
    versions.publish()
    write_delta(versions.store, 6, 7, tmp_path / "delta")
    apply_delta(tmp_path / "other", tmp_path / "delta")  # which still has each version by itself
    assert read_catalog(tmp_path / "other").identity == read_catalog(versions.store).identity
    with pytest.raises(tierstore.ConfigError, match=r"versions 1 to 5 were folded .* A at least 5"):
        write_delta(versions.store, 0, 7, tmp_path / "none")
    fold_versions(tmp_path / "other", keep=1)
    compact(tmp_path / "other", tmp_path / "compacted")
    with tierstore.open(tmp_path / "compacted") as store:
        check(store, versions, 7)


def test_a_fold_killed_anywhere_leaves_every_version(versions: VersionedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    for module, name in ((fold, "sha256_of"), (fold, "publish_folded")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill)
            with pytest.raises(Killed):
                fold_versions(versions.store, keep=2)
        for number in (1, 3, 6):
            with tierstore.open(versions.store, version=number) as store:
                check(store, versions, number)
    with monkeypatch.context() as patch:
        patch.setattr(fold, "remove_leftovers", lambda _, image: kill() if image.folded else None)
        with pytest.raises(Killed):
            fold_versions(versions.store, keep=2)
    assert "00000001-layers.1.rows" in files_of(versions.store)  # until the next publish
    versions.publish()
    assert "00000001-layers.1.rows" not in files_of(versions.store)
    with tierstore.open(versions.store) as store:
        check(store, versions, 7)


def test_a_damaged_row_refuses_the_fold_and_changes_nothing(versions: VersionedModel) -> None:
    file = versions.store / "versions" / "00000002-layers.1.rows"
    damaged = bytearray(file.read_bytes())
    damaged[4096 + 100] ^= 1
    file.write_bytes(damaged)
    before = read_records(versions.store)
    with pytest.raises(tierstore.CorruptPageError, match=r"00000002-layers\.1\.rows"):
        fold_versions(versions.store, keep=1)
    assert read_records(versions.store) == before


def test_open_stores_read_on_and_eight_that_open_meanwhile_see_one_version_whole(versions: VersionedModel) -> None:
    wrong: list[object] = []
    ended = threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not ended.is_set():
                with tierstore.open(versions.store, "900KiB", readers=1) as store:
                    model, keys = versions.at(store.stats()["version"]), random_keys(rng, 20)
                    np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    with tierstore.open(versions.store, "900KiB", version=3) as before:
        for reader in readers:
            reader.start()
        try:
            for keep in (4, 2, 1):
                fold_versions(versions.store, keep)
                versions.publish(part=0.1)
        finally:
            ended.set()
            for reader in readers:
                reader.join()
        check(before, versions, 3)
    assert wrong == []


def test_clients_never_read_places_of_files_that_were_folded(versions: VersionedModel, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with serving(versions.store, socket, 1400 * KIB) as daemon, tierstore.connect(socket) as attached:
        fold_versions(versions.store, keep=2)
        check(attached, versions, 6)
        with pytest.raises(tierstore.DaemonError, match=r"versions up to 5 were folded .* tierstore swap SOCKET"):
            tierstore.connect(socket)
        request(socket, "swap", store=str(versions.store))
        eventually(lambda: attached.stats()["attached"]["version"] == 2)
        check(attached, versions, 6)
        with tierstore.connect(socket) as store:
            check(store, versions, 6)
        assert daemon.stat().store.published == 6


def test_a_daemon_that_follows_opens_a_folded_store_again(versions: VersionedModel, tmp_path: Path) -> None:
    with serving(versions.store, tmp_path / "socket", 1400 * KIB, follow=True) as daemon:
        fold_versions(versions.store, keep=2)
        eventually(lambda: daemon.stat().store.version == 2)
        with tierstore.connect(tmp_path / "socket") as store:
            check(store, versions, 6)


def test_an_older_reader_refuses_a_folded_store_by_name(
    versions: VersionedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold_versions(versions.store, keep=2)
    monkeypatch.setattr(catalog, "KNOWN_FORMAT_VERSIONS", (1, 2, 3, 4))
    with pytest.raises(tierstore.FormatError, match=r"store format 6, this tierstore .* reads 1, 2, 3, 4;"):
        tierstore.open(versions.store)


def test_the_command_keeps_and_lists(versions: VersionedModel) -> None:
    said = good("versions", versions.store, "--keep", 2)
    assert "5 versions were folded into 5: " in said.stderr
    assert "5 (folded)" in said.stdout
    assert "nothing was folded" in good("versions", versions.store, "--keep", 2).stderr
    records = good_json("versions", versions.store)
    assert [(each["version"], each.get("folded")) for each in records] == [(0, None), (5, True), (6, False)]
    assert good_json("inspect", versions.store)["versions"]["folded"] == 5
    assert (versions.store / CATALOG_FILE).is_file()
