"""Versions leave a store in two ways: as a new store of shards, and as a file for the same store elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.stores import make_model, place_some, random_keys
from support.versions import VersionedModel, make_versions

import tierstore
from tierstore.formats.catalog import read_catalog
from tierstore.offline.compact import compact
from tierstore.offline.delta import apply_delta, write_delta
from tierstore.tools.cli import cli

NAME = "layers.1"


def make(folder: Path, count: int = 3, *, in_place: bool = False) -> VersionedModel:
    model = make_model(folder / "model", plain=not in_place)
    model.build(folder / "store", in_place=in_place)
    return make_versions(model, folder / "store", count)


def rows_of(store: Path, version: int | None = None) -> dict[str, np.ndarray]:
    with tierstore.open(store, "16MiB", version=version) as opened:
        return {name: table.rows(np.arange(table.spec.num_rows)) for name, table in opened.tables.items()}


def check(store: Path, versions: VersionedModel, version: int, of: int | None = None) -> None:
    for name, rows in rows_of(store, of).items():
        np.testing.assert_array_equal(rows, versions.rows[version][name])


@pytest.mark.parametrize("in_place", [False, True], ids=["shards", "in place"])
def test_a_compacted_store_has_the_versions_rows_in_shards(tmp_path: Path, in_place: bool) -> None:
    versions = make(tmp_path, in_place=in_place)
    for version in (None, 0, 2):
        new = tmp_path / f"new {version}"
        compact(versions.store, new, version, shard_bytes=65536)
        check(new, versions, 3 if version is None else version)
        assert tierstore.verify(new).faults == []
        image = read_catalog(new)
        assert (image.version, image.format_version, image.is_in_place) == (0, 1, False)
    with tierstore.open(tmp_path / "new None", "400KiB") as store:
        keys = random_keys(np.random.default_rng(1), 60)
        np.testing.assert_array_equal(store[NAME].lookup(keys), versions.at(3).expected(NAME, keys))
    assert len({read_catalog(tmp_path / f"new {version}").identity for version in (None, 0, 2)}) == 3


def test_eight_readers_beside_compaction_see_one_version_whole(tmp_path: Path) -> None:
    versions = make(tmp_path, 2)
    wrong: list[Exception] = []
    ended, begun = threading.Event(), threading.Barrier(9)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        begun.wait()
        try:
            while not ended.is_set():
                with tierstore.open(versions.store, "900KiB", readers=1) as store:
                    model = versions.at(store.stats()["version"])
                    for name, table in store.tables.items():
                        row_ids = rng.integers(0, table.spec.num_rows, 200)
                        np.testing.assert_array_equal(table.rows(row_ids), model.rows[name][row_ids])
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    begun.wait()
    try:
        compact(versions.store, tmp_path / "compacted", shard_bytes=1 << 16)
        check(tmp_path / "compacted", versions, 2)
        versions.publish()
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def test_a_compaction_refuses_damage_by_name(tmp_path: Path) -> None:
    versions = make(tmp_path, 1)
    file = versions.store / read_catalog(versions.store).versions[1].tables[NAME].file
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(tierstore.CorruptPageError, match=file.name):
        compact(versions.store, tmp_path / "new")
    with pytest.raises(tierstore.StoreNotReadyError):
        tierstore.open(tmp_path / "new")


def test_a_delta_gives_another_host_the_same_versions(tmp_path: Path) -> None:
    versions = make(tmp_path, 0)
    shutil.copytree(versions.store, tmp_path / "other")
    for _ in range(3):
        versions.publish()
    for since, until in ((0, 1), (1, 3)):
        report = write_delta(versions.store, since, until, tmp_path / "delta")
        assert (report.first_version, report.last_version) == (since + 1, until)
        applied = apply_delta(tmp_path / "other", tmp_path / "delta")
        assert (applied.first_version, applied.last_version) == (since + 1, until)
        check(tmp_path / "other", versions, until)
        assert read_catalog(tmp_path / "other").identity == read_catalog(versions.store).at_version(until).identity
    again = apply_delta(tmp_path / "other", tmp_path / "delta")
    assert again.first_version > again.last_version
    write_delta(versions.store, 0, 3, tmp_path / "all")
    assert apply_delta(tmp_path / "other", tmp_path / "all").num_bytes == 0
    for version in range(4):
        check(tmp_path / "other", versions, version, version)
    assert tierstore.verify(tmp_path / "other").faults == []


def test_a_delta_of_part_of_what_is_there_adds_the_rest(tmp_path: Path) -> None:
    versions = make(tmp_path, 1)
    shutil.copytree(versions.store, tmp_path / "other")
    versions.publish()
    write_delta(versions.store, 0, 2, tmp_path / "delta")
    assert apply_delta(tmp_path / "other", tmp_path / "delta").first_version == 2
    check(tmp_path / "other", versions, 2)


def test_deltas_that_do_not_fit_a_store_are_refused_by_name(tmp_path: Path) -> None:
    versions = make(tmp_path, 2)
    write_delta(versions.store, 1, 2, tmp_path / "delta")
    for folder, error, words in (
        ("base", "begins behind version 1, .* up to 0: apply the delta of 0..1 before it", 0),
        ("forked", "differ at version 1", 1),
    ):
        store = tmp_path / folder
        shutil.copytree(versions.store, store)
        shutil.rmtree(store)
        versions.model.build(store)
        if words:
            make_versions(versions.model, store, 1, part=0.1)
        with pytest.raises(tierstore.ConfigError, match=error):
            apply_delta(store, tmp_path / "delta")
    other = make_model(tmp_path / "other model", seed=5)
    other.build(tmp_path / "other")
    with pytest.raises(tierstore.ConfigError, match="whose base has digest"):
        apply_delta(tmp_path / "other", tmp_path / "delta")
    with pytest.raises(tierstore.ConfigError, match="A below B"):
        write_delta(versions.store, 2, 2, tmp_path / "none")
    with pytest.raises(tierstore.ConfigError, match="version: 7 is not one"):
        write_delta(versions.store, 0, 7, tmp_path / "none")


def test_paths_that_are_no_deltas_and_no_new_stores_are_refused_by_name(tmp_path: Path) -> None:
    versions = make(tmp_path, 1)
    versions.model.build(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for its writer
    (tmp_path / "folder").mkdir()
    for what in ("pipe", "folder"):
        with pytest.raises(tierstore.ConfigError, match=f"{what} is not a regular file; give a file that"):
            apply_delta(tmp_path / "other", tmp_path / what)
        with pytest.raises(tierstore.ConfigError, match=f"{what} is there and not a regular file"):
            write_delta(versions.store, 0, 1, tmp_path / what)
    with pytest.raises(tierstore.ConfigError, match="missing: No such file or directory; give a file that"):
        apply_delta(tmp_path / "other", tmp_path / "missing")
    assert (tmp_path / "pipe").is_fifo()
    other = make_model(tmp_path / "foreign model", seed=8)
    other.build(tmp_path / "foreign")
    with pytest.raises(tierstore.ConfigError, match="holds a finished store of another checkpoint") as refused:
        compact(versions.store, tmp_path / "foreign")
    assert str(refused.value).endswith("; give another path")
    with pytest.raises(tierstore.ConfigError, match="is the store itself, which stays as it is: give a new folder"):
        compact(versions.store, versions.store.parent / "." / versions.store.name)


def test_a_damaged_delta_publishes_nothing(tmp_path: Path) -> None:
    versions = make(tmp_path, 1)
    versions.model.build(tmp_path / "other")
    write_delta(versions.store, 0, 1, tmp_path / "delta")
    content = (tmp_path / "delta").read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 9, 20, 4090, len(content) // 2, *rng.integers(0, len(content), 12).tolist()]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad").write_bytes(damaged)
        try:
            apply_delta(tmp_path / "other", tmp_path / "bad")
        except tierstore.FormatError:
            assert read_catalog(tmp_path / "other").version == 0
        else:  # a bit between two files, which is nobody's
            check(tmp_path / "other", versions, 1)
            shutil.rmtree(tmp_path / "other")
            versions.model.build(tmp_path / "other")
    (tmp_path / "bad").write_bytes(content[:-4096])
    with pytest.raises(tierstore.FormatError, match="cut short"):
        apply_delta(tmp_path / "other", tmp_path / "bad")


def run(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_say_what_they_do(tmp_path: Path) -> None:
    versions = make(tmp_path, 2)
    records = json.loads(run("versions", versions.store, "--json"))
    assert [record["version"] for record in records] == [0, 1, 2]
    assert records[2]["digest"] == read_catalog(versions.store).identity
    assert "rows have a newer version than the base's" in run("versions", versions.store)
    assert (
        "only its base" in run("versions", versions.store.with_name("fresh"))
        if (versions.model.build(versions.store.with_name("fresh")))
        else True
    )
    run("delta", versions.store, "0..2", "-o", tmp_path / "delta")
    assert "published versions 1 to 2" in run("delta", versions.store.with_name("fresh"), "--apply", tmp_path / "delta")
    assert "nothing was published" in run("delta", versions.store.with_name("fresh"), "--apply", tmp_path / "delta")
    run("compact", versions.store, tmp_path / "new", "--version", 1)
    check(tmp_path / "new", versions, 1)
    assert "nothing is wrong" in run("verify", versions.store)


def test_a_placement_of_the_base_serves_every_version(tmp_path: Path) -> None:
    versions = make(tmp_path, 1)
    place_some(versions.store)
    versions.publish()
    keys = random_keys(np.random.default_rng(3), 100)
    for version in range(3):
        with tierstore.open(versions.store, "640KiB", version=version) as store:
            assert (store[NAME].explain(keys) == "static").any()
            np.testing.assert_array_equal(store[NAME].lookup(keys), versions.at(version).expected(NAME, keys))


def test_a_delta_is_never_written_over_a_file(tmp_path: Path) -> None:
    there = tmp_path / "config.json"
    there.write_text("{}")
    done = CliRunner().invoke(cli, ["delta", "store", "0..1", "-o", str(there)])
    assert done.exit_code == 2
    assert "exists already" in done.output
    assert there.read_text() == "{}"
